"""One program quantises one row, held in registers.

A row is cut into a *block* and, if that leaves a remainder, a smaller *tail*: both powers of two (Triton's tensors must be), so that 11008 columns cost
8192 + 4096 lanes and not 16384. Each is a [tiles, 4, 32] tensor: 128-column tiles of four 32-column micro groups, so that both kinds of group are
reductions along an axis and need no data movement. `load_row`, `hold_piece` and `store_row` are the three steps; quantize, rmsnorm and the activations
differ between the first two. A row is a tuple of pieces in between, so that a kernel says once what it does with a piece.

What limits these kernels is registers and instructions, not arithmetic units: how many rows a multiprocessor has in flight, and how many instructions it
issues per byte. So what waits for the row's maximum is held as FP8 words where the granularity allows it, and a fold shifts four values per word.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import Format
from ..reference.activation import check_prob
from ..reference.quantize import _check_options
from ..tensor import TILE, ScaledTensor, scale_shape
from . import common
from .common import is_e5m2, next_power_of_2, pow2, scale_exponent, tiles_of, to_fp32
from .words import bytes_of, pack_row, shift_words_down

MAX_ROW = 32768
"""Widest row held in registers; wider rows are read twice."""
ELEMENTS_PER_THREAD = 64
"""At least, while that leaves one warp: many short programs keep more loads in flight than few wide ones. scripts/bench_kernels.py sweeps it."""


@dataclass(frozen=True)
class RowPlan:
    """How one program covers a row: tiles in the block, tiles in the tail (0 = none), warps."""

    block: int
    tail: int
    warps: int


def is_fused(shape: Sequence[int], granularity: str, fold: str | None, prob: torch.Tensor | None) -> bool:
    """Raise on options of an activation that do not fit; is the fused kernel there for a result [rows, cols] of ``shape``?"""
    _check_options(granularity, fold, None)
    check_prob(prob, shape[0])
    return granularity in ("row", "tile", "micro") and shape[1] <= MAX_ROW


def plan_row(cols: int, per_thread: int = 0) -> RowPlan:
    """Cut a row of ``cols`` columns into power-of-two pieces. per_thread: values that a thread takes, at least; 0 = `ELEMENTS_PER_THREAD`."""
    return _plan_row(cols, per_thread or ELEMENTS_PER_THREAD)


@functools.cache
def _plan_row(cols: int, per_thread: int) -> RowPlan:
    tiles = tiles_of(cols)
    block = next_power_of_2(tiles)
    tail = 0
    if block > 4 and tiles <= block // 2 + block // 4:
        block //= 2
        tail = next_power_of_2(tiles - block)
    warps = max((block + tail) * TILE // (32 * per_thread), 1)
    return RowPlan(block, tail, min(1 << (warps.bit_length() - 1), 16))


@triton.jit
def load_row(LOAD: tl.constexpr, given, cols, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """The pieces of a row, one or two: of each what ``LOAD(*given, first column, cols, tiles)`` returns.

    All loads are in flight before the first reduction waits.
    """
    block = LOAD(*given, 0, cols, BLOCK)
    if TAIL:
        return block, LOAD(*given, BLOCK * 128, cols, TAIL)
    else:
        return (block,)


@triton.jit
def load_piece(ptr, first, cols, TILES: tl.constexpr):
    """Columns first .. first + TILES * 128 of one row as fp32 [TILES, 4, 32]; 0 beyond ``cols``."""
    return to_fp32(load_raw(ptr, first, cols, TILES))


@triton.jit
def load_raw(ptr, first, cols, TILES: tl.constexpr):
    """`load_piece` in the type of the memory."""
    column = first + columns_of(TILES)
    return tl.load(ptr + column, mask=column < cols, other=0.0)


@triton.jit
def flat_columns(first, TILES: tl.constexpr):
    """`columns_of` from ``first`` on as a matrix [4 * TILES, 32]: then the compiler gives neighbouring threads neighbouring groups, not neighbouring tiles."""
    return first + tl.arange(0, 4 * TILES)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def load_flat(ptr, first, cols, TILES: tl.constexpr, MASK: tl.constexpr = True, OTHER: tl.constexpr = 0.0):
    """`load_raw` through `flat_columns`. MASK: OTHER beyond ``cols``; without it, nothing of the piece may be there."""
    column = flat_columns(first, TILES)
    x = tl.load(ptr + column, mask=column < cols, other=OTHER) if MASK else tl.load(ptr + column)
    return tl.reshape(x, (TILES, 4, 32))


@triton.jit
def store_flat(ptr, word, first, cols, MASK: tl.constexpr = True):
    """FP8 words [TILES, 4, 8] to where `load_flat` would read them."""
    TILES: tl.constexpr = word.shape[0]
    column = flat_columns(first, TILES)
    byte = tl.reshape(bytes_of(word), (4 * TILES, 32))
    if MASK:
        tl.store(ptr + column, byte, mask=column < cols)
    else:
        tl.store(ptr + column, byte)


@triton.jit
def load_row_prob(prob_ptr, row, PROB: tl.constexpr):
    """What multiplies a row: its probability, 1 where there is none."""
    if PROB:
        return tl.load(prob_ptr + row)
    else:
        return 1.0


@triton.jit
def columns_of(TILES: tl.constexpr):
    tile = tl.arange(0, TILES)[:, None, None] * 128
    micro = tl.arange(0, 4)[None, :, None] * 32
    return tile + micro + tl.arange(0, 32)[None, None, :]


@triton.jit
def micro_amax(y):
    """Largest finite |y| of each micro group: [TILES, 4, 32] -> [TILES, 4]. ``y`` must be NaN where it is not finite; max drops NaN."""
    return tl.maximum(tl.max(tl.abs(y), axis=2), 0.0)  # the second maximum is for a group that is all NaN


@triton.jit
def total(numbers):
    """Sum of what was found in each of one or two pieces."""
    if len(numbers) == 1:
        return numbers[0]
    else:
        return numbers[0] + numbers[1]


@triton.jit
def largest(numbers):
    """Maximum of what was found in each of one or two pieces."""
    if len(numbers) == 1:
        return numbers[0]
    else:
        return tl.maximum(numbers[0], numbers[1])


class Held(NamedTuple):
    """What of a piece waits for the row's maximum."""

    data: Any
    """fp32 [TILES, 4, 32] or, rounded already, FP8 words [TILES, 4, 8]."""
    exponent: Any
    """Of data, [TILES, 4]."""
    tile_exp: Any
    """What each tile needs by itself, [TILES]."""
    largest_exp: Any
    """Maximum of tile_exp."""


