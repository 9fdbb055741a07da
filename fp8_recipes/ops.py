"""The operations, chosen by where the tensors are: Triton kernels for CUDA tensors, the plain torch reference for CPU tensors. Nothing else decides.

Signatures and meaning: `fp8_recipes.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from . import reference
from .recipe import RecipeError
from .reference import GroupedTensor, RowLayout, RowMap, SendMap, dequantize, grouped_exact, rows_for
from .tensor import ScaledTensor


def refuse_wrong_device(way_out: str = "Use tensors on the CPU (reference numerics), or leave these layers in bf16") -> None:
    """RecipeError unless this process's GPU can run the kernels (compute capability 9.x)."""
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        raise RecipeError(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; these recipes need Hopper (9.0). {way_out}")


@cache
def _kernels() -> Any:
    """Triton is imported where there is a GPU to use it."""
    refuse_wrong_device()
    from . import kernels

    return kernels


def _backend(t: torch.Tensor | ScaledTensor | GroupedTensor) -> Any:
    kind = t.device.type
    if kind == "cuda":
        return _kernels()
    if kind == "cpu":
        return reference
    raise ValueError(f"fp8_recipes runs on CUDA and CPU tensors, got a tensor on {t.device}")


def quantize(x: torch.Tensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(x).quantize(x, *args, **kwargs)


def quantize_weight(w: torch.Tensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(w).quantize_weight(w, *args, **kwargs)


def fold(q: ScaledTensor, granularity: str) -> ScaledTensor:
    return _backend(q).fold(q, granularity)


def fold_transpose(q: ScaledTensor, to: str = "column_block") -> ScaledTensor:
    return _backend(q).fold_transpose(q, to)


def gemm(a: ScaledTensor, b: ScaledTensor, **kwargs: Any) -> torch.Tensor:
    return _backend(a).gemm(a, b, **kwargs)


def gemm_exact(a: ScaledTensor, b: ScaledTensor, **kwargs: Any) -> torch.Tensor:
    return reference.gemm_exact(a, b, **kwargs)


def rmsnorm_quantize(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[ScaledTensor, torch.Tensor]:
    return _backend(x).rmsnorm_quantize(x, *args, **kwargs)


def rmsnorm_add(x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    return _backend(x).rmsnorm_add(x, residual, gain, eps)


def rmsnorm_add_backward(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backend(x).rmsnorm_add_backward(dy, x, gain, rstd)


def swiglu_quantize(h: torch.Tensor | ScaledTensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(h).swiglu_quantize(h, *args, **kwargs)


def swiglu_quantize_saving(h: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[ScaledTensor, ScaledTensor]:
    return _backend(h).swiglu_quantize_saving(h, *args, **kwargs)


def swiglu_backward_quantize(dy: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A `ScaledTensor`; with ``prob`` also the gradient of prob."""
    return _backend(dy).swiglu_backward_quantize(dy, *args, **kwargs)


def softmax_parts(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backend(logits).softmax_parts(logits, labels)


def cross_entropy_backward_quantize(logits: torch.Tensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(logits).cross_entropy_backward_quantize(logits, *args, **kwargs)


def measure_experts(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return _experts_backend(weights).measure_experts(weights)


def quantize_experts(weights: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> GroupedTensor:
    return _experts_backend(weights).quantize_experts(weights, *args, **kwargs)


def _experts_backend(weights: Sequence[torch.Tensor]) -> Any:
    """Nothing to ask for a device: the reference, which says so."""
    return _backend(weights[0]) if len(weights) else reference


def grouped_gemm(a: ScaledTensor, b: GroupedTensor, block_expert: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return _backend(a).grouped_gemm(a, b, block_expert, **kwargs)


def grouped_wgrad(a_t: GroupedTensor, b_t: GroupedTensor, offsets: torch.Tensor, **kwargs: Any) -> Any:
    """``out``, which is required."""
    return _backend(a_t).grouped_wgrad(a_t, b_t, offsets, **kwargs)


def grouped_fold_transpose(q: ScaledTensor, offsets: torch.Tensor, block_expert: torch.Tensor, to: str = "column_block") -> GroupedTensor:
    return _backend(q).grouped_fold_transpose(q, offsets, block_expert, to)


def scaling_aware_transpose(q: ScaledTensor, block_expert: torch.Tensor | None = None) -> GroupedTensor:
    return _backend(q).scaling_aware_transpose(q, block_expert)


def grouped_gemm_exact(a: ScaledTensor, b: Any, block_expert: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return grouped_exact.grouped_gemm_exact(a, b, block_expert, **kwargs)


def grouped_wgrad_exact(a: ScaledTensor, b: ScaledTensor, offsets: torch.Tensor, **kwargs: Any) -> Any:
    """``out``, which is required."""
    return grouped_exact.grouped_wgrad_exact(a, b, offsets, **kwargs)


def moments(x: torch.Tensor | None, q: ScaledTensor | None = None, **kwargs: Any) -> torch.Tensor:
    source = x if x is not None else q
    if source is None:
        raise ValueError("moments needs x, its quantised form q, or both")
    return _backend(source).moments(x, q, **kwargs)


def moment_parts(device: torch.device) -> int:
    """Parts that ``out`` of `moments` should have on ``device``."""
    return _kernels().MOMENT_PARTS if device.type == "cuda" else 1


def gelu_quantize(h: torch.Tensor | ScaledTensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(h).gelu_quantize(h, *args, **kwargs)


def gelu_quantize_saving(h: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[ScaledTensor, ScaledTensor]:
    return _backend(h).gelu_quantize_saving(h, *args, **kwargs)


def gelu_backward_quantize(dy: torch.Tensor, *args: Any, **kwargs: Any) -> reference.ActivationGradients:
    return _backend(dy).gelu_backward_quantize(dy, *args, **kwargs)


def tanh_bound(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return _backend(x).tanh_bound(x, alpha)


def tanh_bound_backward(dy: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backend(x).tanh_bound_backward(dy, x, alpha)


def qkv_tanh_rotary(mixed: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backend(mixed).qkv_tanh_rotary(mixed, *args, **kwargs)


def qkv_tanh_rotary_backward(dq: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backend(dq).qkv_tanh_rotary_backward(dq, *args, **kwargs)


def xielu_quantize(h: torch.Tensor | ScaledTensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(h).xielu_quantize(h, *args, **kwargs)


def xielu_quantize_saving(h: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[ScaledTensor, ScaledTensor]:
    return _backend(h).xielu_quantize_saving(h, *args, **kwargs)


def xielu_backward_quantize(dy: torch.Tensor, *args: Any, **kwargs: Any) -> reference.ActivationGradients:
    return _backend(dy).xielu_backward_quantize(dy, *args, **kwargs)


def route_map(expert_index: torch.Tensor, num_experts: int, rows: int | None = None) -> RowMap:
    return _backend(expert_index).route_map(expert_index, num_experts, rows)


def gather_rows(x: Any, row_map: RowMap, prob: torch.Tensor | None = None) -> tuple[Any, torch.Tensor | None]:
    return _backend(x).gather_rows(x, row_map, prob)


def combine_rows(y: torch.Tensor, row_map: RowMap, weight: torch.Tensor | None = None) -> torch.Tensor:
    return _backend(y).combine_rows(y, row_map, weight)


def copies_of_rows(values: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    return _backend(values).copies_of_rows(values, row_map)


def chosen_experts(probs: torch.Tensor, routing_map: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _backend(probs).chosen_experts(probs, routing_map, topk)


def chosen_experts_backward(dprob: torch.Tensor, index: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    return _backend(dprob).chosen_experts_backward(dprob, index, num_experts, dtype)


def send_map(expert_index: torch.Tensor, num_experts: int, ranks: int, tag: int = 0) -> SendMap:
    return _backend(expert_index).send_map(expert_index, num_experts, ranks, tag)


def pack_rows(q: ScaledTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _backend(q).pack_rows(q, *args, **kwargs)


def unpack_rows(buffer: torch.Tensor, layout: RowLayout, dtype: torch.dtype) -> tuple[ScaledTensor, torch.Tensor | None, torch.Tensor | None]:
    return _backend(buffer).unpack_rows(buffer, layout, dtype)


def combine_sent(y: torch.Tensor, send: SendMap) -> torch.Tensor:
    return _backend(y).combine_sent(y, send)


def copies_of_sent(values: torch.Tensor, send: SendMap) -> torch.Tensor:
    return _backend(values).copies_of_sent(values, send)


__all__ = [
    "GroupedTensor",
    "RowLayout",
    "RowMap",
    "SendMap",
    "chosen_experts",
    "chosen_experts_backward",
    "combine_rows",
    "combine_sent",
    "copies_of_rows",
    "copies_of_sent",
    "dequantize",
    "fold",
    "fold_transpose",
    "gather_rows",
    "gelu_backward_quantize",
    "gelu_quantize",
    "gelu_quantize_saving",
    "gemm",
    "gemm_exact",
    "grouped_fold_transpose",
    "grouped_gemm",
    "grouped_gemm_exact",
    "grouped_wgrad",
    "grouped_wgrad_exact",
    "measure_experts",
    "moment_parts",
    "moments",
    "pack_rows",
    "qkv_tanh_rotary",
    "qkv_tanh_rotary_backward",
    "quantize",
    "quantize_experts",
    "quantize_weight",
    "rmsnorm_add",
    "rmsnorm_add_backward",
    "rmsnorm_quantize",
    "route_map",
    "rows_for",
    "scaling_aware_transpose",
    "send_map",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "swiglu_quantize_saving",
    "tanh_bound",
    "tanh_bound_backward",
    "unpack_rows",
    "xielu_backward_quantize",
    "xielu_quantize",
    "xielu_quantize_saving",
]
