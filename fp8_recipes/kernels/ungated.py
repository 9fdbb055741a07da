"""Activations without a gate (GeLU, xIELU) and their gradients, quantised where they are computed: `fp8_recipes.reference.gelu_quantize`, `xielu_quantize`
and their companions.

Bytes moved per value: forward 2 in, 1 out (2 where h is saved in FP8 by the way); backward 4 in, 1 out (3 in from the saved h). The saved h is the
reference's bit for bit; the rest is equal except where the GPU's exp (for GeLU also its fitted tail) crosses a rounding boundary.

The gradient of xIELU's two alphas is a sum over every element of the layer. One program sums its row, always in the same order, and writes two numbers; these
are added in fp64 by a second, equally ordered sum. No atomics, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.activation import ActivationGradients, check_same, check_unsaved
from ..reference.gelu import gelu, gelu_backward, gelu_prob_gradient
from ..reference.xielu import check_alpha, check_source, xielu, xielu_alpha_gradient, xielu_backward, xielu_prob_gradient
from ..tensor import ScaledTensor, check_matrix
from . import common
from .common import check_device, finite_or_nan
from .gelu import gelu_slope, gelu_value
from .launch import launch
from .quantize import quantize
from .rows import empty_rows, hold_piece, is_fused, load_piece, load_raw, load_row, load_row_prob, row_result, store_row, total
from .saved import h_arguments, h_values, load_h_scale, save_row
from .xielu import xielu_alpha_terms, xielu_slope, xielu_value

WIDE_REGISTERS = 128
"""Per thread, where xIELU's gradient takes 8 warps and holds FP8 words: two such programs fit a multiprocessor instead of one, for a few spilled registers."""


@triton.jit
def _load_alpha(alpha_ptr, XIELU: tl.constexpr):
    """(alpha_p, alpha_n), which GeLU has not."""
    if XIELU:
        return tl.load(alpha_ptr), tl.load(alpha_ptr + 1)
    else:
        return 0.0, 0.0


@triton.jit
def _value(x, alpha_p, alpha_n, XIELU: tl.constexpr):
    if XIELU:
        return xielu_value(x, alpha_p, alpha_n)
    else:
        return gelu_value(x)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(tl.sum(x, axis=2), axis=1), axis=0)


@triton.jit
def _load_h(h_ptr, first, cols, TILES: tl.constexpr):
    return (load_raw(h_ptr, first, cols, TILES),)


@triton.jit
def _load_both(dy_ptr, h_ptr, h_scale, H: tl.constexpr, first, cols, TILES: tl.constexpr):
    return load_piece(dy_ptr, first, cols, TILES), h_values(load_raw(h_ptr, first, cols, TILES), h_scale, H)


class _Gradients(NamedTuple):
    """Of a piece: dh as it is held, and the sums for prob, alpha_p and alpha_n."""

    dh: Any
    prob: Any
    alpha_p: Any
    alpha_n: Any


@triton.jit
def _gradients(dy, x, alpha_p, alpha_n, prob, LOCAL: tl.constexpr, E5M2: tl.constexpr, PROB: tl.constexpr, XIELU: tl.constexpr):
    dprob = 0.0
    if PROB:
        dprob = _sum(dy * _value(x, alpha_p, alpha_n, XIELU))
        dy = dy * prob
    if XIELU:
        by_p, by_n = xielu_alpha_terms(dy, x)
        dalpha_p, dalpha_n = _sum(by_p), _sum(by_n)  # before dh is there, or dh waits in registers
        slope = xielu_slope(x, alpha_p, alpha_n)
    else:
        dalpha_p, dalpha_n = 0.0, 0.0
        slope = gelu_slope(x)
    return _Gradients(hold_piece(finite_or_nan(dy * slope), LOCAL, E5M2), dprob, dalpha_p, dalpha_n)


