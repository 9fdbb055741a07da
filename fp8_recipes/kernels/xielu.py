"""xIELU and its gradients, quantised where they are computed: `fp8_recipes.reference.xielu_quantize` and `xielu_backward_quantize`.

Bytes moved per value: forward 2 in, 1 out; backward 4 in, 1 out. Equal to the reference except where the GPU's exp differs in the last places and that
crosses a rounding boundary.

The gradient of the two alphas is a sum over every element of the layer. One program sums its row, always in the same order, and writes two numbers; these
are added in fp64 by a second, equally ordered sum. No atomics, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.xielu import XieluGradients, check_alpha, check_same, xielu, xielu_alpha_gradient, xielu_backward, xielu_prob_gradient
from ..tensor import ScaledTensor, check_matrix
from . import common
from .common import INTERPRETED, check_device, check_not_empty, finite_or_nan
from .launch import launch
from .quantize import quantize
from .rows import empty_rows, hold_piece, is_fused, load_piece, load_row, load_row_prob, row_result, store_row, total

WIDE_REGISTERS = 128
"""Per thread, where the gradient takes 8 warps and holds FP8 words: two such programs fit a multiprocessor instead of one, for a few spilled registers."""

# 2**(x log2(e)) on the special-function unit. Flushing subnormals does not matter: 1 is subtracted from the result.
_EXP = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }")


@triton.jit
def _exp(x):
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(_EXP, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _value(x, alpha_p, alpha_n):
    """xIELU. What a branch computes for the other's x is dropped, Inf included; on the right of -1/32 both are x^2 times a slope."""
    far = alpha_n * _exp(x) - (alpha_n * x + alpha_n)
    # Two terms where the reference takes three: off by 1e-4 of the curved part at most, and that is 2e-6 of y.
    near = x * x * tl.where(x > 0, alpha_p, alpha_n * 0.5 + x * (alpha_n * 0.16666667))
    return tl.where(x > -0.03125, near, far) + 0.5 * x


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(tl.sum(x, axis=2), axis=1), axis=0)


@triton.jit
def _load_both(dy_ptr, h_ptr, first, cols, TILES: tl.constexpr):
    return load_piece(dy_ptr, first, cols, TILES), load_piece(h_ptr, first, cols, TILES)


class _Gradients(NamedTuple):
    """Of a piece: dh as it is held, and the sums for alpha_p, alpha_n and prob."""

    dh: Any
    alpha_p: Any
    alpha_n: Any
    prob: Any


@triton.jit
def _xielu_gradients(dy, x, alpha_p, alpha_n, prob, LOCAL: tl.constexpr, E5M2: tl.constexpr, PROB: tl.constexpr):
    dprob = 0.0
    if PROB:
        dprob = _sum(dy * _value(x, alpha_p, alpha_n))
        dy = dy * prob
    rise = _exp(x) - 1.0
    dalpha_p = _sum(tl.where(x > 0, dy * x * x, 0.0))
    dalpha_n = _sum(tl.where(x > 0, 0.0, dy * tl.where(x > -0.03125, x * x * (0.5 + x * 0.16666667), rise - x)))
    slope = tl.where(x > 0, 2 * alpha_p * x, alpha_n * rise) + 0.5
    return _Gradients(hold_piece(finite_or_nan(dy * slope), LOCAL, E5M2), dalpha_p, dalpha_n, dprob)


@triton.jit
def _xielu_quantize_kernel(
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    alpha_ptr,
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
    alpha_p, alpha_n = tl.load(alpha_ptr), tl.load(alpha_ptr + 1)
    prob = load_row_prob(prob_ptr, row, PROB)
    pieces = load_row(load_piece, (h_ptr,), cols, BLOCK, TAIL)
    held = [hold_piece(finite_or_nan(_value(x, alpha_p, alpha_n) * prob), LOCAL, E5M2) for x in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


@triton.jit
def _xielu_backward_quantize_kernel(
    dy_ptr,
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    alpha_ptr,
    prob_ptr,
    alpha_gradient_ptr,
    prob_gradient_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    PROB: tl.constexpr,
):
    """alpha_gradient_ptr: fp32 [2, rows], each row's part of the sums."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    h_ptr += row * cols
    alpha_p, alpha_n = tl.load(alpha_ptr), tl.load(alpha_ptr + 1)
    prob = load_row_prob(prob_ptr, row, PROB)
    pieces = load_row(_load_both, (dy_ptr, h_ptr), cols, BLOCK, TAIL)
    gradients = [_xielu_gradients(*piece, alpha_p, alpha_n, prob, LOCAL, E5M2, PROB) for piece in pieces]
    store_row([g.dh for g in gradients], row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    tl.store(alpha_gradient_ptr + row, total([g.alpha_p for g in gradients]))
    tl.store(alpha_gradient_ptr + tl.num_programs(0) + row, total([g.alpha_n for g in gradients]))
    if PROB:
        tl.store(prob_gradient_ptr + row, total([g.prob for g in gradients]))


def _is_fused(h: torch.Tensor, alpha: torch.Tensor, granularity: str, fold: str | None, prob: torch.Tensor | None) -> bool:
    """Raise on bad input; is the fused kernel there for the rest?"""
    check_alpha(alpha)
    check_device(alpha, "alpha")
    check_matrix(h, "h")
    check_device(h, "h")
    check_not_empty(h, "h")
    return is_fused(h.shape, granularity, fold, prob)


def xielu_quantize(
    h: torch.Tensor, alpha: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.xielu_quantize`. h: [rows, F] bf16, alpha: [2] fp32 on the same device -> quantised [rows, F].

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise xIELU is computed in fp32 first.
    """
    if not _is_fused(h, alpha, granularity, fold, prob):
        return quantize(xielu(h, alpha, prob), granularity, fmt, fold=fold)
    rows, cols = h.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    launch(_xielu_quantize_kernel, (rows,), h, *pointers, alpha, h if prob is None else prob, cols, PROB=prob is not None, **r.constants)
    return q


def xielu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor,
    alpha: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> XieluGradients:
    """Kernel twin of `fp8_recipes.reference.xielu_backward_quantize`. dy, h: [rows, F] bf16, alpha: [2] fp32 -> `XieluGradients`.

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise the gradients are computed in fp32 first.
    """
    check_matrix(dy, "dy")
    check_device(dy, "dy")
    check_same(dy, h)
    if not _is_fused(h, alpha, granularity, fold, prob):
        q = quantize(xielu_backward(dy, h, alpha, prob), granularity, fmt, fold=fold)
        return XieluGradients(q, xielu_alpha_gradient(dy, h, prob), None if prob is None else xielu_prob_gradient(dy, h, alpha))
    rows, cols = h.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, h.device)
    constants = r.constants
    if constants["num_warps"] == 8 and granularity != "row":
        constants = {**constants, "maxnreg": WIDE_REGISTERS}
    partial = common.empty((2, rows), torch.float32, h.device)
    given, dprob = (h, None) if prob is None else (prob, common.empty((rows,), torch.float32, h.device))
    outputs = (partial, partial if dprob is None else dprob)
    launch(_xielu_backward_quantize_kernel, (rows,), dy, h, *pointers, alpha, given, *outputs, cols, PROB=prob is not None, **constants)
    return XieluGradients(q, partial.sum(dim=1, dtype=torch.float64).float(), dprob)
