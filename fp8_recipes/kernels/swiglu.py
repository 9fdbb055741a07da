"""SwiGLU and its gradient, quantised where they are computed: `fp8_recipes.reference.swiglu_quantize` and `swiglu_backward_quantize`.

Bytes moved per column of F: forward 4 in, 1 out; backward 6 in, 2 out. The bf16 product never reaches memory. Equal to the reference except where the
GPU's exp and division differ in the last place and that crosses a rounding boundary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.activation import swiglu, swiglu_backward
from ..reference.quantize import _check_options
from ..tensor import TILE, ScaledTensor, check_matrix
from .common import check_device, check_not_empty, finite_or_nan, on_device
from .launch import launch
from .quantize import quantize
from .rows import (
    ELEMENTS_PER_THREAD,
    MAX_ROW,
    empty_rows,
    load_piece,
    micro_amax,
    plan_row,
    row_arguments,
    row_exponent,
    store_piece,
    store_row_scale,
)

BACKWARD_REGISTERS = 64
"""Per thread, for rows that take 16 warps: with the 88 that the compiler would use only one program fits a multiprocessor. 0 = the compiler's choice."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu(gate, up):
    return finite_or_nan(gate * _sigmoid(gate) * up)


@triton.jit
def _swiglu_gradients(dy, gate, up):
    """(dgate, dup) in fp32."""
    s = _sigmoid(gate)
    silu = gate * s
    return finite_or_nan(dy * up * (s + silu * (1.0 - s))), finite_or_nan(dy * silu)


@triton.jit
def _swiglu_quantize_kernel(
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h_ptr += row * 2 * cols
    gate = load_piece(h_ptr, 0, cols, BLOCK)
    up = load_piece(h_ptr + cols, 0, cols, BLOCK)
    if TAIL:
        gate_tail = load_piece(h_ptr, BLOCK * 128, cols, TAIL)
        up_tail = load_piece(h_ptr + cols, BLOCK * 128, cols, TAIL)
    y = _swiglu(gate, up)
    micro = micro_amax(y)
    row_exp = row_exponent(micro, E5M2)
    if TAIL:
        y_tail = _swiglu(gate_tail, up_tail)
        micro_tail = micro_amax(y_tail)
        row_exp = tl.maximum(row_exp, row_exponent(micro_tail, E5M2))
        store_piece(y_tail, micro_tail, row_exp, row, BLOCK * 128, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(y, micro, row_exp, row, 0, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


@triton.jit
def _swiglu_backward_quantize_kernel(
    dy_ptr,
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    """One row of 2 * cols gradients, cols a multiple of 128 so that no tile lies across the two halves."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    h_ptr += row * 2 * cols
    dy = load_piece(dy_ptr, 0, cols, BLOCK)
    gate = load_piece(h_ptr, 0, cols, BLOCK)
    up = load_piece(h_ptr + cols, 0, cols, BLOCK)
    if TAIL:
        dy_tail = load_piece(dy_ptr, BLOCK * 128, cols, TAIL)
        gate_tail = load_piece(h_ptr, BLOCK * 128, cols, TAIL)
        up_tail = load_piece(h_ptr + cols, BLOCK * 128, cols, TAIL)
    dgate, dup = _swiglu_gradients(dy, gate, up)
    micro_gate, micro_up = micro_amax(dgate), micro_amax(dup)
    row_exp = row_exponent(tl.maximum(micro_gate, micro_up), E5M2)
    if TAIL:
        dgate_tail, dup_tail = _swiglu_gradients(dy_tail, gate_tail, up_tail)
        gate_tail_micro, up_tail_micro = micro_amax(dgate_tail), micro_amax(dup_tail)
        row_exp = tl.maximum(row_exp, row_exponent(tl.maximum(gate_tail_micro, up_tail_micro), E5M2))
        first = BLOCK * 128
        store_piece(
            dgate_tail, gate_tail_micro, row_exp, row, first, cols, 2 * cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2
        )
        store_piece(
            dup_tail, up_tail_micro, row_exp, row, cols + first, 2 * cols, 2 * cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2
        )
    store_piece(dgate, micro_gate, row_exp, row, 0, cols, 2 * cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(dup, micro_up, row_exp, row, cols, 2 * cols, 2 * cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


def swiglu_quantize(h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.swiglu_quantize`. h: [rows, 2F] bf16 = [gate | up] -> quantised [rows, F].

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the product is computed in fp32 first.
    """
    check_matrix(h, "h")
    _check_options(granularity, fold, None)
    check_device(h, "h")
    check_not_empty(h, "h")
    if h.shape[1] % 2:
        raise ValueError(f"h must be [rows, 2F] = [gate | up], got an odd width {h.shape[1]}")
    rows, cols = h.shape[0], h.shape[1] // 2
    if granularity not in ("row", "tile", "micro") or cols > MAX_ROW:
        return quantize(swiglu(h), granularity, fmt, fold=fold)
    q = empty_rows(rows, cols, granularity, fold, fmt, h.device)
    pointers, constants = row_arguments(q, granularity, fold)
    plan = plan_row(cols)
    with on_device(h):
        launch(_swiglu_quantize_kernel, (rows,), h, *pointers, cols, BLOCK=plan.block, TAIL=plan.tail, **constants, num_warps=plan.warps)
    return q


def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.swiglu_backward_quantize`. dy: [rows, F], h: [rows, 2F] bf16 -> quantised [dgate | dup] [rows, 2F].

    Fused for "row", "tile" and "micro" when F is a multiple of 128 and 2F <= 32768; otherwise the gradient is computed in fp32 first.
    """
    check_matrix(dy, "dy")
    check_matrix(h, "h")
    _check_options(granularity, fold, None)
    check_device(dy, "dy")
    check_device(h, "h")
    check_not_empty(dy, "dy")
    rows, cols = dy.shape
    if h.shape != (rows, 2 * cols):
        raise ValueError(f"h must be [rows, 2F] for dy [rows, F]; got h {tuple(h.shape)} and dy {tuple(dy.shape)}")
    if granularity not in ("row", "tile", "micro") or cols % TILE or 2 * cols > MAX_ROW:
        return quantize(swiglu_backward(dy, h), granularity, fmt, fold=fold)
    q = empty_rows(rows, 2 * cols, granularity, fold, fmt, dy.device)
    pointers, constants = row_arguments(q, granularity, fold)
    plan = plan_row(cols, ELEMENTS_PER_THREAD // 2)
    with on_device(dy):
        constants |= {"BLOCK": plan.block, "TAIL": plan.tail, "num_warps": plan.warps}
        if BACKWARD_REGISTERS and plan.warps == 16:
            constants["maxnreg"] = BACKWARD_REGISTERS
        launch(_swiglu_backward_quantize_kernel, (rows,), dy, h, *pointers, cols, **constants)
    return q