@triton.jit
def hold_piece(y, LOCAL: tl.constexpr, E5M2: tl.constexpr):
    """A piece as `Held`. y: [TILES, 4, 32] fp32, NaN where it is not finite."""
    return hold_known(y, micro_amax(y), LOCAL, E5M2)


@triton.jit
def hold_known(y, micro, LOCAL: tl.constexpr, E5M2: tl.constexpr):
    """`hold_piece` where the maxima [TILES, 4] are known.

    Where the payload's first rounding needs only the group's own scale ("tile", "micro"), y is rounded here and held as FP8 words, a quarter of the
    registers of y; "row" holds y.
    """
    micro_exp = scale_exponent(micro, E5M2)
    tile_exp = tl.max(micro_exp, axis=1)
    if LOCAL == "row":
        return Held(y, micro_exp, tile_exp, tl.max(tile_exp, axis=0))
    else:
        local = tile_exp[:, None] + tl.zeros_like(micro_exp) if LOCAL == "tile" else micro_exp
        return Held(pack_row(y * pow2(-local)[:, :, None], E5M2), local, tile_exp, tl.max(tile_exp, axis=0))


@triton.jit
def store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr):
    """Write a row of ``cols`` columns, its one or two pieces `Held`: payload, scales and tile exponents."""
    row_exp = largest([piece.largest_exp for piece in held])
    if len(held) == 2:
        first = held[0].tile_exp.shape[0] * 128
        store_piece(held[1], row_exp, row, first, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_piece(held[0], row_exp, row, 0, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


@triton.jit
def store_piece(
    held,
    row_exp,
    row,
    first,
    end,
    cols,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
):
    """Write payload and per-group scales of a piece `Held`. LOCAL: "row", "tile" or "micro"; FOLD: then re-express it at ``row_exp``.

    The piece goes to columns first .. min(first + TILES * 128, end) of a row of ``cols``; first is a multiple of 128, and so is end unless it is cols.
    A row (or folded) result writes tile_exponent; the row's own scale is the caller's to write.
    """
    TILES: tl.constexpr = held.data.shape[0]
    word = final_words(held, row_exp, LOCAL, FOLD, E5M2)
    column = first + columns_of(TILES)
    tl.store(payload_ptr + row * cols + column, bytes_of(word), mask=column < end)
    store_scales(held.exponent, held.tile_exp, row, first, end, cols, scale_ptr, tile_exponent_ptr, LOCAL, FOLD)


@triton.jit
def final_words(held, row_exp, LOCAL: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr):
    """What of a piece `Held` goes to memory: FP8 words [TILES, 4, 8]."""
    if LOCAL == "row":
        return pack_row(held.data * pow2(-row_exp), E5M2)
    elif FOLD:  # the second rounding is the fold's: what is already in FP8 moves to the row's exponent
        return shift_words_down(held.data, (held.exponent - row_exp)[:, :, None], E5M2)
    else:
        return held.data


@triton.jit
def store_scales(exponent, tile_exp, row, first, end, cols, scale_ptr, tile_exponent_ptr, LOCAL: tl.constexpr, FOLD: tl.constexpr):
    """Write the per-group scales of columns first .. end, as `store_piece` does. exponent: [TILES, 4], tile_exp: [TILES]."""
    TILES: tl.constexpr = tile_exp.shape[0]
    tiles = (cols + 127) // 128
    tile = first // 128 + tl.arange(0, TILES)
    if FOLD or LOCAL == "row":
        tl.store(tile_exponent_ptr + row * tiles + tile, (tile_exp + 127).to(tl.uint8), mask=tile < (end + 127) // 128)
    elif LOCAL == "tile":
        tl.store(scale_ptr + row * tiles + tile, pow2(tile_exp), mask=tile < (end + 127) // 128)
    else:
        groups = (cols + 31) // 32
        group = (first // 32 + tl.arange(0, TILES)[:, None] * 4) + tl.arange(0, 4)[None, :]
        tl.store(scale_ptr + row * groups + group, (exponent + 127).to(tl.uint8), mask=group < (end + 31) // 32)


@triton.jit
def store_row_scale(scale_ptr, row, row_exp, LOCAL: tl.constexpr, FOLD: tl.constexpr):
    """Write the row's scale where the result has one."""
    if FOLD or LOCAL == "row":
        tl.store(scale_ptr + row, pow2(row_exp))


@dataclass(frozen=True)
class RowResult:
    """What depends on a row kernel's options and width alone."""

    granularity: str
    """Of the result: row, tile or micro."""
    tiles: int
    """Tile exponents per row; 0 = the result has none."""
    groups: int
    """Scales per row."""
    constants: dict[str, Any]
    """The kernel's constexpr parameters and warps; shared, not to be changed."""


def row_result(cols: int, granularity: str, fold: str | None, fmt: Format) -> RowResult:
    """How a row of ``cols`` columns is quantised at ``granularity`` ("row", "tile" or "micro") and folded."""
    return _row_result(cols, granularity, fold, is_e5m2(fmt), ELEMENTS_PER_THREAD)


@functools.cache
def _row_result(cols: int, granularity: str, fold: str | None, e5m2: bool, per_thread: int) -> RowResult:
    """By numbers and words alone: the hash of a dataclass is a call of Python."""
    result, plan = "row" if fold == "row" else granularity, _plan_row(cols, per_thread)
    constants = {"BLOCK": plan.block, "TAIL": plan.tail, "LOCAL": granularity, "FOLD": fold == "row", "E5M2": e5m2, "num_warps": plan.warps}
    return RowResult(result, tiles_of(cols) if result == "row" else 0, scale_shape(1, cols, result)[-1], constants)


def empty_rows(rows: int, cols: int, r: RowResult, fmt: Format, device: torch.device) -> tuple[ScaledTensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """An unwritten result of a row kernel, and its payload, scales and tile exponents as the kernel takes them."""
    payload = common.empty((rows, cols), torch.uint8, device)
    if r.tiles:
        scale = common.empty((rows,), torch.float32, device)
        tile_exponent = common.empty((rows, r.tiles), torch.uint8, device)
        return ScaledTensor(payload.view(fmt.dtype), scale, "row", tile_exponent), (payload, scale, tile_exponent)
    scale = common.empty((rows, r.groups), torch.uint8 if r.granularity == "micro" else torch.float32, device)
    return ScaledTensor(payload.view(fmt.dtype), scale, r.granularity), (payload, scale, scale)  # tile exponents are never written


__all__ = [
    "MAX_ROW",
    "Held",
    "RowPlan",
    "columns_of",
    "empty_rows",
    "final_words",
    "flat_columns",
    "hold_known",
    "hold_piece",
    "is_fused",
    "largest",
    "load_flat",
    "load_piece",
    "load_raw",
    "load_row",
    "load_row_prob",
    "micro_amax",
    "plan_row",
    "row_result",
    "store_flat",
    "store_piece",
    "store_row",
    "store_row_scale",
    "store_scales",
    "total",
]
