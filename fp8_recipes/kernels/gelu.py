"""GeLU and its gradient, quantised where they are computed: `fp8_recipes.reference.gelu_quantize` and `gelu_backward_quantize`.

Bytes moved per value: forward 2 in, 1 out; backward 4 in, 1 out. There are some twenty instructions to spend on a value before the kernel is slower than the
memory, and the library's erf takes more. So, with z = |x|:

    Phi(-z) = P(t) e^(-z^2 / 2),    t = 1 / (1 + 0.31 z),    P of degree 6 without a constant, fitted to 6e-6 of Phi(-z) for z up to 14

The error is relative, far into the tail, and a thousandth of E4M3's. P(1) is 1/2 to the last bit, so that the slope at x = 0 is. The exponential is the one
that the gradient's density needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.gelu import GeluGradients, gelu, gelu_backward, gelu_prob_gradient
from ..reference.xielu import check_same
from ..tensor import ScaledTensor, check_matrix
from . import common
from .common import INTERPRETED, check_device, finite_or_nan
from .launch import launch
from .quantize import quantize
from .rows import check_activation, empty_rows, hold_piece, load_piece, micro_amax, row_result, store_piece, store_row_scale

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
def _gelu(x, prob, PROB: tl.constexpr):
    y = _value(x)
    if PROB:
        y = y * prob
    return finite_or_nan(y)


@triton.jit
def _gelu_gradients(dy, x, prob, PROB: tl.constexpr):
    """(dh of a piece, its sum for prob)."""
    dprob = 0.0
    if PROB:
        dprob = tl.sum(tl.sum(tl.sum(dy * _value(x), axis=2), axis=1), axis=0)
        dy = dy * prob
    tail, bell = _tail(x)
    slope = tl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
    return finite_or_nan(dy * slope), dprob


@triton.jit
def _gelu_quantize_kernel(
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
    h_ptr += row * cols
    prob = 1.0
    if PROB:
        prob = tl.load(prob_ptr + row)
    x = load_piece(h_ptr, 0, cols, BLOCK)
    if TAIL:  # both loads are in flight before the first reduction waits
        x_tail = load_piece(h_ptr, BLOCK * 128, cols, TAIL)
    y = _gelu(x, prob, PROB)
    held, local, tile_exp = hold_piece(y, micro_amax(y), LOCAL, E5M2)
    row_exp = tl.max(tile_exp, axis=0)
    if TAIL:
        y_tail = _gelu(x_tail, prob, PROB)
        held_tail, local_tail, tile_exp_tail = hold_piece(y_tail, micro_amax(y_tail), LOCAL, E5M2)
        row_exp = tl.maximum(row_exp, tl.max(tile_exp_tail, axis=0))
        store_piece(held_tail, local_tail, tile_exp_tail, row_exp, row, BLOCK * 128, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(held, local, tile_exp, row_exp, row, 0, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


@triton.jit
def _gelu_backward_quantize_kernel(
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
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    h_ptr += row * cols
    prob = 1.0
    if PROB:
        prob = tl.load(prob_ptr + row)
    dy, x = load_piece(dy_ptr, 0, cols, BLOCK), load_piece(h_ptr, 0, cols, BLOCK)
    if TAIL:
        dy_tail, x_tail = load_piece(dy_ptr, BLOCK * 128, cols, TAIL), load_piece(h_ptr, BLOCK * 128, cols, TAIL)
    dh, dprob = _gelu_gradients(dy, x, prob, PROB)
    held, local, tile_exp = hold_piece(dh, micro_amax(dh), LOCAL, E5M2)
    row_exp = tl.max(tile_exp, axis=0)
    if TAIL:
        dh_tail, more = _gelu_gradients(dy_tail, x_tail, prob, PROB)
        dprob = dprob + more
        held_tail, local_tail, tile_exp_tail = hold_piece(dh_tail, micro_amax(dh_tail), LOCAL, E5M2)
        row_exp = tl.maximum(row_exp, tl.max(tile_exp_tail, axis=0))
        store_piece(held_tail, local_tail, tile_exp_tail, row_exp, row, BLOCK * 128, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(held, local, tile_exp, row_exp, row, 0, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)
    if PROB:
        tl.store(prob_gradient_ptr + row, dprob)


def gelu_quantize(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.gelu_quantize`. h: [rows, F] bf16 -> quantised [rows, F].

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise GeLU is computed in fp32 first.
    """
    if not check_activation(h, granularity, fold, prob):
        return quantize(gelu(h, prob), granularity, fmt, fold=fold)
    rows, cols = h.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    launch(_gelu_quantize_kernel, (rows,), h, *pointers, h if prob is None else prob, cols, PROB=prob is not None, **r.constants)
    return q


def gelu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> GeluGradients:
    """Kernel twin of `fp8_recipes.reference.gelu_backward_quantize`. dy, h: [rows, F] bf16 -> `GeluGradients`.

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the gradient is computed in fp32 first.
    """
    check_matrix(dy, "dy")
    check_device(dy, "dy")
    check_same(dy, h)
    if not check_activation(h, granularity, fold, prob):
        q = quantize(gelu_backward(dy, h, prob), granularity, fmt, fold=fold)
        return GeluGradients(q, None if prob is None else gelu_prob_gradient(dy, h))
    rows, cols = h.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    given, dprob = (h, None) if prob is None else (prob, common.empty((rows,), torch.float32, h.device))
    outputs = (given, given if dprob is None else dprob)
    launch(_gelu_backward_quantize_kernel, (rows,), dy, h, *pointers, *outputs, cols, PROB=prob is not None, **r.constants)
    return GeluGradients(q, dprob)
