"""The real launcher on a machine without a GPU: ``python pretend_gpu.py <arguments of scripts/launch.sh>`` trains on the CPU as if it were a Hopper GPU.

Megatron, its data-parallel buffers, its distributed optimizer and checkpoints, TransformerEngine's modules and every line of this package run unchanged. What
TransformerEngine has in C++ (RMSNorm, rotation, its own cast, its products) is a few lines of torch here; attention goes its unfused way in torch, Adam is
torch. A function mode turns "cuda" into "cpu". So shapes, layouts, dtypes, hooks, flags, gradients' ways and files are checked, and numbers are those of the
reference; speed, memory and what only CUDA does are not. RANK and WORLD_SIZE may be set: gloo connects the processes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FLAGS = ("--distributed-backend", "gloo", "--no-bias-dropout-fusion", "--num-workers", "0")


def command(*arguments: str) -> list[str]:
    """Megatron's flags that scripts/launch.sh makes of these arguments, and those that the CPU wants."""
    mine, _, megatron = (" ".join(map(shlex.quote, arguments))).partition(" -- ")
    line = [str(ROOT / "scripts" / "launch.sh"), *shlex.split(mine), "--dry-run", "--", *shlex.split(megatron), *FLAGS]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return shlex.split(shown.split("-m fp8_recipes.pretrain_gpt")[1])


# --- devices ------------------------------------------------------------------------------------------------------------------------------------------------


def is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return device.startswith("cuda") if isinstance(device, str) else isinstance(device, int) and not isinstance(device, bool)