@triton.jit
def _ungated_quantize_kernel(
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    alpha_ptr,
    prob_ptr,
    h_scale_ptr,
    saved_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    XIELU: tl.constexpr,
    PROB: tl.constexpr,
    H: tl.constexpr,
    SAVE: tl.constexpr,
):
    """One row. h_scale: read where h is FP8; where it is to be saved, written, and its payload goes to saved_ptr."""
    row = tl.program_id(0).to(tl.int64)
    h_ptr += row * cols
    alpha_p, alpha_n = _load_alpha(alpha_ptr, XIELU)
    prob = load_row_prob(prob_ptr, row, PROB)
    h_scale = load_h_scale(h_scale_ptr, row, H)
    pieces = load_row(_load_h, (h_ptr,), cols, BLOCK, TAIL)
    if SAVE:
        save_row(pieces, row, saved_ptr, h_scale_ptr, cols, E5M2)
    held = [hold_piece(finite_or_nan(_value(h_values(*piece, h_scale, H, SAVE), alpha_p, alpha_n, XIELU) * prob), LOCAL, E5M2) for piece in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


@triton.jit
def _ungated_backward_quantize_kernel(
    dy_ptr,
    h_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    alpha_ptr,
    prob_ptr,
    source_ptr,
    alpha_gradient_ptr,
    prob_gradient_ptr,
    h_scale_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    XIELU: tl.constexpr,
    PROB: tl.constexpr,
    SOURCE: tl.constexpr,
    H: tl.constexpr,
):
    """alpha_gradient_ptr: fp32 [2, rows], each row's part of the sums; 0 where SOURCE and the row's source is negative."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * cols
    h_ptr += row * cols
    alpha_p, alpha_n = _load_alpha(alpha_ptr, XIELU)
    prob = load_row_prob(prob_ptr, row, PROB)
    h_scale = load_h_scale(h_scale_ptr, row, H)
    pieces = load_row(_load_both, (dy_ptr, h_ptr, h_scale, H), cols, BLOCK, TAIL)
    gradients = [_gradients(*piece, alpha_p, alpha_n, prob, LOCAL, E5M2, PROB, XIELU) for piece in pieces]
    store_row([g.dh for g in gradients], row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    if XIELU:
        dalpha_p, dalpha_n = total([g.alpha_p for g in gradients]), total([g.alpha_n for g in gradients])
        if SOURCE:
            used = tl.load(source_ptr + row) >= 0
            dalpha_p, dalpha_n = tl.where(used, dalpha_p, 0.0), tl.where(used, dalpha_n, 0.0)
        tl.store(alpha_gradient_ptr + row, dalpha_p)
        tl.store(alpha_gradient_ptr + tl.num_programs(0) + row, dalpha_n)
    if PROB:
        tl.store(prob_gradient_ptr + row, total([g.prob for g in gradients]))


def _forward(
    h: torch.Tensor | ScaledTensor, alpha: torch.Tensor | None, granularity: str, fmt: Format, fold: str | None, prob: torch.Tensor | None, save: bool
) -> tuple[ScaledTensor, ScaledTensor | None]:
    """(the quantised activation, h in ``fmt`` if it is to be saved). alpha: xIELU's; None = GeLU."""
    source, h_scale, form = h_arguments(h)
    if alpha is not None:
        check_alpha(alpha)
        check_device(alpha, "alpha")
    if not is_fused(h.shape, granularity, fold, prob):
        y = gelu(h, prob) if alpha is None else xielu(h, alpha, prob)
        whole = quantize(source, "row", fmt) if save else None
        return quantize(y, granularity, fmt, fold=fold), None if whole is None else ScaledTensor(whole.payload, whole.scale, "row")
    count, cols = source.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(count, cols, r, fmt, source.device)
    saved = source
    if save:
        saved, h_scale = common.empty((count, cols), torch.uint8, source.device), common.empty((count,), torch.float32, source.device)
    arguments = (source, *pointers, source if alpha is None else alpha, source if prob is None else prob, h_scale, saved, cols)
    launch(_ungated_quantize_kernel, (count,), *arguments, XIELU=alpha is not None, PROB=prob is not None, H=form, SAVE=save, **r.constants)
    return q, ScaledTensor(saved.view(fmt.dtype), h_scale, "row") if save else None


def _backward(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    alpha: torch.Tensor | None,
    granularity: str,
    fmt: Format,
    fold: str | None,
    prob: torch.Tensor | None,
    source: torch.Tensor | None,
) -> ActivationGradients:
    """See `_forward`. source: as `xielu_backward_quantize` takes it."""
    check_matrix(dy, "dy")
    check_device(dy, "dy")
    check_same(dy, h)
    given_h, h_scale, form = h_arguments(h)
    if alpha is not None:
        check_alpha(alpha)
        check_device(alpha, "alpha")
        check_source(source, dy.shape[0])
    if not is_fused(h.shape, granularity, fold, prob):
        return _unfused_backward(dy, h, alpha, granularity, fmt, fold, prob, source)
    count, cols = dy.shape
    r = row_result(cols, granularity, fold, fmt)
    constants = r.constants
    if alpha is not None and constants["num_warps"] == 8 and granularity != "row":
        constants = {**constants, "maxnreg": WIDE_REGISTERS}
    q, pointers = empty_rows(count, cols, r, fmt, dy.device)
    partial = None if alpha is None else common.empty((2, count), torch.float32, dy.device)
    dprob = None if prob is None else common.empty((count,), torch.float32, dy.device)
    arguments = (dy, given_h, *pointers, *(dy if t is None else t for t in (alpha, prob, source, partial, dprob)), h_scale, cols)
    flags = {"XIELU": alpha is not None, "PROB": prob is not None, "SOURCE": source is not None}
    launch(_ungated_backward_quantize_kernel, (count,), *arguments, **flags, H=form, **constants)
    return ActivationGradients(q, dprob, None if partial is None else partial.sum(dim=1, dtype=torch.float64).float())


def _unfused_backward(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    alpha: torch.Tensor | None,
    granularity: str,
    fmt: Format,
    fold: str | None,
    prob: torch.Tensor | None,
    source: torch.Tensor | None,
) -> ActivationGradients:
    """The gradient by h is computed in fp32 first."""
    if alpha is None:
        q = quantize(gelu_backward(dy, h, prob), granularity, fmt, fold=fold)
        return ActivationGradients(q, None if prob is None else gelu_prob_gradient(dy, h))
    q = quantize(xielu_backward(dy, h, alpha, prob), granularity, fmt, fold=fold)
    dprob = None if prob is None else xielu_prob_gradient(dy, h, alpha)
    return ActivationGradients(q, dprob, xielu_alpha_gradient(dy, h, prob, source))


def gelu_quantize(
    h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.gelu_quantize`. h: [rows, F] bf16 or saved (row-scaled FP8) -> quantised [rows, F].

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise GeLU is computed in fp32 first.
    """
    return _forward(h, None, granularity, fmt, fold, prob, False)[0]


def gelu_quantize_saving(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """Kernel twin of `fp8_recipes.reference.gelu_quantize_saving`: (the quantised GeLU, h itself in ``fmt``), from one read where it is fused."""
    check_unsaved(h)
    return _forward(h, None, granularity, fmt, fold, prob, True)  # type: ignore[return-value]


def gelu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> ActivationGradients:
    """Kernel twin of `fp8_recipes.reference.gelu_backward_quantize`. dy: [rows, F] bf16, h: [rows, F] bf16 or saved -> `ActivationGradients`.

    Fused as the forward is; otherwise the gradient is computed in fp32 first. prob's gradient: one program sums one row, always in the same order.
    """
    return _backward(dy, h, None, granularity, fmt, fold, prob, None)


def xielu_quantize(
    h: torch.Tensor | ScaledTensor,
    alpha: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.xielu_quantize`. h: [rows, F] bf16 or saved, alpha: [2] fp32 on the same device -> quantised [rows, F].

    Fused for "row", "tile" and "micro" up to F = 32768; otherwise xIELU is computed in fp32 first.
    """
    return _forward(h, alpha, granularity, fmt, fold, prob, False)[0]


def xielu_quantize_saving(
    h: torch.Tensor, alpha: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """Kernel twin of `fp8_recipes.reference.xielu_quantize_saving`: (the quantised xIELU, h itself in ``fmt``), from one read where it is fused."""
    check_unsaved(h)
    return _forward(h, alpha, granularity, fmt, fold, prob, True)  # type: ignore[return-value]


def xielu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    alpha: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
) -> ActivationGradients:
    """Kernel twin of `fp8_recipes.reference.xielu_backward_quantize`. dy: [rows, F] bf16, h: the same or saved, alpha: [2] fp32 -> `ActivationGradients`.

    source: [rows] int32; a row where it is negative adds nothing to alpha's gradient. Fused as the forward is.
    """
    return _backward(dy, h, alpha, granularity, fmt, fold, prob, source)
