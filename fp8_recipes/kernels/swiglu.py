"""SwiGLU and its gradient, quantised where they are computed: `fp8_recipes.reference.swiglu_quantize` and `swiglu_backward_quantize`.

Bytes moved per column of F: forward 4 in, 1 out; backward 6 in, 2 out. The bf16 product never reaches memory. Equal to the reference except where the
GPU's exp and division differ in the last place and that crosses a rounding boundary.
"""

from __future__ import annotations

from typing import overload

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.activation import check_halves, check_prob, swiglu, swiglu_backward, swiglu_prob_gradient
from ..reference.quantize import _check_options
from ..tensor import TILE, ScaledTensor, check_matrix
from . import common
from .common import INTERPRETED, check_device, check_not_empty, finite_or_nan
from .launch import launch
from .quantize import quantize
from .rows import (
    MAX_ROW,
    empty_rows,
    hold_piece,
    load_piece,
    micro_amax,
    plan_row,
    row_result,
    store_piece,
    store_row_scale,
)

WIDE_REGISTERS = 128
"""Per thread, where the gradient takes 8 warps and holds FP8 words: two such programs fit a multiprocessor. The compiler would take a few more and one fits."""

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
def _swiglu(gate, up, prob, PROB: tl.constexpr):
    y = gate * _sigmoid(gate) * up
    if PROB:
        y = y * prob
    return finite_or_nan(y)


@triton.jit
def _swiglu_gradients(dy, gate, up, prob, PROB: tl.constexpr):
    """(dgate, dup) in fp32."""
    s = _sigmoid(gate)
    silu = gate * s
    if PROB:
        dy = dy * prob
    return finite_or_nan(dy * up * (s + silu * (1.0 - s))), finite_or_nan(dy * silu)


@triton.jit
def _prob_gradient(dy, gate, up):
    """Sum of dy * silu(gate) * up over a piece."""
    return tl.sum(tl.sum(tl.sum(dy * (gate * _sigmoid(gate) * up), axis=2), axis=1), axis=0)


@triton.jit
def _held_gradients(dy, gate, up, prob, LOCAL: tl.constexpr, E5M2: tl.constexpr, PROB: tl.constexpr):
    """`hold_piece` of dgate, then of dup."""
    dgate, dup = _swiglu_gradients(dy, gate, up, prob, PROB)
    held_gate, gate_local, gate_tiles = hold_piece(dgate, micro_amax(dgate), LOCAL, E5M2)
    held_up, up_local, up_tiles = hold_piece(dup, micro_amax(dup), LOCAL, E5M2)
    return held_gate, gate_local, gate_tiles, held_up, up_local, up_tiles


