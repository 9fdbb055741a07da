"""GeLU and its gradient, quantised where they are computed: `fp8_recipes.reference.gelu_quantize` and `gelu_backward_quantize`.

Bytes moved per value: forward 2 in, 1 out (2 where h is saved in FP8 by the way); backward 4 in, 1 out (3 in from the saved h). There are some twenty
instructions to spend on a value before the kernel is slower than the memory, and the library's erf takes more. So, with z = |x|:

    Phi(-z) = P(t) e^(-z^2 / 2),    t = 1 / (1 + 0.31 z),    P of degree 6 without a constant, fitted to 6e-6 of Phi(-z) for z up to 14

The error is relative, far into the tail, and a thousandth of E4M3's. P(1) is 1/2 to the last bit, so that the slope at x = 0 is. The exponential is the one
that the gradient's density needs. The saved h is the reference's bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.activation import check_unsaved
from ..reference.gelu import GeluGradients, gelu, gelu_backward, gelu_prob_gradient
from ..reference.xielu import check_same
from ..tensor import ScaledTensor, check_matrix
from . import common
from .common import INTERPRETED, check_device, finite_or_nan
from .launch import launch
from .quantize import quantize
from .rows import empty_rows, hold_piece, is_fused, load_piece, load_raw, load_row, load_row_prob, row_result, store_row, total
from .saved import h_arguments, h_values, load_h_scale, save_row

# 1 / (1 + 0.31 z), and 2**(-x^2 log2(e) / 2) from x^2: special-function unit. What is flushed is a tail below 1e-38.
_RECIPROCAL = tl.constexpr("{ .reg .f32 t; fma.rn.f32 t, $1, 0f3E9EB852, 0f3F800000; rcp.approx.ftz.f32 $0, t; }")
_BELL = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0fBF38AA3B; ex2.approx.ftz.f32 $0, t; }")


@triton.jit
def _reciprocal(z):
    if INTERPRETED:
        return 1.0 / (1.0 + 0.31 * z)
    else:
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _bell(square):
    if INTERPRETED:
        return tl.exp(-0.5 * square)
    else:
        return tl.inline_asm_elementwise(_BELL, "=f,f", [square], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _tail(x):
    """(Phi(-|x|), e^(-x^2 / 2))."""
    t = _reciprocal(tl.abs(x))
    p = 0.17872361838817596 + t * -0.07330942898988724
    p = 0.13253575563430786 + t * (0.01756116934120655 + t * p)
    p = 0.12384358048439026 + t * (0.12064532190561295 + t * p)
    bell = _bell(x * x)
    return p * t * bell, bell


@triton.jit
def _value(x):
    tail, bell = _tail(x)
    # x * 0 instead of 0 gives a zero on the left its sign. A NaN that the maximum drops comes back in the product.
    return tl.maximum(x, x * 0.0) - tl.abs(x) * tail


@triton.jit
def _load_h(h_ptr, first, cols, TILES: tl.constexpr):
    return (load_raw(h_ptr, first, cols, TILES),)


@triton.jit
def _load_both(dy_ptr, h_ptr, h_scale, H: tl.constexpr, first, cols, TILES: tl.constexpr):
    return load_piece(dy_ptr, first, cols, TILES), h_values(load_raw(h_ptr, first, cols, TILES), h_scale, H)


class _Gradients(NamedTuple):
    """Of a piece: dh as it is held, and the sum for prob."""

    dh: Any
    prob: Any


@triton.jit
def _gelu_gradients(dy, x, prob, LOCAL: tl.constexpr, E5M2: tl.constexpr, PROB: tl.constexpr):
    dprob = 0.0
    if PROB:
        dprob = tl.sum(tl.sum(tl.sum(dy * _value(x), axis=2), axis=1), axis=0)
        dy = dy * prob
    tail, bell = _tail(x)
    slope = tl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
    return _Gradients(hold_piece(finite_or_nan(dy * slope), LOCAL, E5M2), dprob)


@triton.jit
def _gelu_quantize_kernel(
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
    h_ptr += row * cols
    prob = load_row_prob(prob_ptr, row, PROB)
    h_scale = load_h_scale(h_scale_ptr, row, H)
    pieces = load_row(_load_h, (h_ptr,), cols, BLOCK, TAIL)
    if SAVE:
        save_row(pieces, row, saved_ptr, h_scale_ptr, cols, E5M2)
    held = [hold_piece(finite_or_nan(_value(h_values(*piece, h_scale, H, SAVE)) * prob), LOCAL, E5M2) for piece in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


@triton.jit
def _gelu_backward_quantize_kernel(
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
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    h_ptr += row * cols
    prob = load_row_prob(prob_ptr, row, PROB)
    h_scale = load_h_scale(h_scale_ptr, row, H)
    pieces = load_row(_load_both, (dy_ptr, h_ptr, h_scale, H), cols, BLOCK, TAIL)
    gradients = [_gelu_gradients(*piece, prob, LOCAL, E5M2, PROB) for piece in pieces]
    store_row([g.dh for g in gradients], row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    if PROB:
        tl.store(prob_gradient_ptr + row, total([g.prob for g in gradients]))


def gelu_quantize(
    h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.gelu_quantize`. h: [rows, F] bf16 or saved (row-scaled FP8) -> quantised [rows, F].

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise GeLU is computed in fp32 first.
    """
    source, h_scale, form = h_arguments(h)
    if not is_fused(h.shape, granularity, fold, prob):
        return quantize(gelu(h, prob), granularity, fmt, fold=fold)
    count, cols = source.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(count, cols, r, fmt, source.device)
    arguments = (source, *pointers, source if prob is None else prob, h_scale, source, cols)
    launch(_gelu_quantize_kernel, (count,), *arguments, PROB=prob is not None, H=form, SAVE=False, **r.constants)
    return q