class Pretend(TorchFunctionMode):
    """CUDA devices become the CPU. TransformerEngine is told that tensors are on a GPU; this package is not: it takes the reference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func == torch.Tensor.is_cuda.__get__:
            return "transformer_engine" in sys._getframe(1).f_code.co_filename
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to:
            args = tuple(CPU if isinstance(a, (str, torch.device)) and is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


class Nothing:
    """A stream, or an event."""

    cuda_stream, device = 0, CPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: Nothing()

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True


def torch_cuda() -> None:
    """``torch.cuda`` of one H200 that does nothing."""
    cuda = torch.cuda
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="pretended", total_memory=150 << 30)
    random = {
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "manual_seed_all": lambda _: None,
        "default_generators": [torch.default_generator],
        "current_device": lambda: 0,
        "_lazy_call": lambda call, **_: call(),
        "_lazy_init": lambda: None,
    }
    names = {"is_available": True, "is_initialized": True, "device_count": 1, "get_device_properties": properties, "get_device_capability": (9, 0)}
    names |= {"get_device_name": "pretended", "is_current_stream_capturing": False, "mem_get_info": (100 << 30, 140 << 30), "memory_stats": {}}
    names |= dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"), 0)
    names |= dict.fromkeys(("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "init", "set_stream"))
    names |= {"current_stream": Nothing(), "default_stream": Nothing()}
    for name, value in names.items():
        setattr(cuda, name, lambda *_, _value=value, **__: _value)
    for name in ("stream", "device"):
        setattr(cuda, name, lambda *_: contextlib.nullcontext())
    cuda.Event = cuda.Stream = Nothing  # type: ignore[assignment,misc]
    for name, value in random.items():
        for place in (cuda, cuda.random):
            if hasattr(place, name):
                setattr(place, name, value)
    for name, dtype in (("FloatTensor", torch.float), ("IntTensor", torch.int), ("LongTensor", torch.long), ("ByteTensor", torch.uint8)):
        setattr(cuda, name, lambda values, _dtype=dtype: torch.tensor(values, dtype=_dtype))
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.get_device = lambda _: 0


def autograd() -> None:
    """A mode is off inside the functions it handles, and backward would be one of them."""

    def backward(self: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None) -> None:
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    torch.autograd.has_torch_function = lambda *_: False
    torch.Tensor.backward = backward  # type: ignore[method-assign]


def one_gloo_thread() -> None:
    """Groups made from here on work on one thread: gloo's usual two corrupt the heap in torch 2.11.

    Each writes the name of the operation it has done into one string of the group, after waking who waits and without a lock (`ProcessGroupGloo::runLoop`).
    Names of more than 15 characters are on the heap, such as "ALLGATHER_COALESCED" at the end of a step of Megatron's distributed optimizer. Where the other
    thread is done with the next operation at that moment, one writes into what the other has freed, or frees it twice. The order of operations is the same
    on all ranks, so one thread waits for nothing that comes later.
    """
    gloo = dist.ProcessGroupGloo
    make = gloo.__init__
    if make.__name__ == "with_one_thread":
        return

    def with_one_thread(self: Any, store: Any, rank: int, size: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        options = gloo._Options()
        options._devices, options._threads, options._timeout = [gloo.create_default_device()], 1, timeout
        make(self, store, rank, size, options)

    gloo.__init__ = with_one_thread  # type: ignore[method-assign]


# --- what is C++ --------------------------------------------------------------------------------------------------------------------------------------------


def rmsnorm(x: Any, w: Any, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, zero_centered: bool) -> Any:
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x.float() * rstd[:, None] * (w.float() + zero_centered)).to(x.dtype), None, rstd


def rmsnorm_backward(dy: Any, x: Any, rstd: Any, w: Any, margin: int, zero_centered: bool) -> Any:
    assert dy.is_contiguous() and x.is_contiguous() and dy.dim() == 2 and dy.dtype == x.dtype
    n, g = x.float() * rstd[:, None], dy.float() * (w.float() + zero_centered)
    return (rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype), (dy.float() * n).sum(0).to(w.dtype)


def rope(t: Any, freqs: Any, start: Any, layout: Any, interleaved: bool, cu_seqlens: Any, cp_size: int, cp_rank: int, sign: int = 1) -> Any:
    assert start is None and not interleaved and cu_seqlens is None and cp_size == 1 and freqs.shape == (t.shape[0], 1, 1, t.shape[-1])
    first, second = t.float().chunk(2, dim=-1)
    cos, sin = freqs.cos().chunk(2, dim=-1)[0], sign * freqs.sin().chunk(2, dim=-1)[0]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(t.dtype)


def rope_backward(*arguments: Any) -> Any:
    return rope(*arguments, sign=-1)


def quantize(x: Any, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Delayed and current scaling, with the transposed form that Hopper's products want."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    assert isinstance(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer)), type(quantizer)
    assert x.is_contiguous()
    dtype, source = TE_DType_To_Torch[quantizer.dtype], x.detach().float()
    largest, amax = torch.finfo(dtype).max, source.abs().max()
    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.copy_(amax)
        scale = quantizer.scale.clone()
    else:
        scale = (largest / amax.clamp_min(1e-12)).reshape(1)
    data = (source * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if out is None:
        out = quantizer.create_tensor_from_data(data, fake_dtype=x.dtype, internal=quantizer.internal)
    out._data = data if quantizer.rowwise_usage else None
    out._scale_inv = (1 / scale).float().reshape(1)
    out._transpose = data.reshape(-1, data.shape[-1]).t().contiguous() if quantizer.columnwise_usage else None
    out._transpose_invalid = out._transpose is None
    return out


def value(t: Any) -> torch.Tensor:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    if not hasattr(t, "_fp8_dtype"):
        return t.float()
    data = t._data if t._data is not None else t._transpose.t().contiguous()
    return data.view(TE_DType_To_Torch[t._fp8_dtype]).float() * t._scale_inv


def generic_gemm(
    a: Any, trans_a: bool, b: Any, trans_b: bool, out: Any, quantizer: Any, out_dtype: Any, bias: Any, bias_type: Any, gelu: Any, gelu_in: Any, grad: bool,
    workspace: Any, size: Any, accumulate: bool, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    from transformer_engine.pytorch.constants import TE_DType

    x, y = value(a), value(b)
    rows, lead = y.reshape(-1, y.shape[-1]), y.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    product = rows.t() @ x if trans_b else (rows @ (x.t() if trans_a else x)).view(*lead, -1)
    if bias is not None and not grad:
        product = product + bias.float()
    if out is not None:
        return out.copy_(out.float() + product if accumulate else product), None, None, None
    return product.to({t: torch_dtype for torch_dtype, t in TE_DType.items()}.get(out_dtype, torch.bfloat16)), None, None, None


def transformer_engine() -> None:
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.attention.dot_product_attention import softmax
    from transformer_engine.pytorch.attention.dot_product_attention import utils as attention
    from transformer_engine.pytorch.cpp_extensions import gemm

    for module in [m for name, m in sys.modules.items() if name.startswith("transformer_engine")]:
        for name, function in (("rmsnorm_fwd", rmsnorm), ("rmsnorm_bwd", rmsnorm_backward)):
            if name in vars(module):
                setattr(module, name, function)
    tex.generic_gemm, tex.quantize = generic_gemm, quantize
    tex.fused_rope_forward, tex.fused_rope_backward = rope, rope_backward
    gemm.get_cublas_workspace = lambda *_: torch.empty(1)
    attention.get_attention_backend = lambda _: (False, None, False, None, True, [])  # UnfusedDotProductAttention
    softmax.FusedScaleMaskSoftmax.is_kernel_available = lambda *_: False


class FusedAdam(torch.optim.Optimizer):
    """TransformerEngine's in torch: the step belongs to the group, moments are made at the first step."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **_: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                update = m / (1 - b1 ** group["step"]) / ((v / (1 - b2 ** group["step"])).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


def megatron() -> None:
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as base

    for module in (clip_grads, base):
        module.multi_tensor_applier, module.multi_tensor_scale_impl = utils.local_multi_tensor_applier, utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_tensor_impl = utils.local_multi_tensor_l2_norm, None
    optimizer.Adam = FusedAdam


def main(*arguments: str) -> None:
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    os.environ.update(LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="", CUDA_DEVICE_MAX_CONNECTIONS="1", NVTE_UNFUSED_FP8_UPDATE="1")
    for name, default in defaults.items():
        os.environ.setdefault(name, default)
    flags = command(*arguments)
    from fp8_recipes.megatron import pretrain, shims

    shims.install()
    for pretend in (torch_cuda, autograd, one_gloo_thread, transformer_engine, megatron):
        pretend()
    with Pretend(), torch.compiler.set_stance("force_eager"):
        pretrain.main(flags)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
