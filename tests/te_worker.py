"""One of two ranks of TransformerEngine modules under tensor parallelism: ``python te_worker.py RANK DIRECTORY``.

Builds whole modules and their shards from the same weights, runs both on the same data under ``moss``, and writes to DIRECTORY/RANK.pt, by kind and mode: pairs
of every output and gradient (of the shards, put together or summed over the ranks; of the whole module), anchors of the shards' predicted scales, and the
largest value of each whole weight. GPUs and nccl where there are two, else the CPU (`pretend_gpu`) and gloo.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

RANKS, HIDDEN, FFN, TOKENS, BATCH = 2, 256, 512, 64, 2
MODES = {"tp": {}, "sp": {"sequence_parallel": True}}
OPTIONS: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16}
LAYER = {"hidden_dropout": 0, "attention_dropout": 0, "self_attn_mask_type": "causal", "fuse_qkv_params": True, "attn_input_format": "sbhd"}


class TwoLinears(torch.nn.Module):
    """Column-parallel LayerNormLinear and row-parallel Linear, as around an attention core."""

    def __init__(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        import transformer_engine.pytorch as te

        super().__init__()
        self.qkv = te.LayerNormLinear(HIDDEN, FFN, normalization="RMSNorm", **OPTIONS, **first)
        self.proj = te.Linear(FFN, HIDDEN, **OPTIONS, **second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.qkv(x))


def build(kind: str, parallel: dict[str, Any]) -> torch.nn.Module:
    """``parallel``: options of tensor parallelism, none for the whole module."""
    import transformer_engine.pytorch as te

    if kind == "two linears":
        return TwoLinears(*(parallel and parallel | {"parallel_mode": mode} for mode in ("column", "row")))
    gated = OPTIONS | {"normalization": "RMSNorm", "activation": "swiglu"} | (parallel and parallel | {"set_parallel_mode": True})
    return te.LayerNormMLP(HIDDEN, FFN, **gated) if kind == "mlp" else te.TransformerLayer(HIDDEN, FFN, 4, **gated, **LAYER)


def shard(name: str, whole: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor:
    """This rank's part of a parameter, or of its gradient."""
    if whole.shape == shape:
        return whole
    if name.endswith("fc1_weight"):  # [gate; up]: a part of each
        return whole.view(2, FFN, HIDDEN).chunk(RANKS, dim=1)[rank].reshape(shape)
    dim = next(d for d, (a, b) in enumerate(zip(whole.shape, shape, strict=True)) if a != b)
    return whole.chunk(RANKS, dim=dim)[rank]


def run(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    import transformer_engine.pytorch as te

    from fp8_recipes.te import recipe as te_recipe

    x = x.detach().clone().requires_grad_()
    with te.autocast(recipe=te_recipe("moss")):
        y = module(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def gathered(t: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(t) for _ in range(RANKS)]
    torch.distributed.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def compare(kind: str, mode: str, rank: int, device: str) -> dict[str, Any]:
    from fp8_recipes.te import automatic_scaling

    torch.manual_seed(0)
    whole = build(kind, {})
    x, dy = (torch.randn(TOKENS, BATCH, HIDDEN, device=device).bfloat16() for _ in range(2))
    parts = build(kind, {"tp_group": torch.distributed.group.WORLD, "tp_size": RANKS} | MODES[mode])
    shapes = {name: p.shape for name, p in parts.named_parameters()}
    with torch.no_grad():
        for (name, p), (_, q) in zip(parts.named_parameters(), whole.named_parameters(), strict=True):
            p.copy_(shard(name, q, p.shape, rank))
    scaling = automatic_scaling(parts, torch.optim.AdamW(parts.parameters(), betas=(0.9, 0.95)))
    want = run(whole, x, dy)
    sequence = mode == "sp"
    got = run(parts, *((t.chunk(RANKS)[rank] if sequence else t) for t in (x, dy)))
    for name in got:
        if name in ("y", "dx"):
            got[name] = gathered(got[name]) if sequence else got[name]
        elif got[name].dim() == 1 and sequence:  # a norm's gain has seen this rank's tokens only
            torch.distributed.all_reduce(got[name])
    scales = {name: p.fp8_predicted_scale.anchor_amax for name, p in parts.named_parameters() if p.dim() == 2}
    assert scaling.attached and got.keys() == want.keys()
    return {"pairs": {n: (g.cpu(), (want[n] if n in ("y", "dx") else shard(n, want[n], shapes[n], rank)).cpu()) for n, g in got.items()},
            "scales": {name: float(scale) for name, scale in scales.items()},
            "largest": {name: float(p.detach().abs().max()) for name, p in whole.named_parameters()}}  # fmt: skip


def main(rank: int, directory: Path) -> None:
    real = torch.cuda.is_available() and torch.cuda.device_count() >= RANKS
    pretence: Any = contextlib.nullcontext()
    if real:
        torch.cuda.set_device(rank)
    else:
        import pretend_gpu

        torch.set_num_threads(1)
        for pretend in (pretend_gpu.torch_cuda, pretend_gpu.autograd, pretend_gpu.transformer_engine):
            pretend()
        pretence = pretend_gpu.Pretend()
    torch.distributed.init_process_group("nccl" if real else "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    with pretence, torch.compiler.set_stance("default" if real else "force_eager"):
        found = {f"{kind}, {mode}": compare(kind, mode, rank, "cuda" if real else "cpu") for kind in ("two linears", "mlp", "layer") for mode in MODES}
    torch.save(found, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(int(sys.argv[1]), Path(sys.argv[2]))
