"""The operations, chosen by where the tensors are: Triton kernels for CUDA tensors, the plain torch reference for CPU tensors. Nothing else decides.

Signatures and meaning: `fp8_recipes.reference`.
"""

from __future__ import annotations

from typing import Any

import torch

from . import reference
from .reference import RowMap, copies_of_rows, dequantize, rows_for
from .tensor import ScaledTensor


def _backend(t: torch.Tensor | ScaledTensor) -> Any:
    if t.device.type == "cuda":
        from . import kernels

        return kernels
    if t.device.type == "cpu":
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


def swiglu_quantize(h: torch.Tensor, *args: Any, **kwargs: Any) -> ScaledTensor:
    return _backend(h).swiglu_quantize(h, *args, **kwargs)


def swiglu_backward_quantize(dy: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A `ScaledTensor`; with ``prob`` also the gradient of prob."""
    return _backend(dy).swiglu_backward_quantize(dy, *args, **kwargs)


def route_map(expert_index: torch.Tensor, num_experts: int, rows: int | None = None) -> RowMap:
    return _backend(expert_index).route_map(expert_index, num_experts, rows)


def chunk_map(counts: torch.Tensor, tokens: int, rows: int | None = None) -> RowMap:
    return _backend(counts).chunk_map(counts, tokens, rows)


def gather_rows(x: Any, row_map: RowMap, prob: torch.Tensor | None = None) -> tuple[Any, torch.Tensor | None]:
    return _backend(x).gather_rows(x, row_map, prob)


def combine_rows(y: torch.Tensor, row_map: RowMap, weight: torch.Tensor | None = None) -> torch.Tensor:
    return _backend(y).combine_rows(y, row_map, weight)


__all__ = [
    "RowMap",
    "chunk_map",
    "combine_rows",
    "copies_of_rows",
    "dequantize",
    "fold",
    "fold_transpose",
    "gather_rows",
    "gemm",
    "gemm_exact",
    "quantize",
    "quantize_weight",
    "rmsnorm_quantize",
    "route_map",
    "rows_for",
    "swiglu_backward_quantize",
    "swiglu_quantize",
]
