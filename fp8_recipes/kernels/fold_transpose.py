"""Fold along the other axis and transpose: `fp8_recipes.reference.fold_transpose`, bit for bit, at 2 bytes moved per value.

A byte transpose through shared memory moves single bytes and runs at half the bandwidth. Here 4 x 4 bytes are transposed in registers, and only 32-bit words
travel through shared memory:

    4 rows x 4 columns = one word from each of 4 rows  --8 x prmt-->  one word for each of 4 columns  --transpose of words-->  runs of TR bytes along the rows

The exponent shift happens on the words as they arrive, four values at once (`words.shift_words`).

The target exponent of 128 columns is a maximum over all rows. A small first kernel reduces the tile exponents (1/128 of the data) to PARTS partial maxima per
column block; each program of the second kernel finishes its own maximum from them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..formats import Format, format_of
from ..reference.fold import check_transpose_to
from ..reference.quantize import tile_exponents
from ..tensor import ScaledTensor
from . import common
from .column_fold import fold_columns
from .common import (
    INTERPRETED,
    cdiv,
    check_not_empty,
    check_payload,
    decode,
    encode,
    finite_or_nan,
    is_e5m2,
    next_power_of_2,
    pow2,
    scale_byte,
    scale_bytes,
    source_constants,
    store_copies,
    tiles_of,
    to_fp32,
)
from .launch import launch
from .quantize import given_exponent
from .words import load_quads, pack_4, shift_words, store_quads, transpose_4x4


@dataclass(frozen=True)
class TransposePlan:
    """Tile of one program and launch order; scripts/bench_kernels.py sweeps these."""

    rows: int = 128
    warps: int = 4
    columns_first: bool = True
    """Do neighbouring programs work on neighbouring columns (True) or rows (False)?"""
    overlap: bool = True
    """Programmatic dependent launch: start reading while the partial maxima are still being computed."""


PLAN = TransposePlan()
WEIGHT_PLAN = TransposePlan()
MAX_PARTS = 128


@triton.jit
def _dependents_may_start():
    if not INTERPRETED:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait_for_previous_kernel():
    if not INTERPRETED:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _partial_target_kernel(exponent_ptr, partial_ptr, rows, tiles, ROWS: tl.constexpr, TILES: tl.constexpr, OVERLAP: tl.constexpr):
    """exponent [rows, tiles] uint8 -> partial [tiles, programs] uint8, the maximum over every programs-th group of ROWS rows."""
    if OVERLAP:
        _dependents_may_start()
    parts = tl.num_programs(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    best = tl.zeros((TILES,), tl.int32)
    for first in range(tl.program_id(0) * ROWS, rows, parts * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (tile[None, :] < tiles)
        best = tl.maximum(best, tl.max(tl.load(exponent_ptr + row * tiles + tile[None, :], mask=mask, other=0).to(tl.int32), axis=0))
    tl.store(partial_ptr + tile * parts + tl.program_id(0), best.to(tl.uint8), mask=tile < tiles)


@triton.jit
def _row_shift(source_ptr, row, column, target, rows, cols, GROUP: tl.constexpr):
    """Exponent shift of the values at [row, column] (broadcastable); 255 where the source scale is bad."""
    byte = scale_byte(source_ptr, row, column, rows, cols, GROUP)
    return tl.where(byte == 255, 255, byte - target)


@triton.jit
def _fold_transpose_kernel(
    payload_ptr,
    out_ptr,
    scale_ptr,
    source_ptr,
    partial_ptr,
    rows,
    cols,
    partial_stride,
    PARTS: tl.constexpr,
    TR: tl.constexpr,
    GROUP: tl.constexpr,
    E5M2: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: TR rows x 128 columns. payload and out are int32 words; rows and cols are multiples of 4. GROUP -1: one scale for all, nothing shifts."""
    row_blocks = (rows + TR - 1) // TR
    col_blocks = (cols + 127) // 128
    if COLUMNS_FIRST:
        row_block, col_block = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    else:
        row_block, col_block = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    quad = row_block * (TR // 4) + tl.arange(0, TR // 4)[:, None]  # four rows, one word of the result
    word = col_block * 32 + tl.arange(0, 32)[None, :]  # four columns, one word of the payload
    in_words = cols // 4
    out_words = rows // 4
    mask = (quad < out_words) & (word < in_words)
    w0, w1, w2, w3 = load_quads(payload_ptr, quad, word, in_words, mask)
    if OVERLAP:
        _wait_for_previous_kernel()
    if GROUP < 0:
        scale_bits = tl.load(source_ptr).to(tl.int32, bitcast=True)
    else:
        target = tl.max(tl.load(partial_ptr + col_block * partial_stride + tl.arange(0, PARTS)).to(tl.int32), axis=0)
        scale_bits = target << 23
        w0 = shift_words(w0, _row_shift(source_ptr, quad * 4, word * 4, target, rows, cols, GROUP), E5M2)
        w1 = shift_words(w1, _row_shift(source_ptr, quad * 4 + 1, word * 4, target, rows, cols, GROUP), E5M2)
        w2 = shift_words(w2, _row_shift(source_ptr, quad * 4 + 2, word * 4, target, rows, cols, GROUP), E5M2)
        w3 = shift_words(w3, _row_shift(source_ptr, quad * 4 + 3, word * 4, target, rows, cols, GROUP), E5M2)
    o0, o1, o2, o3 = transpose_4x4(w0, w1, w2, w3)
    out_quad = row_block * (TR // 4) + tl.arange(0, TR // 4)[None, :]
    out_word = col_block * 32 + tl.arange(0, 32)[:, None]
    store_quads(out_ptr, out_quad, out_word, out_words, (out_quad < out_words) & (out_word < in_words), o0, o1, o2, o3)
    if row_block == 0:
        column = col_block * 128 + tl.arange(0, 128)
        tl.store(scale_ptr + column, (tl.zeros_like(column) + scale_bits).to(tl.float32, bitcast=True), mask=column < cols)


@triton.jit
def _fold_transpose_bytes_kernel(
    payload_ptr, out_ptr, scale_ptr, source_ptr, partial_ptr, rows, cols, partial_stride, PARTS: tl.constexpr, GROUP: tl.constexpr, E5M2: tl.constexpr
):
    """Any shape, byte by byte: for rows or cols that are not multiples of 4 (no GEMM takes those)."""
    row = tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]
    column = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    target = tl.max(tl.load(partial_ptr + tl.program_id(1) * partial_stride + tl.arange(0, PARTS)).to(tl.int32), axis=0)
    mask = (row < rows) & (column < cols)
    shift = _row_shift(source_ptr, row, column, target, rows, cols, GROUP)
    factor = tl.where(shift == 255, float("nan"), pow2(tl.minimum(tl.maximum(shift, -126), 127)))
    value = decode(tl.load(payload_ptr + row.to(tl.int64) * cols + column, mask=mask, other=0), E5M2)
    tl.store(out_ptr + column.to(tl.int64) * rows + row, encode(finite_or_nan(value * factor), E5M2), mask=mask)
    if tl.program_id(0) == 0:
        flat = tl.program_id(1) * 128 + tl.arange(0, 128)
        tl.store(scale_ptr + flat, (tl.zeros_like(flat) + target << 23).to(tl.float32, bitcast=True), mask=flat < cols)


@triton.jit
def _quantize_given_transposed_kernel(
    x_ptr, out_ptr, scale_ptr, amax_ptr, increment, rows, cols, TR: tl.constexpr, TC: tl.constexpr, E5M2: tl.constexpr, COLUMNS_FIRST: tl.constexpr
):
    """x [rows, cols] -> payload words [cols, rows / 4] and the scale once per column; rows is a multiple of 4. Four rows of a column are rounded straight into
    one word."""
    row_blocks = (rows + TR - 1) // TR
    col_blocks = (cols + TC - 1) // TC
    if COLUMNS_FIRST:
        row_block, col_block = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    else:
        row_block, col_block = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    exponent = given_exponent(amax_ptr, increment, E5M2)
    inverse = pow2(-exponent)
    quad = row_block * (TR // 4) + tl.arange(0, TR // 4)[:, None]
    column = col_block * TC + tl.arange(0, TC)[None, :]
    mask = (quad < rows // 4) & (column < cols)
    source = x_ptr + quad.to(tl.int64) * 4 * cols + column
    x0 = finite_or_nan(to_fp32(tl.load(source, mask=mask, other=0.0)) * inverse)
    x1 = finite_or_nan(to_fp32(tl.load(source + cols, mask=mask, other=0.0)) * inverse)
    x2 = finite_or_nan(to_fp32(tl.load(source + 2 * cols, mask=mask, other=0.0)) * inverse)
    x3 = finite_or_nan(to_fp32(tl.load(source + 3 * cols, mask=mask, other=0.0)) * inverse)
    out_quad = row_block * (TR // 4) + tl.arange(0, TR // 4)[None, :]
    out_column = col_block * TC + tl.arange(0, TC)[:, None]
    out = out_ptr + out_column.to(tl.int64) * (rows // 4) + out_quad
    tl.store(out, tl.trans(pack_4(x0, x1, x2, x3, E5M2)), mask=(out_quad < rows // 4) & (out_column < cols))
    if tl.program_id(0) == 0:
        store_copies(scale_ptr, pow2(exponent), cols)


def _tile_bytes(q: ScaledTensor) -> torch.Tensor:
    """E8M0 byte of every 1x128 tile of ``q``, uint8 [rows, tiles]."""
    if q.tile_exponent is not None and q.global_scale is None:
        return q.tile_exponent
    return (tile_exponents(q) + 127).to(torch.uint8)


@functools.cache
def _partial_plan(rows: int, tiles: int, max_parts: int) -> tuple[int, int, int]:
    """(rows per load, partial maxima per column block, column blocks per program): one or two loads per program, their latency is all it costs."""
    group = min(128, max(16, next_power_of_2(cdiv(rows, max_parts))))
    return group, min(max_parts, next_power_of_2(cdiv(rows, group))), min(128, next_power_of_2(tiles))


def _partial_targets(tiles: torch.Tensor, overlap: bool) -> torch.Tensor:
    """Partial maxima over rows of uint8 [rows, tiles]: uint8 [tiles, parts], parts a power of two."""
    rows, count = tiles.shape
    group, parts, width = _partial_plan(rows, count, MAX_PARTS)
    partial = common.empty((count, parts), torch.uint8, tiles.device)
    launch(_partial_target_kernel, (parts, cdiv(count, width)), tiles, partial, rows, count, ROWS=group, TILES=width, OVERLAP=overlap, num_warps=8)
    return partial


def fold_transpose(q: ScaledTensor, to: str = "column_block", *, plan: TransposePlan | None = None) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.fold_transpose`: payload [cols, rows], one scale per row of the result.

    q: row (with tile_exponent), tile or micro (global_scale None), or tensor. Where a scale is not a power of two the reference raises; here its values become
    NaN, because to raise the host would have to wait for the GPU. (One scale for all is never shifted and may be any number.) to="column" needs rows and cols
    that are multiples of 4. plan: tile and launch order of the other two, for benchmarks.
    """
    check_transpose_to(to)
    check_payload(q)
    check_not_empty(q.payload, "payload")
    plan = PLAN if plan is None else plan
    if q.granularity == "tensor":
        return _transpose(q, plan)
    rows, cols = q.payload.shape
    tiles = _tile_bytes(q)
    if to == "column":
        payload, scales = fold_columns(q)
        return ScaledTensor(payload, scales[0], "row")
    overlap = plan.overlap and to == "column_block" and not common.IS_INTERPRETED
    source = q.scale if q.granularity == "row" else scale_bytes(q)
    constants = source_constants(q.granularity, q.payload.dtype)
    scale = common.empty((cols,), torch.float32, q.device)
    partial = _partial_targets(tiles, overlap)
    if to == "tensor":
        partial = partial.amax().view(1, 1)
    parts = partial.shape[1]
    stride = 0 if to == "tensor" else parts
    if rows % 4 or cols % 4:
        payload = common.empty((cols, rows), torch.uint8, q.device)
        arguments = (q.payload.view(torch.uint8), payload, scale, source, partial, rows, cols, stride)
        launch(_fold_transpose_bytes_kernel, (cdiv(rows, 32), tiles_of(cols)), *arguments, PARTS=parts, **constants)
    else:
        payload = common.empty((cols, rows // 4), torch.int32, q.device)
        arguments = (q.payload.view(torch.int32), payload, scale, source, partial, rows, cols, stride)
        options = {"COLUMNS_FIRST": plan.columns_first, "OVERLAP": overlap, "num_warps": plan.warps, "launch_pdl": overlap}
        launch(_fold_transpose_kernel, (cdiv(rows, plan.rows) * tiles_of(cols),), *arguments, PARTS=parts, TR=plan.rows, **constants, **options)
    return ScaledTensor(payload.view(q.payload.dtype), scale, "row")


def _transpose(q: ScaledTensor, plan: TransposePlan) -> ScaledTensor:
    """`fold_transpose` of a payload under one scale: no target to find, every byte moves as it is."""
    rows, cols = q.payload.shape
    if rows % 4 or cols % 4:  # no GEMM takes those
        payload = q.payload.view(torch.uint8).t().contiguous()
        return ScaledTensor(payload.view(q.payload.dtype), q.scale.expand(cols).contiguous(), "row")
    payload = common.empty((cols, rows // 4), torch.int32, q.device)
    scale = common.empty((cols,), torch.float32, q.device)
    arguments = (q.payload.view(torch.int32), payload, scale, q.scale, q.scale, rows, cols, 0)
    options = {"COLUMNS_FIRST": plan.columns_first, "OVERLAP": False, "num_warps": plan.warps}
    constants = {"PARTS": 1, "TR": plan.rows, "GROUP": -1, "E5M2": is_e5m2(format_of(q.payload.dtype))}
    launch(_fold_transpose_kernel, (cdiv(rows, plan.rows) * tiles_of(cols),), *arguments, **constants, **options)
    return ScaledTensor(payload.view(q.payload.dtype), scale, "row")


def quantize_given_transposed(w: torch.Tensor, amax: torch.Tensor, increment: float, fmt: Format, plan: TransposePlan | None = None) -> ScaledTensor:
    """``w`` [out_features, in_features] (out_features a multiple of 4) -> payload [in_features, out_features] under the scale of ``amax + increment``."""
    plan = WEIGHT_PLAN if plan is None else plan
    rows, cols = w.shape
    payload = common.empty((cols, rows // 4), torch.int32, w.device)
    scale = common.empty((cols,), torch.float32, w.device)
    width = 64
    grid = (cdiv(rows, plan.rows) * cdiv(cols, width),)
    launch(
        _quantize_given_transposed_kernel,
        grid,
        w,
        payload,
        scale,
        amax,
        float(increment),
        rows,
        cols,
        TR=plan.rows,
        TC=width,
        E5M2=is_e5m2(fmt),
        COLUMNS_FIRST=plan.columns_first,
        num_warps=plan.warps,
    )
    return ScaledTensor(payload.view(fmt.dtype), scale[0], "tensor", row_scale=scale)
