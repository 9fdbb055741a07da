"""Real Megatron MoE layers on the CPU: the released wheel's MoELayer, router and TEGroupedMLP, which only ask whether a GPU is there when they are built.

What a CPU cannot do is replaced by the same arithmetic in torch: the stock layer's grouped products, and TransformerEngine's GEMM in the router.
"""

from __future__ import annotations

import contextlib
import copy
import os
import unittest.mock

import torch
from pretend_gpu import one_gloo_thread

HIDDEN, FFN, EXPERTS = 128, 128, 8


@contextlib.contextmanager
def pretend_gpu():
    """TransformerEngine's constructors ask for a GPU; on the CPU device they need none."""
    with unittest.mock.patch("torch.cuda.is_available", return_value=True), on_cpu():
        yield


@contextlib.contextmanager
def on_cpu():
    """Megatron's router moves its weight to the current GPU and multiplies through TransformerEngine where that is installed; without it by torch.mm."""
    from megatron.core.transformer.moe import moe_utils

    device = unittest.mock.patch("torch.cuda.current_device", return_value="cpu")
    synchronize = unittest.mock.patch("torch.cuda.synchronize")  # checkpoints wait for the GPU
    with device, synchronize, unittest.mock.patch.object(moe_utils, "te_general_gemm", None), torch.compiler.set_stance("force_eager"):
        yield


def initialise(rank: int = 0, world: int = 1, store: str = "", expert_parallel: int = 1, tensor_parallel: int = 1) -> None:
    """torch.distributed over gloo, Megatron's process groups, our shims. ``store``: a file that all ranks share."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from fp8_recipes.megatron import shims

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    shims.install()
    one_gloo_thread()
    kind = torch.distributed.FileStore(store, world) if store else torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, store=kind)
    sizes = {"tensor_model_parallel_size": tensor_parallel, "expert_model_parallel_size": expert_parallel, "expert_tensor_parallel_size": 1}
    parallel_state.initialize_model_parallel(**sizes)
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()  # built with every layer, used by none


def finish() -> None:
    from megatron.core import parallel_state

    torch.distributed.barrier()  # leave together: a rank that is gone early may abort in gloo's threads
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    del os.environ["RANK"], os.environ["WORLD_SIZE"]  # or later tests of this process take it for one of torchrun's


class Shared(torch.nn.Module):
    """Stands for Megatron's shared experts, whose linears are TransformerEngine's."""

    def __init__(self, *, config, **_):
        super().__init__()
        self.proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False, dtype=config.params_dtype)

    def forward(self, hidden):
        return self.proj(hidden)


def config_of(**changes):
    """TransformerConfig of one MoE layer under fp8_flow_moe."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_grouped_gemm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "use_cpu_initialization": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "fp8": "e4m3",
        "fp8_recipe": "fp8_flow_moe",
        "gradient_accumulation_fusion": True,
        "expert_tensor_parallel_size": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**(given | changes))


XIELU = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
"""What Megatron's configuration says of experts with xIELU: the rest is in the layer's spec."""


def build(config, layer_number: int = 2, seed: int = 0, xielu: bool = False):
    """A MoELayer of the released wheel with TEGroupedMLP, on the CPU. xielu: in the experts, as `fog` builds them."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    torch.manual_seed(seed)
    spec = get_moe_module_spec(use_te=True, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    if xielu:
        from fp8_recipes.megatron import fog

        spec = fog.with_xielu(spec)
    stock = spec.keywords["submodules"]
    with pretend_gpu():
        layer = MoELayer(config, MoESubmodules(experts=stock.experts, shared_experts=Shared, router=stock.router), layer_number=layer_number)
        layer.set_layer_number(layer_number)
    return layer


class StockExperts(torch.nn.Module):
    """What TEGroupedMLP computes in bf16 (a weighted activation between two products), with its parameters."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def activation(self, h):
        if not self.experts.config.gated_linear_unit:
            return self.experts.activation_func(h)
        gate, up = h.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def forward(self, hidden, tokens_per_expert, probs):
        sizes, parts = tokens_per_expert.tolist(), []
        for i, (h, p) in enumerate(zip(hidden.split(sizes), probs.split(sizes), strict=True)):
            wide = (h @ getattr(self.experts.linear_fc1, f"weight{i}").t()).float()
            act = (self.activation(wide) * p[:, None].float()).to(h.dtype)
            parts.append(act @ getattr(self.experts.linear_fc2, f"weight{i}").t())
        return torch.cat(parts), None


def stock_bf16(layer):
    """The same layer under Megatron's own forward in bf16: a new MoELayer with copies of the parameters."""
    config = copy.copy(layer.config)
    config.fp8, config.fp8_recipe, config.moe_token_dispatcher_type = None, "delayed", "allgather"
    stock = build(config, layer_number=layer.layer_number)
    stock.load_state_dict(layer.state_dict())
    stock.experts = StockExperts(stock.experts)
    return stock.train(layer.training)


def reduced_gradients(layer, x, dy):
    """Gradients by name as Megatron's optimizer gets them: from its data parallelism around the layer, which takes the mean over ranks, and its sums over
    tensor-parallel ranks; and the names of those that are summed over the ranks with the same experts alone."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    with pretend_gpu():
        wrapped = DistributedDataParallel(layer.config, DistributedDataParallelConfig(), layer)
    with on_cpu(), unittest.mock.patch("torch.cuda.current_stream"):
        wrapped(x)[0].backward(dy)
        finalize_model_grads([wrapped])
    of_experts = {p for buffer in wrapped.expert_parallel_buffers for p in buffer.params}
    named = list(layer.named_parameters())
    return {n: p.main_grad.clone() for n, p in named}, {n for n, p in named if p in of_experts}


def gradients(layer, x, dy):
    """(y, dx, {name: gradient}) of one step."""
    x = x.detach().clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    with on_cpu():
        y, bias = layer(x)
        y.backward(dy)
    assert bias is None
    return y.detach(), x.grad, {n.replace("experts.experts.", "experts."): p.grad for n, p in layer.named_parameters() if p.grad is not None}
