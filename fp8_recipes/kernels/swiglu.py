"""SwiGLU and its gradient, quantised where they are computed: `fp8_recipes.reference.swiglu_quantize` and `swiglu_backward_quantize`.

Bytes moved per column of F: forward 4 in, 1 out (3 where h is saved in FP8 by the way: it is in registers already); backward 6 in, 2 out (4 in from the saved
h). The bf16 product never reaches memory. Equal to the reference except where the GPU's exp and division differ in the last place and that crosses a rounding
boundary; the saved h is equal bit for bit.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.activation import check_gated, check_halves, check_unsaved, swiglu, swiglu_backward, swiglu_prob_gradient
from ..tensor import TILE, ScaledTensor, check_matrix
from . import common
from .common import INTERPRETED, check_device, check_not_empty, finite_or_nan
from .launch import launch
from .quantize import quantize
from .rows import (
    empty_rows,
    hold_piece,
    is_fused,
    largest,
    load_piece,
    load_raw,
    load_row,
    load_row_prob,
    plan_row,
    row_result,
    store_piece,
    store_row,
    store_row_scale,
    total,
)
from .saved import h_arguments, h_values, load_h_scale, save_row

SAVE_PER_THREAD = 24
"""Values of each half that a thread holds, at least, where h is saved: twice the warps of `rows.plan_row`, because of a row both h and the product wait."""
GRADIENT_PER_THREAD = 48
"""Values of each half that a thread of the gradient takes, at least."""
REGISTERS = {48: 80, 64: 128}
"""Per thread, by the values that it takes, where the gradient has 8 warps and holds FP8 words: three or two such programs fit a multiprocessor."""

# 1 / (1 + 2**(-x log2(e))) on the special-function unit. Flushing subnormals only matters to the result, where gates in (-88.7, -87.3) become silu = 0.
_SIGMOID = tl.constexpr("""{
.reg .f32 t;
mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t;
}""")


@triton.jit
def _sigmoid(x):
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.inline_asm_elementwise(_SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _swiglu(gate, up):
    return gate * _sigmoid(gate) * up


@triton.jit
def _load_h(h_ptr, first, cols, TILES: tl.constexpr):
    return load_raw(h_ptr, first, cols, TILES), load_raw(h_ptr + cols, first, cols, TILES)


@triton.jit
def _load_all(dy_ptr, h_ptr, h_scale, H: tl.constexpr, first, cols, TILES: tl.constexpr):
    """(dy, gate, up) in fp32."""
    dy = load_piece(dy_ptr, first, cols, TILES)
    gate = h_values(load_raw(h_ptr, first, cols, TILES), h_scale, H)
    up = h_values(load_raw(h_ptr + cols, first, cols, TILES), h_scale, H)
    return dy, gate, up


@triton.jit
def _product(gate, up, h_scale, prob, H: tl.constexpr, SAVE: tl.constexpr):
    """SwiGLU of what was loaded of h, times prob."""
    return finite_or_nan(_swiglu(h_values(gate, h_scale, H, SAVE), h_values(up, h_scale, H, SAVE)) * prob)


@triton.jit
def _swiglu_gradients(dy, gate, up, prob, LOCAL: tl.constexpr, E5M2: tl.constexpr):
    """(dgate and dup as they are held, the largest exponent of both)."""
    s = _sigmoid(gate)
    silu = gate * s
    dy = dy * prob
    dgate, dup = finite_or_nan(dy * up * (s + silu * (1.0 - s))), finite_or_nan(dy * silu)
    dgate, dup = hold_piece(dgate, LOCAL, E5M2), hold_piece(dup, LOCAL, E5M2)
    return dgate, dup, tl.max(tl.maximum(dgate.tile_exp, dup.tile_exp), axis=0)


@triton.jit
def _prob_gradient(dy, gate, up):
    """Sum of dy * silu(gate) * up over a piece."""
    return tl.sum(tl.sum(tl.sum(dy * _swiglu(gate, up), axis=2), axis=1), axis=0)


@triton.jit
def _swiglu_quantize_kernel(
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    prob_ptr,
    h_scale_ptr,
    saved_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    PROB: tl.constexpr,
    H: tl.constexpr,
    SAVE: tl.constexpr,
):
    """One row. h_scale: read where h is FP8; where it is to be saved, written, and its payload goes to saved_ptr."""
    row = tl.program_id(0).to(tl.int64)
    h_ptr += row * 2 * cols
    prob = load_row_prob(prob_ptr, row, PROB)
    h_scale = load_h_scale(h_scale_ptr, row, H)
    pieces = load_row(_load_h, (h_ptr,), cols, BLOCK, TAIL)
    if SAVE:
        save_row(pieces, row, saved_ptr, h_scale_ptr, cols, E5M2)
    held = [hold_piece(_product(*piece, h_scale, prob, H, SAVE), LOCAL, E5M2) for piece in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


@triton.jit
def _swiglu_backward_quantize_kernel(
    dy_ptr,
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    prob_ptr,
    prob_gradient_ptr,
    h_scale_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    PROB: tl.constexpr,
    H: tl.constexpr,
):
    """One row of 2 * cols gradients, cols a multiple of 128 so that no tile lies across the two halves."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    width = 2 * cols
    h_ptr += row * width
    h_scale = load_h_scale(h_scale_ptr, row, H)
    pieces = load_row(_load_all, (dy_ptr, h_ptr, h_scale, H), cols, BLOCK, TAIL)
    prob = load_row_prob(prob_ptr, row, PROB)
    if PROB:
        tl.store(prob_gradient_ptr + row, total([_prob_gradient(*piece) for piece in pieces]))
    held = [_swiglu_gradients(*piece, prob, LOCAL, E5M2) for piece in pieces]
    row_exp = largest([piece[2] for piece in held])
    if TAIL:
        first: tl.constexpr = BLOCK * 128
        store_piece(held[1][0], row_exp, row, first, cols, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
        store_piece(held[1][1], row_exp, row, cols + first, width, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(held[0][0], row_exp, row, 0, cols, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(held[0][1], row_exp, row, cols, width, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


def swiglu_quantize(
    h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.swiglu_quantize`. h: [rows, 2F] = [gate | up], bf16 or saved (row-scaled FP8) -> quantised [rows, F]; prob:
    [rows] fp32 or None.

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the product is computed in fp32 first.
    """
    source, h_scale, form = h_arguments(h)
    check_gated(h)
    rows, cols = source.shape[0], source.shape[1] // 2
    if not is_fused((rows, cols), granularity, fold, prob):
        return quantize(swiglu(h, prob), granularity, fmt, fold=fold)
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, source.device)
    arguments = (source, *pointers, source if prob is None else prob, h_scale, source, cols)
    launch(_swiglu_quantize_kernel, (rows,), *arguments, PROB=prob is not None, H=form, SAVE=False, **r.constants)
    return q


def swiglu_quantize_saving(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """Kernel twin of `fp8_recipes.reference.swiglu_quantize_saving`: (the quantised product, h itself in ``fmt``), from one read where it is fused."""
    check_unsaved(h)
    h_arguments(h)
    check_gated(h)
    rows, cols = h.shape[0], h.shape[1] // 2
    if not is_fused((rows, cols), granularity, fold, prob):
        whole = quantize(h, "row", fmt)
        return quantize(swiglu(h, prob), granularity, fmt, fold=fold), ScaledTensor(whole.payload, whole.scale, "row")
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    saved, h_scale = common.empty((rows, 2 * cols), torch.uint8, h.device), common.empty((rows,), torch.float32, h.device)
    arguments = (h, *pointers, h if prob is None else prob, h_scale, saved, cols)
    constants = {**r.constants, "num_warps": plan_row(cols, SAVE_PER_THREAD).warps}
    launch(_swiglu_quantize_kernel, (rows,), *arguments, PROB=prob is not None, H="", SAVE=True, **constants)
    return q, ScaledTensor(saved.view(fmt.dtype), h_scale, "row")


def gradient_options(cols: int, granularity: str) -> dict[str, Any]:
    """How one program covers the two halves of a row, side by side, of ``cols`` columns each. scripts/sweep_rows.py tries others."""
    plan = plan_row(cols, GRADIENT_PER_THREAD)
    limit = REGISTERS.get((plan.block + plan.tail) * TILE // (32 * plan.warps)) if plan.warps == 8 and granularity != "row" else None
    return {"BLOCK": plan.block, "TAIL": plan.tail, "num_warps": plan.warps, **({"maxnreg": limit} if limit else {})}


@overload
def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: None = None
) -> ScaledTensor: ...


@overload
def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor
) -> tuple[ScaledTensor, torch.Tensor]: ...


def swiglu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.swiglu_backward_quantize`. dy: [rows, F] bf16, h: [rows, 2F] bf16 or saved (row-scaled FP8) -> quantised
    [dgate | dup] [rows, 2F].

    With prob [rows] fp32: (that, the gradient of prob [rows] fp32); one program sums one row, always in the same order.
    Fused for "row", "tile" and "micro" when F is a multiple of 128 and 2F <= 32768; otherwise the gradient is computed in fp32 first.
    """
    check_matrix(dy, "dy")
    check_device(dy, "dy")
    check_not_empty(dy, "dy")
    source, h_scale, form = h_arguments(h)
    rows, cols = dy.shape
    check_halves(dy, h)
    if not is_fused((rows, 2 * cols), granularity, fold, prob) or cols % TILE:
        q = quantize(swiglu_backward(dy, h, prob), granularity, fmt, fold=fold)
        return q if prob is None else (q, swiglu_prob_gradient(dy, h))
    r = row_result(2 * cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, 2 * cols, r, fmt, dy.device)
    constants = {**r.constants, **gradient_options(cols, granularity)}
    given, gradient = (dy, dy) if prob is None else (prob, common.empty((rows,), torch.float32, dy.device))
    launch(_swiglu_backward_quantize_kernel, (rows,), dy, source, *pointers, given, gradient, h_scale, cols, PROB=prob is not None, H=form, **constants)
    return q if prob is None else (q, gradient)
