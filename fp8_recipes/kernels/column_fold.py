"""`fold_transpose(to="column")`: every column under the smallest scale that holds its own largest value, for one payload or for each expert of a grouped one.

The exponents of the tiles, which `fold_transpose` and `grouped_transpose` take their targets from, know only the largest of 128 columns. So the payload is
read twice, three bytes moved per value instead of two:

    1. per 128 rows, the exponent that each column needs      payload [rows, cols] -> needed uint8 [rows / 128, cols]
    2. per expert, the largest of them                        -> scale fp32 [experts, cols]
    3. shift and transpose under these scales                 -> payload [cols, rows]

Four columns of one word have four targets here: the values are shifted one by one, in fp32, not as a word.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..tensor import TILE, ScaledTensor
from . import common
from .common import INTERPRETED, cdiv, decode, finite_or_nan, pow2, scale_byte, scale_bytes, source_constants, tiles_of
from .launch import launch
from .words import load_quads, pack_4, store_quads, transpose_4x4

BLOCKS = 32
"""Blocks of 128 rows that a program of the second kernel reads at a time."""

_UNPACK_E4M3 = """{
.reg .b16 l, h, p, q; .reg .b32 a, b;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h;
mov.b32 {p, q}, a; cvt.f32.f16 $0, p; cvt.f32.f16 $1, q;
mov.b32 {p, q}, b; cvt.f32.f16 $2, p; cvt.f32.f16 $3, q;
}"""
UNPACK_E4M3 = tl.constexpr(_UNPACK_E4M3)
UNPACK_E5M2 = tl.constexpr(_UNPACK_E4M3.replace("e4m3x2", "e5m2x2"))


@triton.jit
def _unpack_4(word, E5M2: tl.constexpr):
    """The four FP8 values of a word in fp32, lowest byte first; NaN and Inf codes are NaN."""
    if INTERPRETED:
        return (
            decode((word & 0xFF).to(tl.uint8), E5M2),
            decode(((word >> 8) & 0xFF).to(tl.uint8), E5M2),
            decode(((word >> 16) & 0xFF).to(tl.uint8), E5M2),
            decode(((word >> 24) & 0xFF).to(tl.uint8), E5M2),
        )
    elif E5M2:
        a, b, c, d = tl.inline_asm_elementwise(
            UNPACK_E5M2, "=f,=f,=f,=f,r", [word], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
        )
        return finite_or_nan(a), finite_or_nan(b), finite_or_nan(c), finite_or_nan(d)
    else:
        return tl.inline_asm_elementwise(UNPACK_E4M3, "=f,=f,=f,=f,r", [word], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def _eighths(value, byte):
    """Eight times the exponent of |value| * 2**(byte - 127), with the three bits of its mantissa below: larger for larger magnitudes, 0 for what does not count
    (zero, NaN, a bad scale). In int32 nothing overflows, whatever the scale."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    counts = (bits != 0) & (bits < 0x7F800000) & (byte != 255)
    return tl.where(counts, (bits >> 20) + 8 * byte, 0)


@triton.jit
def _largest(w0, w1, w2, w3, s0, s1, s2, s3):
    """Of one column in four rows each: values [quads, words] and the bytes of their scales -> the largest `_eighths` [words]."""
    here = tl.maximum(tl.maximum(_eighths(w0, s0), _eighths(w1, s1)), tl.maximum(_eighths(w2, s2), _eighths(w3, s3)))
    return tl.max(here, axis=0)


@triton.jit
def _needed_byte(eighths, E5M2: tl.constexpr):
    """E8M0 byte of the smallest scale that holds a value of so many eighths, in [1, 254]. The largest value of a format is 1.75 * 2**max_exponent, so seven
    eighths carry."""
    max_exponent: tl.constexpr = 15 if E5M2 else 8
    return tl.minimum(tl.maximum(((eighths + 1) >> 3) - 127 - max_exponent, 1), 254)


