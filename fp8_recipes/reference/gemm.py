"""The product ``y = a b^T``: with scales in the epilogue (folded operands), or exactly, whatever the granularity."""

from __future__ import annotations

import torch

from ..tensor import TILE, ScaledTensor
from .quantize import dequantize


def check_product(a: ScaledTensor, b: ScaledTensor, out: torch.Tensor | None, accumulate: bool, bias: torch.Tensor | None) -> None:
    """Raise unless ``a [M, K]`` and ``b [N, K]`` multiply into ``out [M, N]``."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"contraction lengths differ: a is {tuple(a.shape)}, b is {tuple(b.shape)}; both must be [rows, K]")
    shape = (a.shape[0], b.shape[0])
    if out is not None and tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out of strides {out.stride()} is not contiguous")
    if accumulate and out is None:
        raise ValueError("accumulate=True adds to `out`; pass the tensor to add to")
    if bias is not None and tuple(bias.shape) != (shape[1],):
        raise ValueError(f"bias must have shape ({shape[1]},), got {tuple(bias.shape)}")


def check_result(dtype: torch.dtype, promote: int) -> None:
    """Raise unless a product can be written in ``dtype`` and promoted every ``promote`` elements of its contraction."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"the result must be bfloat16 or float32, got {dtype}")
    if promote < 0 or promote % TILE:
        raise ValueError(f"promote={promote} must be 0 (never) or a multiple of {TILE}")


def finish(y: torch.Tensor, out_dtype: torch.dtype, bias: torch.Tensor | None, out: torch.Tensor | None, accumulate: bool) -> torch.Tensor:
    """Epilogue of an fp32 product: bias, then the output's dtype, then into ``out`` if there is one."""
    if bias is not None:
        y = y + bias.float()
    if out is None:
        return y.to(out_dtype)
    return out.copy_(out.float() + y if accumulate else y)


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    promote: int = 0,
) -> torch.Tensor:
    """``y[m, n] = scale_a[m] * scale_b[n] * sum_k a[m, k] b[n, k] + bias[n]``, summed in fp32.

    a: [M, K], b: [N, K], granularity row or tensor (no scale changes along K). out, accumulate: write or add into ``out`` [M, N] instead of a new tensor.
    promote: without effect here; kernels use it to bound the error of Hopper's 14-bit FP8 accumulator, which this sum does not have.
    """
    check_product(a, b, out, accumulate, bias)
    check_result(out_dtype if out is None else out.dtype, promote)
    for name, q in (("a", a), ("b", b)):
        if q.granularity not in ("row", "tensor"):
            raise ValueError(f"{name} has {q.granularity} scales, which change along K; fold it first or use gemm_exact")
    y = a.payload.float() @ b.payload.float().t()  # [M, K] @ [K, N]
    y = y * (a.scale[:, None] if a.granularity == "row" else a.scale) * b.scale
    return finish(y, out_dtype, bias, out, accumulate)


def gemm_exact(
    a: ScaledTensor,
    b: ScaledTensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """``dequantize(a) @ dequantize(b)^T`` at any granularity.

    Power-of-two scales make the dequantised values exact in bf16, so on a GPU this is one bf16 product with an FP32 accumulator, nothing lost;
    FP32 global scales multiply the result. It is the check beside every folded product, and what recipes without a fold run on (at bf16 speed).
    """
    check_product(a, b, out, accumulate, bias)
    operand = torch.bfloat16 if a.device.type == "cuda" else torch.float32
    y = _without_global(a, operand) @ _without_global(b, operand).t()
    y = y.float()
    for q in (a, b):
        if q.global_scale is not None:
            y = y * q.global_scale
    return finish(y, out_dtype, bias, out, accumulate)


def _without_global(q: ScaledTensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(ScaledTensor(q.payload, q.scale, q.granularity), dtype)
