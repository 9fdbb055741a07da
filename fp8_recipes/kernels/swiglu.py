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
from ..reference.activation import check_gated, check_halves, check_prob, check_saved, check_unsaved, swiglu, swiglu_backward, swiglu_prob_gradient
from ..reference.quantize import _check_options
from ..tensor import TILE, ScaledTensor, check_matrix
from . import common
from .common import INTERPRETED, check_device, check_not_empty, decode, finite_or_nan, pow2, scale_exponent, to_fp32
from .launch import launch
from .quantize import quantize
from .rows import (
    MAX_ROW,
    columns_of,
    empty_rows,
    hold_piece,
    load_piece,
    load_raw,
    micro_amax,
    plan_row,
    row_result,
    store_piece,
    store_row_scale,
)
from .words import bytes_of, pack_row

SAVE_PER_THREAD = 24
"""Values of each half that a thread holds, at least, where h is saved: twice the warps of `rows.plan_row`, because of a row both h and the product wait."""
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
def _h_values(raw, h_scale, H: tl.constexpr, AGAIN: tl.constexpr = False):
    """What was loaded of h, in fp32. H: "" (bf16, fp16 or fp32), "e4m3" or "e5m2". AGAIN: see `to_fp32`."""
    if H == "":
        return to_fp32(raw, AGAIN)
    else:
        return decode(raw, H == "e5m2") * h_scale


@triton.jit
def _largest(gate, up):
    """Largest finite value of a piece of both halves."""
    most = tl.maximum(tl.abs(finite_or_nan(gate)), tl.abs(finite_or_nan(up)))
    return tl.max(tl.max(micro_amax(most), axis=1), axis=0)


@triton.jit
def _save_piece(x, exponent, ptr, first, cols, E5M2: tl.constexpr):
    """A piece of one half of h in FP8."""
    column = first + columns_of(x.shape[0])
    word = pack_row(finite_or_nan(x) * pow2(-exponent), E5M2)
    tl.store(ptr + column, bytes_of(word), mask=column < cols)


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
    prob = 1.0
    if PROB:
        prob = tl.load(prob_ptr + row)
    h_scale = 1.0
    if H != "":
        h_scale = tl.load(h_scale_ptr + row)
    gate = load_raw(h_ptr, 0, cols, BLOCK)
    up = load_raw(h_ptr + cols, 0, cols, BLOCK)
    if TAIL:
        gate_tail = load_raw(h_ptr, BLOCK * 128, cols, TAIL)
        up_tail = load_raw(h_ptr + cols, BLOCK * 128, cols, TAIL)
    if SAVE:  # h is converted three times, for its maximum, its payload and the product: held in fp32 it would take twice the registers
        amax = _largest(to_fp32(gate), to_fp32(up))
        if TAIL:
            amax = tl.maximum(amax, _largest(to_fp32(gate_tail), to_fp32(up_tail)))
        h_exp = scale_exponent(amax, E5M2)
        saved_ptr += row * 2 * cols
        _save_piece(to_fp32(gate, True), h_exp, saved_ptr, 0, cols, E5M2)
        _save_piece(to_fp32(up, True), h_exp, saved_ptr + cols, 0, cols, E5M2)
        if TAIL:
            _save_piece(to_fp32(gate_tail, True), h_exp, saved_ptr, BLOCK * 128, cols, E5M2)
            _save_piece(to_fp32(up_tail, True), h_exp, saved_ptr + cols, BLOCK * 128, cols, E5M2)
        tl.store(h_scale_ptr + row, pow2(h_exp))
    y = _swiglu(_h_values(gate, h_scale, H, SAVE), _h_values(up, h_scale, H, SAVE), prob, PROB)
    held, local, tile_exp = hold_piece(y, micro_amax(y), LOCAL, E5M2)
    row_exp = tl.max(tile_exp, axis=0)
    if TAIL:
        y_tail = _swiglu(_h_values(gate_tail, h_scale, H, SAVE), _h_values(up_tail, h_scale, H, SAVE), prob, PROB)
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
    h_scale = 1.0
    if H != "":
        h_scale = tl.load(h_scale_ptr + row)
    dy = load_piece(dy_ptr, 0, cols, BLOCK)
    gate = _h_values(load_raw(h_ptr, 0, cols, BLOCK), h_scale, H)
    up = _h_values(load_raw(h_ptr + cols, 0, cols, BLOCK), h_scale, H)
    if TAIL:
        dy_tail = load_piece(dy_ptr, BLOCK * 128, cols, TAIL)
        gate_tail = _h_values(load_raw(h_ptr, BLOCK * 128, cols, TAIL), h_scale, H)
        up_tail = _h_values(load_raw(h_ptr + cols, BLOCK * 128, cols, TAIL), h_scale, H)
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


