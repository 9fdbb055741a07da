"""One program quantises one row, held in registers.

A row is cut into a *block* and, if that leaves a remainder, a smaller *tail*: both powers of two (Triton's tensors must be), so that 11008 columns cost
8192 + 4096 lanes and not 16384. Each is a [tiles, 4, 32] tensor: 128-column tiles of four 32-column micro groups, so that both kinds of group are
reductions along an axis and need no data movement. `load_piece`, `micro_amax` and `store_piece` are the three steps; quantize, rmsnorm and swiglu differ
only between the first two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..formats import Format
from ..tensor import MICRO, TILE, ScaledTensor, scale_shape
from . import common
from .common import decode, encode, is_e5m2, pow2, scale_exponent, tiles_of, to_fp32

MAX_ROW = 32768
"""Widest row held in registers; wider rows are read twice."""
ELEMENTS_PER_THREAD = 32
"""Aimed for when the number of warps is chosen; scripts/bench_kernels.py sweeps it."""


@dataclass(frozen=True)
class RowPlan:
    """How one program covers a row: tiles in the block, tiles in the tail (0 = none), warps."""

    block: int
    tail: int
    warps: int


def plan_row(cols: int, per_thread: int | None = None) -> RowPlan:
    """Cut a row of ``cols`` columns into power-of-two pieces."""
    tiles = tiles_of(cols)
    block = triton.next_power_of_2(tiles)
    tail = 0
    if block > 4 and tiles <= block // 2 + block // 4:
        block //= 2
        tail = triton.next_power_of_2(tiles - block)
    per_thread = ELEMENTS_PER_THREAD if per_thread is None else per_thread
    warps = (block + tail) * TILE // (32 * per_thread)
    return RowPlan(block, tail, min(max(triton.next_power_of_2(warps), 1), 16))


@triton.jit
def load_piece(ptr, first, cols, TILES: tl.constexpr):
    """Columns first .. first + TILES * 128 of one row as fp32 [TILES, 4, 32]; 0 beyond ``cols``."""
    column = first + columns_of(TILES)
    return to_fp32(tl.load(ptr + column, mask=column < cols, other=0.0))


@triton.jit
def columns_of(TILES: tl.constexpr):
    tile = tl.arange(0, TILES)[:, None, None] * 128
    micro = tl.arange(0, 4)[None, :, None] * 32
    return tile + micro + tl.arange(0, 32)[None, None, :]


@triton.jit
def micro_amax(y):
    """Largest finite |y| of each micro group: [TILES, 4, 32] -> [TILES, 4]. ``y`` must be NaN where it is not finite; max drops NaN."""
    amax = tl.max(tl.abs(y), axis=2)
    return tl.where(amax == amax, amax, 0.0)


@triton.jit
def row_exponent(micro, E5M2: tl.constexpr):
    """Scale exponent of the whole piece from its micro maxima."""
    return scale_exponent(tl.max(tl.max(micro, axis=1), axis=0), E5M2)


@triton.jit
def store_piece(
    y, micro, row_exp, row, first, end, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr
):
    """Round a piece and store payload and per-group scales. LOCAL: "row", "tile" or "micro"; FOLD: then re-express it at ``row_exp``.

    y: [TILES, 4, 32] goes to columns first .. min(first + TILES * 128, end) of a row of ``cols``; first is a multiple of 128, and so is end unless it is cols.
    micro: [TILES, 4] maxima. A row (or folded) result writes tile_exponent; the row's own scale is the caller's to write.
    """
    TILES: tl.constexpr = y.shape[0]
    tile_exp = scale_exponent(tl.max(micro, axis=1), E5M2)
    if LOCAL == "row":
        byte = encode(y * pow2(-row_exp), E5M2)
    else:
        exponent = tile_exp[:, None, None] if LOCAL == "tile" else scale_exponent(micro, E5M2)[:, :, None]
        byte = encode(y * pow2(-exponent), E5M2)
        if FOLD:
            # The second rounding is the fold's: what is already in FP8 moves to the row's exponent.
            byte = encode(decode(byte, E5M2) * pow2(tl.maximum(exponent - row_exp, -126)), E5M2)
    column = first + columns_of(TILES)
    tl.store(payload_ptr + row * cols + column, byte, mask=column < end)
    tiles = (cols + 127) // 128
    tile = first // 128 + tl.arange(0, TILES)
    if FOLD or LOCAL == "row":
        tl.store(tile_exponent_ptr + row * tiles + tile, (tile_exp + 127).to(tl.uint8), mask=tile < (end + 127) // 128)
    elif LOCAL == "tile":
        tl.store(scale_ptr + row * tiles + tile, pow2(tile_exp), mask=tile < (end + 127) // 128)
    else:
        groups = (cols + 31) // 32
        group = (first // 32 + tl.arange(0, TILES)[:, None] * 4) + tl.arange(0, 4)[None, :]
        tl.store(scale_ptr + row * groups + group, (scale_exponent(micro, E5M2) + 127).to(tl.uint8), mask=group < (end + 31) // 32)


@triton.jit
def store_row_scale(scale_ptr, row, row_exp, LOCAL: tl.constexpr, FOLD: tl.constexpr):
    """Write the row's scale where the result has one."""
    if FOLD or LOCAL == "row":
        tl.store(scale_ptr + row, pow2(row_exp))


def empty_rows(rows: int, cols: int, granularity: str, fold: str | None, fmt: Format, device: torch.device) -> ScaledTensor:
    """An unwritten result of a row kernel: row, tile or micro granularity, or folded to rows."""
    result = "row" if fold == "row" else granularity
    payload = common.empty((rows, cols), torch.uint8, device).view(fmt.dtype)
    scale = common.empty(scale_shape(rows, cols, result), torch.uint8 if result == "micro" else torch.float32, device)
    tile_exponent = common.empty((rows, tiles_of(cols)), torch.uint8, device) if result == "row" else None
    return ScaledTensor(payload, scale, result, tile_exponent=tile_exponent)


def row_arguments(q: ScaledTensor, granularity: str, fold: str | None) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """(output pointers, constants) that every row kernel takes."""
    tile_exponent = q.scale if q.tile_exponent is None else q.tile_exponent  # never read when absent
    pointers = (q.payload.view(torch.uint8), q.scale, tile_exponent)
    return pointers, {"LOCAL": granularity, "FOLD": fold == "row", "E5M2": is_e5m2(q.format)}


__all__ = [
    "MAX_ROW",
    "MICRO",
    "RowPlan",
    "columns_of",
    "empty_rows",
    "load_piece",
    "micro_amax",
    "plan_row",
    "row_arguments",
    "row_exponent",
    "store_piece",
    "store_row_scale",
]
