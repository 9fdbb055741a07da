"""Row kernels that are not the default, for sweep_rows.py: two as they were before it changed, and one that may replace it."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8_recipes.kernels.common import finite_or_nan, scale_exponent, to_fp32
from fp8_recipes.kernels.cross_entropy import SLACK
from fp8_recipes.kernels.rmsnorm import load_pieces, store_pieces
from fp8_recipes.kernels.rows import columns_of, hold_piece, load_piece, load_raw, load_row, store_piece, store_row, store_row_scale, total


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
def rmsnorm_before(
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
    """gamma is loaded with the row and held beside it."""
    row = tl.program_id(0).to(tl.int64)
    pieces = load_row(_load_both, (x_ptr + row * cols, gamma_ptr), cols, BLOCK, TAIL)
    square = total([_sum_of_squares(to_fp32(piece[0])) for piece in pieces])
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, cols.to(tl.float32)) + eps))
    tl.store(rstd_ptr + row, rstd)
    held = [hold_piece(_normalised(*piece, rstd), LOCAL, E5M2) for piece in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


@triton.jit
def cross_entropy_before(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    target_ptr,
    dloss_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    cols,
    TILES: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    """One piece at a time; every value is compared with the label."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * cols
    label, lse, dloss = tl.load(labels_ptr + row), tl.load(lse_ptr + row), tl.load(dloss_ptr + row)
    bound = (tl.abs(tl.exp(tl.load(target_ptr + row) - lse) - 1.0) + SLACK) * tl.abs(dloss)
    row_exp = scale_exponent(tl.maximum(finite_or_nan(bound), 0.0), E5M2)
    for first in range(0, cols, TILES * 128):
        column = first + columns_of(TILES)
        p = tl.exp(load_piece(logits_ptr, first, cols, TILES) - lse) - tl.where(column == label, 1.0, 0.0)
        held = hold_piece(finite_or_nan(tl.where(column < cols, p * dloss, 0.0)), LOCAL, E5M2)
        store_piece(held, row_exp, row, first, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


@triton.jit
def quantize_in_pieces(
    x_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    global_ptr,
    cols,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    """`quantize` of a row in equal pieces, as RMSNorm takes it: the block and tail of the default have 12 barriers at 11008 columns, this has 4."""
    tl.static_assert(not GLOBAL)
    row = tl.program_id(0).to(tl.int64)
    pieces = load_pieces(x_ptr + row * cols, 0, cols, BLOCK, PIECES, WHOLE)
    held = [hold_piece(finite_or_nan(to_fp32(piece[0])), LOCAL, E5M2) for piece in pieces]
    store_pieces(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, WHOLE, LOCAL, FOLD, E5M2)