def _h_arguments(h: torch.Tensor | ScaledTensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(h, its scales, `H`) as the kernels take them, checked; scales of a plain tensor are itself, never read."""
    if isinstance(h, torch.Tensor):
        check_matrix(h, "h")
        check_device(h, "h")
        check_not_empty(h, "h")
        return h, h, ""
    check_saved(h)
    for name, t in (("h.payload", h.payload), ("h.scale", h.scale)):
        check_device(t, name)
        check_not_empty(t, name)
        if not t.is_contiguous():
            raise ValueError(f"{name} of strides {t.stride()} is not contiguous; call .contiguous()")
    if h.scale.dtype != torch.float32:
        raise TypeError(f"h.scale must be float32, got {h.scale.dtype}")
    return h.payload.view(torch.uint8), h.scale, h.format.name


def _is_fused(rows: int, cols: int, granularity: str, fold: str | None, prob: torch.Tensor | None) -> bool:
    """Raise on options that do not fit; is the fused kernel there for the rest?"""
    _check_options(granularity, fold, None)
    check_prob(prob, rows)
    return granularity in ("row", "tile", "micro") and cols <= MAX_ROW


def swiglu_quantize(
    h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.swiglu_quantize`. h: [rows, 2F] = [gate | up], bf16 or saved (row-scaled FP8) -> quantised [rows, F]; prob:
    [rows] fp32 or None.

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the product is computed in fp32 first.
    """
    source, h_scale, form = _h_arguments(h)
    check_gated(h)
    rows, cols = source.shape[0], source.shape[1] // 2
    if not _is_fused(rows, cols, granularity, fold, prob):
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
    _h_arguments(h)
    check_gated(h)
    rows, cols = h.shape[0], h.shape[1] // 2
    if not _is_fused(rows, cols, granularity, fold, prob):
        whole = quantize(h, "row", fmt)
        return quantize(swiglu(h, prob), granularity, fmt, fold=fold), ScaledTensor(whole.payload, whole.scale, "row")
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    saved, h_scale = common.empty((rows, 2 * cols), torch.uint8, h.device), common.empty((rows,), torch.float32, h.device)
    arguments = (h, *pointers, h if prob is None else prob, h_scale, saved, cols)
    constants = {**r.constants, "num_warps": plan_row(cols, SAVE_PER_THREAD).warps}
    launch(_swiglu_quantize_kernel, (rows,), *arguments, PROB=prob is not None, H="", SAVE=True, **constants)
    return q, ScaledTensor(saved.view(fmt.dtype), h_scale, "row")


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
    source, h_scale, form = _h_arguments(h)
    rows, cols = dy.shape
    check_halves(dy, h)
    if not _is_fused(rows, 2 * cols, granularity, fold, prob) or cols % TILE:
        q = quantize(swiglu_backward(dy, h, prob), granularity, fmt, fold=fold)
        return q if prob is None else (q, swiglu_prob_gradient(dy, h))
    r = row_result(2 * cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, 2 * cols, r, fmt, dy.device)
    plan = plan_row(cols)  # each program takes the two halves of a row side by side
    constants: dict[str, Any] = {**r.constants, "BLOCK": plan.block, "TAIL": plan.tail, "num_warps": plan.warps}
    if plan.warps == 8 and granularity != "row":
        constants["maxnreg"] = WIDE_REGISTERS
    given, gradient = (dy, dy) if prob is None else (prob, common.empty((rows,), torch.float32, dy.device))
    launch(_swiglu_backward_quantize_kernel, (rows,), dy, source, *pointers, given, gradient, h_scale, cols, PROB=prob is not None, H=form, **constants)
    return q if prob is None else (q, gradient)