@triton.jit
def _swiglu_quantize_kernel(
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    prob_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    PROB: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h_ptr += row * 2 * cols
    prob = 1.0
    if PROB:
        prob = tl.load(prob_ptr + row)
    gate = load_piece(h_ptr, 0, cols, BLOCK)
    up = load_piece(h_ptr + cols, 0, cols, BLOCK)
    if TAIL:
        gate_tail = load_piece(h_ptr, BLOCK * 128, cols, TAIL)
        up_tail = load_piece(h_ptr + cols, BLOCK * 128, cols, TAIL)
    y = _swiglu(gate, up, prob, PROB)
    held, local, tile_exp = hold_piece(y, micro_amax(y), LOCAL, E5M2)
    row_exp = tl.max(tile_exp, axis=0)
    if TAIL:
        y_tail = _swiglu(gate_tail, up_tail, prob, PROB)
        held_tail, local_tail, tile_exp_tail = hold_piece(y_tail, micro_amax(y_tail), LOCAL, E5M2)
        row_exp = tl.maximum(row_exp, tl.max(tile_exp_tail, axis=0))
        store_piece(held_tail, local_tail, tile_exp_tail, row_exp, row, BLOCK * 128, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(held, local, tile_exp, row_exp, row, 0, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


@triton.jit
def _swiglu_backward_quantize_kernel(
    dy_ptr,
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    prob_ptr,
    prob_gradient_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    PROB: tl.constexpr,
):
    """One row of 2 * cols gradients, cols a multiple of 128 so that no tile lies across the two halves."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    width = 2 * cols
    h_ptr += row * width
    dy = load_piece(dy_ptr, 0, cols, BLOCK)
    gate = load_piece(h_ptr, 0, cols, BLOCK)
    up = load_piece(h_ptr + cols, 0, cols, BLOCK)
    if TAIL:
        dy_tail = load_piece(dy_ptr, BLOCK * 128, cols, TAIL)
        gate_tail = load_piece(h_ptr, BLOCK * 128, cols, TAIL)
        up_tail = load_piece(h_ptr + cols, BLOCK * 128, cols, TAIL)
    prob = 1.0
    if PROB:
        prob = tl.load(prob_ptr + row)
        prob_gradient = _prob_gradient(dy, gate, up)
        if TAIL:
            prob_gradient += _prob_gradient(dy_tail, gate_tail, up_tail)
        tl.store(prob_gradient_ptr + row, prob_gradient)
    gate, gate_local, gate_tiles, up, up_local, up_tiles = _held_gradients(dy, gate, up, prob, LOCAL, E5M2, PROB)
    row_exp = tl.max(tl.maximum(gate_tiles, up_tiles), axis=0)
    if TAIL:
        tail, tail_local, gate_last, up_tail, up_end_local, up_last = _held_gradients(dy_tail, gate_tail, up_tail, prob, LOCAL, E5M2, PROB)
        row_exp = tl.maximum(row_exp, tl.max(tl.maximum(gate_last, up_last), axis=0))
        first = BLOCK * 128
        store_piece(tail, tail_local, gate_last, row_exp, row, first, cols, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
        store_piece(up_tail, up_end_local, up_last, row_exp, row, cols + first, width, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(gate, gate_local, gate_tiles, row_exp, row, 0, cols, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(up, up_local, up_tiles, row_exp, row, cols, width, width, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


def swiglu_quantize(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.swiglu_quantize`. h: [rows, 2F] bf16 = [gate | up] -> quantised [rows, F]; prob: [rows] fp32 or None.

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the product is computed in fp32 first.
    """
    check_matrix(h, "h")
    _check_options(granularity, fold, None)
    check_device(h, "h")
    check_not_empty(h, "h")
    if h.shape[1] % 2:
        raise ValueError(f"h must be [rows, 2F] = [gate | up], got an odd width {h.shape[1]}")
    rows, cols = h.shape[0], h.shape[1] // 2
    check_prob(prob, rows)
    if granularity not in ("row", "tile", "micro") or cols > MAX_ROW:
        return quantize(swiglu(h, prob), granularity, fmt, fold=fold)
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    launch(_swiglu_quantize_kernel, (rows,), h, *pointers, h if prob is None else prob, cols, PROB=prob is not None, **r.constants)
    return q


@overload
def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: None = None
) -> ScaledTensor: ...


@overload
def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor
) -> tuple[ScaledTensor, torch.Tensor]: ...


def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.swiglu_backward_quantize`. dy: [rows, F], h: [rows, 2F] bf16 -> quantised [dgate | dup] [rows, 2F].

    With prob [rows] fp32: (that, the gradient of prob [rows] fp32); one program sums one row, always in the same order.
    Fused for "row", "tile" and "micro" when F is a multiple of 128 and 2F <= 32768; otherwise the gradient is computed in fp32 first.
    """
    check_matrix(dy, "dy")
    check_matrix(h, "h")
    _check_options(granularity, fold, None)
    check_device(dy, "dy")
    check_device(h, "h")
    check_not_empty(dy, "dy")
    rows, cols = dy.shape
    check_halves(dy, h)
    check_prob(prob, rows)
    if granularity not in ("row", "tile", "micro") or cols % TILE or 2 * cols > MAX_ROW:
        q = quantize(swiglu_backward(dy, h, prob), granularity, fmt, fold=fold)
        return q if prob is None else (q, swiglu_prob_gradient(dy, h))
    r = row_result(2 * cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, 2 * cols, r, fmt, dy.device)
    plan = plan_row(cols)  # each program takes the two halves of a row side by side
    constants = {**r.constants, "BLOCK": plan.block, "TAIL": plan.tail, "num_warps": plan.warps}
    if plan.warps == 8 and granularity != "row":
        constants["maxnreg"] = WIDE_REGISTERS
    given, gradient = (dy, dy) if prob is None else (prob, common.empty((rows,), torch.float32, dy.device))
    launch(_swiglu_backward_quantize_kernel, (rows,), dy, h, *pointers, given, gradient, cols, PROB=prob is not None, **constants)
    return q if prob is None else (q, gradient)