def gelu_quantize_saving(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """Kernel twin of `fp8_recipes.reference.gelu_quantize_saving`: (the quantised GeLU, h itself in ``fmt``), from one read where it is fused."""
    check_unsaved(h)
    h_arguments(h)
    if not is_fused(h.shape, granularity, fold, prob):
        whole = quantize(h, "row", fmt)
        return quantize(gelu(h, prob), granularity, fmt, fold=fold), ScaledTensor(whole.payload, whole.scale, "row")
    count, cols = h.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(count, cols, r, fmt, h.device)
    saved, h_scale = common.empty((count, cols), torch.uint8, h.device), common.empty((count,), torch.float32, h.device)
    arguments = (h, *pointers, h if prob is None else prob, h_scale, saved, cols)
    launch(_gelu_quantize_kernel, (count,), *arguments, PROB=prob is not None, H="", SAVE=True, **r.constants)
    return q, ScaledTensor(saved.view(fmt.dtype), h_scale, "row")


def gelu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> GeluGradients:
    """Kernel twin of `fp8_recipes.reference.gelu_backward_quantize`. dy: [rows, F] bf16, h: [rows, F] bf16 or saved (row-scaled FP8) -> `GeluGradients`.

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the gradient is computed in fp32 first. prob's gradient: one program sums one row, always in
    the same order.
    """
    check_matrix(dy, "dy")
    check_device(dy, "dy")
    check_same(dy, h)
    source, h_scale, form = h_arguments(h)
    if not is_fused(h.shape, granularity, fold, prob):
        q = quantize(gelu_backward(dy, h, prob), granularity, fmt, fold=fold)
        return GeluGradients(q, None if prob is None else gelu_prob_gradient(dy, h))
    count, cols = dy.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(count, cols, r, fmt, dy.device)
    given, dprob = (dy, None) if prob is None else (prob, common.empty((count,), torch.float32, dy.device))
    arguments = (dy, source, *pointers, given, given if dprob is None else dprob, h_scale, cols)
    launch(_gelu_backward_quantize_kernel, (count,), *arguments, PROB=prob is not None, H=form, **r.constants)
    return GeluGradients(q, dprob)
