"""`fold_transpose` for the experts of one grouped buffer, in two launches whatever their number: `reference.grouped.grouped_fold_transpose`, bit for bit.

The target exponent of 128 columns is a maximum over one expert's rows. A first kernel takes the maximum of every block of 128 rows (no block holds two
experts), so that its work does not depend on how rows are spread over experts; each program of the second finishes its expert's maximum over the blocks
``offsets[e] / 128 .. offsets[e + 1] / 128``, then shifts and transposes 128 x 128 values as `kernels.fold_transpose` does. Nothing is added or compared
atomically, nothing needs to be zeroed first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.grouped import GroupedTensor, check_blocks, check_grouped_to, check_offsets
from ..tensor import TILE, ScaledTensor
from . import common
from .column_fold import fold_columns
from .common import cdiv, check_payload, next_power_of_2, pow2, scale_bytes, source_constants, tiles_of
from .fold_transpose import _dependents_may_start, _row_shift, _tile_bytes, _wait_for_previous_kernel
from .launch import launch
from .words import load_quads, shift_words, store_quads, transpose_4x4

CHUNK = 128
"""Block maxima that a program reads at a time."""


@triton.jit
def _block_maximum_kernel(
    exponent_ptr,
    maximum_ptr,
    scale_ptr,
    offsets_ptr,
    block_expert_ptr,
    experts,
    blocks,
    tiles,
    cols,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """exponent [rows, tiles] uint8 -> maximum [tiles, blocks] uint8 over the 128 rows of each used block. Experts without rows get the smallest scale."""
    if OVERLAP:
        _dependents_may_start()
    block = tl.program_id(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    if tl.load(block_expert_ptr + block) >= 0:
        row = (block * 128 + tl.arange(0, 128)).to(tl.int64)[:, None]
        exponent = tl.load(exponent_ptr + row * tiles + tile[None, :], mask=tile[None, :] < tiles, other=0)
        tl.store(maximum_ptr + tile * blocks + block, tl.max(exponent.to(tl.int32), axis=0).to(tl.uint8), mask=tile < tiles)
    column = tl.program_id(1) * (TILES * 128) + tl.arange(0, TILES * 128)
    for expert in range(block, experts, tl.num_programs(0)):
        if tl.load(offsets_ptr + expert) == tl.load(offsets_ptr + expert + 1):
            tl.store(scale_ptr + expert * cols + column, pow2(tl.zeros_like(column) - 126), mask=column < cols)


@triton.jit
def _maximum_over(maximum_ptr, first, beyond, CHUNK: tl.constexpr):
    """Largest of the bytes first .. beyond; int32."""
    best = tl.zeros((CHUNK,), tl.int32)
    for start in range(first, beyond, CHUNK):
        block = start + tl.arange(0, CHUNK)
        best = tl.maximum(best, tl.load(maximum_ptr + block, mask=block < beyond, other=0).to(tl.int32))
    return tl.max(best, axis=0)


@triton.jit
def _grouped_fold_transpose_kernel(
    payload_ptr,
    out_ptr,
    scale_ptr,  # [E, cols] fp32
    source_ptr,
    maximum_ptr,  # [tiles, blocks] uint8
    offsets_ptr,
    block_expert_ptr,
    rows,
    cols,
    GROUP: tl.constexpr,
    E5M2: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: 128 rows x 128 columns. payload and out are int32 words; rows is a multiple of 128, cols of 4."""
    col_blocks = (cols + 127) // 128
    block = tl.program_id(0) // col_blocks
    col_block = tl.program_id(0) % col_blocks
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        if OVERLAP:  # even then: if all blocks are unused, this kernel must not end before the one that writes the empty experts' scales
            _wait_for_previous_kernel()
        return
    first = tl.load(offsets_ptr + expert) // 128
    beyond = tl.load(offsets_ptr + expert + 1) // 128
    quad = block * 32 + tl.arange(0, 32)[:, None]  # four rows, one word of the result
    word = col_block * 32 + tl.arange(0, 32)[None, :]  # four columns, one word of the payload
    in_words = cols // 4
    out_words = rows // 4
    mask = word < in_words
    w0, w1, w2, w3 = load_quads(payload_ptr, quad, word, in_words, mask)
    if OVERLAP:
        _wait_for_previous_kernel()
    target = _maximum_over(maximum_ptr + col_block * (rows // 128), first, beyond, CHUNK)
    w0 = shift_words(w0, _row_shift(source_ptr, quad * 4, word * 4, target, rows, cols, GROUP), E5M2)
    w1 = shift_words(w1, _row_shift(source_ptr, quad * 4 + 1, word * 4, target, rows, cols, GROUP), E5M2)
    w2 = shift_words(w2, _row_shift(source_ptr, quad * 4 + 2, word * 4, target, rows, cols, GROUP), E5M2)
    w3 = shift_words(w3, _row_shift(source_ptr, quad * 4 + 3, word * 4, target, rows, cols, GROUP), E5M2)
    o0, o1, o2, o3 = transpose_4x4(w0, w1, w2, w3)
    out_quad = block * 32 + tl.arange(0, 32)[None, :]
    out_word = col_block * 32 + tl.arange(0, 32)[:, None]
    store_quads(out_ptr, out_quad, out_word, out_words, out_word < in_words, o0, o1, o2, o3)
    if block == first:
        column = col_block * 128 + tl.arange(0, 128)
        scale = (tl.zeros_like(column) + target << 23).to(tl.float32, bitcast=True)
        tl.store(scale_ptr + expert * cols + column, scale, mask=column < cols)


def grouped_fold_transpose(q: ScaledTensor, offsets: torch.Tensor, block_expert: torch.Tensor, to: str = "column_block") -> GroupedTensor:
    """Kernel twin of `reference.grouped.grouped_fold_transpose`: payload [cols, rows], scale [E, cols], per expert its own scales, as ``to`` says.

    q: [rows, cols] row (with tile_exponent), tile or micro (no global scale); rows a multiple of 128, cols of 4. offsets: int32 [E + 1], block_expert: int32
    [rows / 128] (-1 = unused), on the device. Columns of the payload that belong to unused blocks are left unwritten. Where a scale is not a power of two the
    values become NaN, as in `fold_transpose`. Experts without rows get the scale 2**-126. to: "column_block", or "column", which reads the payload twice
    (`column_fold`).
    """
    check_grouped_to(to)
    check_payload(q)
    rows, cols = q.payload.shape
    experts = offsets.shape[0] - 1
    check_blocks(rows, block_expert, q.device)
    check_offsets(offsets, experts, q.device)
    if cols == 0 or cols % 4:
        raise ValueError(f"cols={cols} must be a positive multiple of 4 (of 16 for the products); pad the features with zeros")
    tiles = _tile_bytes(q)
    if to == "column":
        return GroupedTensor(*fold_columns(q, offsets, block_expert))
    overlap = not common.IS_INTERPRETED
    blocks, count = rows // TILE, tiles_of(cols)
    width = min(32, next_power_of_2(count))
    maximum = common.empty((count, blocks), torch.uint8, q.device)
    scale = common.empty((experts, cols), torch.float32, q.device)
    first = (tiles, maximum, scale, offsets, block_expert, experts, blocks, count, cols)
    launch(_block_maximum_kernel, (blocks, cdiv(count, width)), *first, TILES=width, OVERLAP=overlap, num_warps=4)
    payload = common.empty((cols, rows // 4), torch.int32, q.device)
    source = q.scale if q.granularity == "row" else scale_bytes(q)
    words = q.payload.view(torch.int32)
    constants = source_constants(q.granularity, q.payload.dtype)
    second = (words, payload, scale, source, maximum, offsets, block_expert, rows, cols)
    launch(_grouped_fold_transpose_kernel, (blocks * count,), *second, **constants, CHUNK=CHUNK, OVERLAP=overlap, num_warps=4, launch_pdl=overlap)
    return GroupedTensor(payload.view(q.payload.dtype), scale)
