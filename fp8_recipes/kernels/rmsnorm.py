"""RMSNorm and quantisation in one read: `fp8_recipes.reference.rmsnorm_quantize`. The normalised row never exists in bf16; it goes from fp32 registers to FP8.

Equal to the reference except for the order of the sum of squares (rstd may differ by an ulp, a payload byte only where that crosses a rounding boundary).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.quantize import _check_options
from ..tensor import ScaledTensor, check_matrix
from . import common
from .common import check_device, check_not_empty, finite_or_nan, to_fp32
from .launch import launch
from .quantize import quantize
from .rows import MAX_ROW, empty_rows, hold_piece, load_raw, load_row, row_result, store_row, total


@triton.jit
def _sum_of_squares(x):
    return tl.sum(tl.sum(tl.sum(x * x, axis=2), axis=1), axis=0)


@triton.jit
def _load_both(x_ptr, gamma_ptr, first, cols, TILES: tl.constexpr):
    return load_raw(x_ptr, first, cols, TILES), load_raw(gamma_ptr, first, cols, TILES)


@triton.jit
def _normalised(x, gamma, rstd):
    return finite_or_nan(to_fp32(x, AGAIN=True) * rstd * to_fp32(gamma, AGAIN=True))


@triton.jit
def _rmsnorm_quantize_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    gamma_ptr,
    rstd_ptr,
    cols,
    eps,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pieces = load_row(_load_both, (x_ptr + row * cols, gamma_ptr), cols, BLOCK, TAIL)
    square = total([_sum_of_squares(to_fp32(piece[0])) for piece in pieces])
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, cols.to(tl.float32)) + eps))
    tl.store(rstd_ptr + row, rstd)
    held = [hold_piece(_normalised(*piece, rstd), LOCAL, E5M2) for piece in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


def rmsnorm_quantize(
    x: torch.Tensor, gamma: torch.Tensor, eps: float = 1e-5, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None
) -> tuple[ScaledTensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.rmsnorm_quantize`. x: [rows, cols] bf16, gamma: [cols] -> (quantised y, rstd [rows] fp32).

    Fused for "row", "tile" and "micro" up to 32768 columns; otherwise y is computed in fp32 first.
    """
    check_matrix(x, "x")
    _check_options(granularity, fold, None)
    check_device(x, "x")
    check_not_empty(x, "x")
    if gamma.shape != x.shape[1:]:
        raise ValueError(f"gamma must have shape ({x.shape[1]},), got {tuple(gamma.shape)}")
    if granularity not in ("row", "tile", "micro") or x.shape[1] > MAX_ROW:
        xf = x.float()
        rstd = torch.rsqrt(xf.square().mean(dim=1) + eps)
        return quantize(xf * rstd[:, None] * gamma.float(), granularity, fmt, fold=fold), rstd
    rows, cols = x.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, x.device)
    rstd = common.empty((rows,), torch.float32, x.device)
    launch(_rmsnorm_quantize_kernel, (rows,), x, *pointers, gamma.contiguous(), rstd, cols, eps, **r.constants)
    return q, rstd
