"""RMSNorm and quantisation in one read: `fp8_recipes.reference.rmsnorm_quantize`. The normalised row never exists in bf16; it goes from fp32 registers to FP8.

Equal to the reference except for the order of the sum of squares (rstd may differ by an ulp, a payload byte only where that crosses a rounding boundary).

A row waits for two reductions, so what limits this kernel is how many rows a multiprocessor holds at a time, and that is registers. One program takes a row
in equal pieces: between the reductions a piece is 16-bit words, then FP8 words, and gamma is read (from L1, every row reads it) when a piece needs it. Equal
pieces are added and compared value by value, so that each reduction crosses the warps once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.quantize import _check_options
from ..tensor import TILE, ScaledTensor, check_matrix
from . import common
from .common import cdiv, check_device, check_not_empty, finite_or_nan, next_power_of_2, tiles_of, to_fp32
from .launch import launch
from .quantize import quantize
from .rows import MAX_ROW, empty_rows, final_words, hold_piece, load_flat, row_result, store_flat, store_row_scale, store_scales

PER_THREAD = {"row": 32, "tile": 64, "micro": 64}
"""Values that a thread takes, at least, by granularity: "row" holds them in fp32 between the maximum and the cast."""


@triton.jit
def _load_pieces(ptr, FIRST: tl.constexpr, cols, TILES: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    """PIECES pieces of a row from column FIRST on: of each (what `load_flat` returns, its first column, its MASK)."""
    mask = PIECES == 1 and not WHOLE
    piece = (load_flat(ptr, FIRST, cols, TILES, mask), FIRST, mask)
    if PIECES == 1:
        return (piece,)
    else:
        return (piece,) + _load_pieces(ptr, FIRST + TILES * 128, cols, TILES, PIECES - 1, WHOLE)  # noqa: RUF005


@triton.jit
def _square(x):
    x = to_fp32(x)
    return x * x


@triton.jit
def _normalised(x, first, MASK: tl.constexpr, gamma_ptr, cols, rstd):
    gamma = load_flat(gamma_ptr, first, cols, x.shape[0], MASK)
    return finite_or_nan(to_fp32(x, AGAIN=True) * rstd * to_fp32(gamma, AGAIN=True))


@triton.jit
def _added(parts):
    out = parts[0]
    for i in tl.static_range(1, len(parts)):
        out += parts[i]
    return out


@triton.jit
def _largest(parts):
    out = parts[0]
    for i in tl.static_range(1, len(parts)):
        out = tl.maximum(out, parts[i])
    return out


@triton.jit
def _stacked(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Vectors of the pieces FIRST .. FIRST + COUNT behind one another; the last piece stands again where there are no more. COUNT: a power of two."""
    if COUNT == 1:
        return parts[min(FIRST, len(parts) - 1)]
    else:
        both = tl.join(_stacked(parts, FIRST, COUNT // 2), _stacked(parts, FIRST + COUNT // 2, COUNT // 2))
        return tl.ravel(tl.permute(both, (1, 0)))


@triton.jit
def _store_pieces(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, WHOLE: tl.constexpr, LOCAL: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr):
    """`rows.store_row` of equal pieces."""
    PIECES: tl.constexpr = len(held)
    BLOCK: tl.constexpr = held[0].data.shape[0]
    row_exp = tl.max(_largest([piece.tile_exp for piece in held]), axis=0)
    for i in tl.static_range(PIECES):
        store_flat(payload_ptr + row * cols, final_words(held[i], row_exp, LOCAL, FOLD, E5M2), i * BLOCK * 128, cols, i == PIECES - 1 and not WHOLE)
    COUNT: tl.constexpr = triton.next_power_of_2(PIECES)
    tile_exp = _stacked([piece.tile_exp for piece in held], 0, COUNT)
    exponent = tl.reshape(_stacked([tl.ravel(piece.exponent) for piece in held], 0, COUNT), (BLOCK * COUNT, 4))
    store_scales(exponent, tile_exp, row, 0, cols, cols, scale_ptr, tile_exponent_ptr, LOCAL, FOLD)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


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
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    """One row: PIECES of BLOCK tiles each, of which the last may reach beyond the row unless WHOLE."""
    row = tl.program_id(0).to(tl.int64)
    pieces = _load_pieces(x_ptr + row * cols, 0, cols, BLOCK, PIECES, WHOLE)  # all loads are in flight before the sum waits
    square = tl.sum(tl.ravel(_added([_square(piece[0]) for piece in pieces])), axis=0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, cols.to(tl.float32)) + eps))
    tl.store(rstd_ptr + row, rstd)
    held = [hold_piece(_normalised(*piece, gamma_ptr, cols, rstd), LOCAL, E5M2) for piece in pieces]
    _store_pieces(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, WHOLE, LOCAL, FOLD, E5M2)


@functools.cache
def row_options(cols: int, granularity: str) -> dict[str, Any]:
    """How one program covers a row of ``cols`` columns: a thread takes 16 neighbours of each piece. Shared, not to be changed.

    scripts/sweep_rows.py tries others. "row" waits in fp32 values, and the compiler adds gamma to them: a limit on registers lets a multiprocessor hold more
    rows. The others wait in words of two values, and a limit made them 3 to 5 % slower.
    """
    warps = max(cols // (32 * PER_THREAD[granularity]), 1)
    warps = min(1 << (warps.bit_length() - 1), 16)
    block = min(4 * warps, next_power_of_2(tiles_of(cols)))
    pieces = cdiv(cols, block * TILE)
    limit = {"maxnreg": 16 * pieces + 16} if granularity == "row" and pieces > 2 else {}
    return {"BLOCK": block, "PIECES": pieces, "WHOLE": cols % (block * TILE) == 0, "num_warps": warps, **limit}



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
    form = {name: r.constants[name] for name in ("LOCAL", "FOLD", "E5M2")}
    launch(_rmsnorm_quantize_kernel, (rows,), x, *pointers, gamma.contiguous(), rstd, cols, eps, **form, **row_options(cols, granularity))
    return q, rstd