@triton.jit
def _needed_kernel(payload_ptr, needed_ptr, source_ptr, block_expert_ptr, rows, cols, GROUP: tl.constexpr, E5M2: tl.constexpr):
    """payload words [rows, cols / 4] -> needed uint8 [ceil(rows / 128), cols]. One program: 128 rows x 128 columns. block_expert_ptr: None, or -1 = unused."""
    col_blocks = (cols + 127) // 128
    block = tl.program_id(0) // col_blocks
    col_block = tl.program_id(0) % col_blocks
    expert = 0
    if block_expert_ptr is not None:
        expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    quad = block * 32 + tl.arange(0, 32)[:, None]
    word = col_block * 32 + tl.arange(0, 32)[None, :]
    w0, w1, w2, w3 = load_quads(payload_ptr, quad, word, cols // 4, (quad < rows // 4) & (word < cols // 4))
    s0 = scale_byte(source_ptr, quad * 4, word * 4, rows, cols, GROUP)
    s1 = scale_byte(source_ptr, quad * 4 + 1, word * 4, rows, cols, GROUP)
    s2 = scale_byte(source_ptr, quad * 4 + 2, word * 4, rows, cols, GROUP)
    s3 = scale_byte(source_ptr, quad * 4 + 3, word * 4, rows, cols, GROUP)
    a0, b0, c0, d0 = _unpack_4(w0, E5M2)
    a1, b1, c1, d1 = _unpack_4(w1, E5M2)
    a2, b2, c2, d2 = _unpack_4(w2, E5M2)
    a3, b3, c3, d3 = _unpack_4(w3, E5M2)
    a = _needed_byte(_largest(a0, a1, a2, a3, s0, s1, s2, s3), E5M2)
    b = _needed_byte(_largest(b0, b1, b2, b3, s0, s1, s2, s3), E5M2)
    c = _needed_byte(_largest(c0, c1, c2, c3, s0, s1, s2, s3), E5M2)
    d = _needed_byte(_largest(d0, d1, d2, d3, s0, s1, s2, s3), E5M2)
    words = col_block * 32 + tl.arange(0, 32)
    packed = a | (b << 8) | (c << 16) | (d << 24)
    tl.store(needed_ptr + block.to(tl.int64) * (cols // 4) + words, packed, mask=words < cols // 4)


@triton.jit
def _scale_kernel(needed_ptr, scale_ptr, offsets_ptr, blocks, cols, BLOCKS: tl.constexpr):
    """needed uint8 [blocks, cols] -> scale fp32 [experts, cols], the largest over each expert's blocks; 2**-126 where it has none. offsets_ptr None: one
    expert with all blocks."""
    column = tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
    expert = tl.program_id(1)
    first, beyond = 0, blocks
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + expert) // 128
        beyond = tl.load(offsets_ptr + expert + 1) // 128
    best = tl.full((BLOCKS, 128), 1, tl.int32)
    for start in range(first, beyond, BLOCKS):
        block = start + tl.arange(0, BLOCKS)[:, None]
        needed = tl.load(needed_ptr + block.to(tl.int64) * cols + column, mask=(block < beyond) & (column < cols), other=1)
        best = tl.maximum(best, needed.to(tl.int32))
    columns = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(scale_ptr + expert.to(tl.int64) * cols + columns, (tl.max(best, axis=0) << 23).to(tl.float32, bitcast=True), mask=columns < cols)


@triton.jit
def _target_bytes(scale_ptr, column, cols):
    """E8M0 bytes of the scales of these columns; int32."""
    return tl.load(scale_ptr + column, mask=column < cols, other=1.0).to(tl.int32, bitcast=True) >> 23


@triton.jit
def _shift(value, byte, target):
    """value * 2**(byte - target), exactly unless the result is far below FP8's range; a factor beyond fp32's largest can meet nothing but a zero."""
    return value * pow2(tl.minimum(tl.maximum(byte - target, -126), 127))


@triton.jit
def _shift_columns(word, byte, ta, tb, tc, td, E5M2: tl.constexpr):
    """The four values of a word, under the scale of one E8M0 byte, as they are under four others'. NaN where the scale is bad."""
    a, b, c, d = _unpack_4(word, E5M2)
    shifted = pack_4(_shift(a, byte, ta), _shift(b, byte, tb), _shift(c, byte, tc), _shift(d, byte, td), E5M2)
    return tl.where(byte == 255, 0x7F7F7F7F, shifted)


@triton.jit
def _fold_columns_kernel(
    payload_ptr,
    out_ptr,
    scale_ptr,  # [experts, cols] fp32, the targets
    source_ptr,
    block_expert_ptr,  # None: one expert
    rows,
    cols,
    GROUP: tl.constexpr,
    E5M2: tl.constexpr,
):
    """One program: 128 rows x 128 columns. payload and out are int32 words; rows and cols are multiples of 4."""
    col_blocks = (cols + 127) // 128
    block = tl.program_id(0) // col_blocks
    col_block = tl.program_id(0) % col_blocks
    if block_expert_ptr is not None:
        expert = tl.load(block_expert_ptr + block)
        if expert < 0:
            return
        scale_ptr += expert.to(tl.int64) * cols
    quad = block * 32 + tl.arange(0, 32)[:, None]  # four rows, one word of the result
    word = col_block * 32 + tl.arange(0, 32)[None, :]  # four columns, one word of the payload
    in_words = cols // 4
    out_words = rows // 4
    w0, w1, w2, w3 = load_quads(payload_ptr, quad, word, in_words, (quad < out_words) & (word < in_words))
    ta = _target_bytes(scale_ptr, word * 4, cols)
    tb = _target_bytes(scale_ptr, word * 4 + 1, cols)
    tc = _target_bytes(scale_ptr, word * 4 + 2, cols)
    td = _target_bytes(scale_ptr, word * 4 + 3, cols)
    w0 = _shift_columns(w0, scale_byte(source_ptr, quad * 4, word * 4, rows, cols, GROUP), ta, tb, tc, td, E5M2)
    w1 = _shift_columns(w1, scale_byte(source_ptr, quad * 4 + 1, word * 4, rows, cols, GROUP), ta, tb, tc, td, E5M2)
    w2 = _shift_columns(w2, scale_byte(source_ptr, quad * 4 + 2, word * 4, rows, cols, GROUP), ta, tb, tc, td, E5M2)
    w3 = _shift_columns(w3, scale_byte(source_ptr, quad * 4 + 3, word * 4, rows, cols, GROUP), ta, tb, tc, td, E5M2)
    o0, o1, o2, o3 = transpose_4x4(w0, w1, w2, w3)
    out_quad = block * 32 + tl.arange(0, 32)[None, :]
    out_word = col_block * 32 + tl.arange(0, 32)[:, None]
    store_quads(out_ptr, out_quad, out_word, out_words, (out_quad < out_words) & (out_word < in_words), o0, o1, o2, o3)


def fold_columns(q: ScaledTensor, offsets: torch.Tensor | None = None, block_expert: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(payload [cols, rows], scale fp32 [experts, cols]) of ``q`` [rows, cols], whose arguments `fold_transpose` or `grouped_fold_transpose` have checked.

    offsets, block_expert: of a grouped buffer; without them all rows are one expert's.
    """
    rows, cols = q.payload.shape
    if rows % 4 or cols % 4:
        raise ValueError(f"a payload of {rows} x {cols} cannot be folded to its columns; rows and columns must be multiples of 4 (of 16 for the products)")
    experts = 1 if offsets is None else offsets.shape[0] - 1
    blocks, count = cdiv(rows, TILE), tiles_of(cols)
    words = q.payload.view(torch.int32)
    source = q.scale if q.granularity == "row" else scale_bytes(q)
    constants: dict[str, Any] = source_constants(q.granularity, q.payload.dtype)
    needed = common.empty((blocks, cols // 4), torch.int32, q.device)
    launch(_needed_kernel, (blocks * count,), words, needed, source, block_expert, rows, cols, **constants, num_warps=4)
    scale = common.empty((experts, cols), torch.float32, q.device)
    launch(_scale_kernel, (count, experts), needed.view(torch.uint8), scale, offsets, blocks, cols, BLOCKS=BLOCKS, num_warps=4)
    payload = common.empty((cols, rows // 4), torch.int32, q.device)
    launch(_fold_columns_kernel, (blocks * count,), words, payload, scale, source, block_expert, rows, cols, **constants, num_warps=4)
    return payload.view(q.payload.dtype), scale
