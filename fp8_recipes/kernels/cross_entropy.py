"""`fp8_recipes.reference.softmax_parts` and `cross_entropy_backward_quantize`: one pass over the logits forward, one backward, for a vocabulary of any size.

Bytes moved per logit: forward 2 in; backward 2 in, 1 out. No probabilities and no gradient in bf16 or fp32 reach memory. A row's scale comes from its label
(see the reference), so backward needs no pass to find the largest entry. One program takes a row; every element is computed once, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import E5M2, Format
from ..reference.cross_entropy import check_labels, check_statistics, logit_gradient
from ..reference.quantize import _check_options
from ..tensor import ScaledTensor
from . import common
from .common import INTERPRETED, check_device, finite_or_nan, next_power_of_2, pow2, scale_exponent, to_fp32
from .launch import launch
from .quantize import quantize
from .rows import empty_rows, final_words, flat_columns, hold_known, load_flat, micro_amax, row_result, store_flat, store_row_scale, store_scales
from .words import pack_row

PIECE = 16
"""Tiles of 128 columns that a program of `softmax_parts` holds at once."""
GRADIENT_OPTIONS = {"TILES": 16, "PIECES": 2, "num_warps": 4}
"""The gradient loads PIECES pieces of TILES tiles at once and computes one after the other: 16 values of each in a thread (scripts/sweep_rows.py)."""
_EXP = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }")
SLACK = tl.constexpr(2.0**-16)
"""Of probabilities in fp32: lse is off by up to its own last place, so an entry may exceed the bound by as much."""


@triton.jit
def _softmax_parts_kernel(logits_ptr, labels_ptr, parts_ptr, rows, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * cols
    column = tl.arange(0, BLOCK)
    m = -float("inf")
    s = 0.0
    for first in range(0, cols, BLOCK):
        x = to_fp32(tl.load(logits_ptr + first + column, mask=first + column < cols, other=-float("inf")))
        larger = tl.maximum(m, tl.max(x, axis=0))
        s = s * tl.exp(m - larger) + tl.sum(tl.exp(x - larger), axis=0)
        m = larger
    label = tl.load(labels_ptr + row)
    target = tl.load(logits_ptr + label, mask=(label >= 0) & (label < cols), other=-float("inf")).to(tl.float32)
    tl.store(parts_ptr + row, m)
    tl.store(parts_ptr + rows + row, s)
    tl.store(parts_ptr + 2 * rows + row, target)


@triton.jit
def _exp(x, FTZ: tl.constexpr):
    """e**x. FTZ: 0 where that is below 2**-126."""
    if INTERPRETED or not FTZ:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(_EXP, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _load_pieces(ptr, first, cols, TILES: tl.constexpr, PIECES: tl.constexpr):
    """Logits of PIECES pieces from column ``first`` on; -inf, which has no probability, beyond ``cols``."""
    piece = load_flat(ptr, first, cols, TILES, OTHER=-float("inf"))
    if PIECES == 1:
        return (piece,)
    else:
        return (piece,) + _load_pieces(ptr, first + TILES * 128, cols, TILES, PIECES - 1)  # noqa: RUF005


@triton.jit
def _minus_label(p, at):
    """p - 1 at position ``at`` of a piece [TILES, 4, 32], if it is one. A branch: few pieces have the label; to compare every value costs as much as exp."""
    TILES: tl.constexpr = p.shape[0]
    if (at >= 0) & (at < TILES * 128):
        position = tl.reshape(flat_columns(0, TILES), (TILES, 4, 32))
        p = tl.where(position == at.to(tl.int32), p - 1.0, p)
    return p


@triton.jit
def _cross_entropy_backward_quantize_kernel(
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
    PIECES: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    """One row. What a row's scale is has been known from the start, and p <= 1, so that only dloss can make an entry infinite."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * cols
    label, lse, dloss = tl.load(labels_ptr + row), tl.load(lse_ptr + row), finite_or_nan(tl.load(dloss_ptr + row))
    label = tl.where(label < cols, label, -1)
    bound = (tl.abs(tl.exp(tl.load(target_ptr + row) - lse) - 1.0) + SLACK) * tl.abs(dloss)
    row_exp = scale_exponent(tl.maximum(finite_or_nan(bound), 0.0), E5M2)
    # Next to the bound, p below 2**-126 is nothing in any format: with one scale per row it may be 0 from the start.
    FTZ: tl.constexpr = FOLD or LOCAL == "row"
    for begin in range(0, cols, PIECES * TILES * 128):
        pieces = _load_pieces(logits_ptr, begin, cols, TILES, PIECES)
        for i in tl.static_range(PIECES):
            first = begin + i * TILES * 128
            p = _minus_label(_exp(to_fp32(pieces[i], AGAIN=True) - lse, FTZ), label - first)
            micro = tl.maximum(micro_amax(p) * tl.abs(dloss), 0.0)
            if LOCAL == "row":
                held = hold_known(p, micro, LOCAL, E5M2)
                word = pack_row(p * (dloss * pow2(-row_exp)), E5M2)
            else:
                held = hold_known(p * dloss, micro, LOCAL, E5M2)
                word = final_words(held, row_exp, LOCAL, FOLD, E5M2)
            store_flat(payload_ptr + row * cols, word, first, cols)
            store_scales(held.exponent, held.tile_exp, row, first, cols, cols, scale_ptr, tile_exponent_ptr, LOCAL, FOLD)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


def softmax_parts(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.softmax_parts`: (largest logit, sum of exp(x - largest), logit of the label), fp32 [T] each."""
    check_labels(logits, labels)
    check_device(logits, "logits")
    rows, cols = logits.shape
    parts = common.empty((3, rows), torch.float32, logits.device)
    block = min(next_power_of_2(cols), PIECE * 128)
    launch(_softmax_parts_kernel, (rows,), logits, labels.contiguous(), parts, rows, cols, BLOCK=block, num_warps=max(block // 1024, 1))
    m, s, target = parts.unbind()
    return m, s, target


def cross_entropy_backward_quantize(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    dloss: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E5M2,
    *,
    fold: str | None = None,
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.cross_entropy_backward_quantize`. Fused for "row", "tile" and "micro"; otherwise the gradient is made in fp32."""
    check_labels(logits, labels)
    check_statistics(logits, lse=lse, target=target, dloss=dloss)
    check_device(logits, "logits")
    _check_options(granularity, fold, None)
    rows, cols = logits.shape
    if granularity not in ("row", "tile", "micro"):
        return quantize(logit_gradient(logits, labels, lse, dloss), granularity, fmt, fold=fold)
    r = row_result(cols, granularity, fold, fmt)
    form = {key: r.constants[key] for key in ("LOCAL", "FOLD", "E5M2")}
    q, pointers = empty_rows(rows, cols, r, fmt, logits.device)
    vectors = (labels.contiguous(), lse, target, dloss)
    launch(_cross_entropy_backward_quantize_kernel, (rows,), logits, *vectors, *pointers, cols, **form, **GRADIENT_OPTIONS)
    return q
