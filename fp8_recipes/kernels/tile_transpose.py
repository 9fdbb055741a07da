"""The transpose of FP8-Flow-MoE in one launch: `reference.grouped.scaling_aware_transpose`, bit for bit.

Every 128 x 128 tile takes its own largest row scale, which one program finds from 128 exponents while it waits for the payload. That is the merit of the
paper's form beside `kernels.grouped_transpose`, which needs a maximum over all rows of an expert first; its price is a scale that changes along wgrad's
contraction. So it is here to be compared with: no product of this package reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.grouped import GroupedTensor, check_tile_transpose
from ..tensor import ScaledTensor
from . import common
from .common import cdiv, check_not_empty, check_payload, source_constants, tiles_of
from .launch import launch
from .words import load_quads, shift_words, store_quads, transpose_4x4

SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _scale_byte(source_ptr, row, word, col_block, rows, cols, GROUP: tl.constexpr):
    """E8M0 byte of the scales of these rows in one column block; 255 where one is no normal power of two. What lies outside has the smallest scale.

    row: [32, 1], word: [1, 32]. GROUP 0: fp32 per row, 128: fp32 per tile; both [32, 1], read once per row. 32: E8M0, [32, 32].
    """
    if GROUP == 32:
        mask = (row < rows) & (word < cols // 4)
        return tl.load(source_ptr + row * ((cols + 31) // 32) + word // 8, mask=mask, other=1).to(tl.int32)
    else:
        at = row if GROUP == 0 else row * ((cols + 127) // 128) + col_block
        bits = tl.load(source_ptr + at, mask=row < rows, other=SMALLEST).to(tl.int32, bitcast=True)
        byte = bits >> 23  # negative if the sign is set
        return tl.where(((bits & 0x7FFFFF) == 0) & (byte > 0), byte, 255)


@triton.jit
def _counted(byte):
    """The byte as it counts in a maximum: scales that are no powers of two do not."""
    return tl.where(byte == 255, 1, byte)


@triton.jit
def _tile_transpose_kernel(
    payload_ptr,
    out_ptr,
    scale_ptr,  # [ceil(rows / 128), cols] fp32
    source_ptr,
    exponent_ptr,
    block_expert_ptr,
    rows,
    cols,
    GROUP: tl.constexpr,
    E5M2: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: 128 rows x 128 columns. payload and out are int32 words; rows and cols are multiples of 4. BLOCKS: skip unused blocks."""
    col_blocks = (cols + 127) // 128
    block = tl.program_id(0) // col_blocks
    col_block = tl.program_id(0) % col_blocks
    if BLOCKS:
        expert = tl.load(block_expert_ptr + block)
        if expert < 0:
            return
    quad = block * 32 + tl.arange(0, 32)[:, None]  # four rows, one word of the result
    word = col_block * 32 + tl.arange(0, 32)[None, :]  # four columns, one word of the payload
    in_words = cols // 4
    out_words = rows // 4
    mask = (quad < out_words) & (word < in_words)
    w0, w1, w2, w3 = load_quads(payload_ptr, quad, word, in_words, mask)
    b0 = _scale_byte(source_ptr, quad * 4, word, col_block, rows, cols, GROUP)
    b1 = _scale_byte(source_ptr, quad * 4 + 1, word, col_block, rows, cols, GROUP)
    b2 = _scale_byte(source_ptr, quad * 4 + 2, word, col_block, rows, cols, GROUP)
    b3 = _scale_byte(source_ptr, quad * 4 + 3, word, col_block, rows, cols, GROUP)
    if GROUP == 0:
        row = (block * 128 + tl.arange(0, 128))[:, None]
        byte = _counted(tl.load(exponent_ptr + row * col_blocks + col_block, mask=row < rows, other=1).to(tl.int32))
    else:
        byte = tl.maximum(tl.maximum(_counted(b0), _counted(b1)), tl.maximum(_counted(b2), _counted(b3)))
    target = tl.max(tl.max(byte, axis=1), axis=0)
    w0 = shift_words(w0, tl.where(b0 == 255, 255, b0 - target), E5M2)
    w1 = shift_words(w1, tl.where(b1 == 255, 255, b1 - target), E5M2)
    w2 = shift_words(w2, tl.where(b2 == 255, 255, b2 - target), E5M2)
    w3 = shift_words(w3, tl.where(b3 == 255, 255, b3 - target), E5M2)
    o0, o1, o2, o3 = transpose_4x4(w0, w1, w2, w3)
    out_quad = block * 32 + tl.arange(0, 32)[None, :]
    out_word = col_block * 32 + tl.arange(0, 32)[:, None]
    store_quads(out_ptr, out_quad, out_word, out_words, (out_quad < out_words) & (out_word < in_words), o0, o1, o2, o3)
    column = col_block * 128 + tl.arange(0, 128)
    scale = (tl.zeros_like(column) + target << 23).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + block.to(tl.int64) * cols + column, scale, mask=column < cols)


def scaling_aware_transpose(q: ScaledTensor, block_expert: torch.Tensor | None = None) -> GroupedTensor:
    """Kernel twin of `reference.grouped.scaling_aware_transpose`: payload [cols, rows], scale [ceil(rows / 128), cols].

    q: [rows, cols] tile, row (with tile_exponent) or micro (no global scale); rows and cols multiples of 4. block_expert: int32 [rows / 128] on the device,
    -1 = unused: neither payload nor scale of such a block is written. Where a scale is not a power of two the values become NaN (the reference raises).
    """
    check_payload(q)
    check_not_empty(q.payload, "payload")
    check_tile_transpose(q, block_expert)
    rows, cols = q.payload.shape
    for name, value in (("rows", rows), ("cols", cols)):
        if value % 4:
            raise ValueError(f"{name}={value} must be a multiple of 4 (of 16 for the products); pad with zeros")
    blocks = cdiv(rows, 128)
    payload = common.empty((cols, rows // 4), torch.int32, q.device)
    scale = common.empty((blocks, cols), torch.float32, q.device)
    words = q.payload.view(torch.int32)
    exponent = q.tile_exponent if q.granularity == "row" else q.scale  # read only where there is one scale per row
    used = words if block_expert is None else block_expert
    arguments = (words, payload, scale, q.scale, exponent, used, rows, cols)
    constants = source_constants(q.granularity, q.payload.dtype)
    launch(_tile_transpose_kernel, (blocks * tiles_of(cols),), *arguments, **constants, BLOCKS=block_expert is not None, num_warps=4)
    return GroupedTensor(payload.view(q.payload.dtype), scale)
