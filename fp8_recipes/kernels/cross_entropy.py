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
from .common import check_device, finite_or_nan, next_power_of_2, scale_exponent, tiles_of, to_fp32
from .launch import launch
from .quantize import quantize
from .rows import columns_of, empty_rows, hold_piece, load_piece, row_result, store_piece, store_row_scale

PIECE = 16
"""Tiles of 128 columns that a program holds at once."""
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
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
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
    tiles = min(next_power_of_2(tiles_of(cols)), PIECE)
    q, pointers = empty_rows(rows, cols, r, fmt, logits.device)
    vectors = (labels.contiguous(), lse, target, dloss)
    launch(_cross_entropy_backward_quantize_kernel, (rows,), logits, *vectors, *pointers, cols, TILES=tiles, **form, num_warps=max(tiles // 8, 1))
    return q
