"""Four FP8 values in a 32-bit word: rounding, exponent shifts and the 4 x 4 byte transpose, by the packed instructions of sm_89 and later.

A shift converts two values at a time to f16 (exact), multiplies by powers of two and converts back (one rounding to nearest even, saturating, NaN kept). f16
holds every intermediate that can still be non-zero at the end; products that f16 rounds are below half of the smallest FP8 subnormal after the shift.
Under Triton's interpreter the same results come from integer arithmetic, byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED, decode, encode, finite_or_nan, pow2

_SHIFT_E4M3 = """{
.reg .b16 l, h; .reg .b32 a, b;
mov.b32 {l, h}, $1;
cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h;
mul.rn.f16x2 a, a, $2; mul.rn.f16x2 b, b, $2;
mul.rn.f16x2 a, a, $3; mul.rn.f16x2 b, b, $3;
cvt.rn.satfinite.e4m3x2.f16x2 l, a; cvt.rn.satfinite.e4m3x2.f16x2 h, b;
mov.b32 $0, {l, h};
}"""
# E5M2 spans more than two f16 powers can (2**31 upwards), and has Inf codes, which must become NaN: x + x * 0 first, and a third factor.
_SHIFT_E5M2 = """{
.reg .b16 l, h; .reg .b32 a, b, z;
mov.b32 {l, h}, $1; mov.b32 z, 0;
cvt.rn.f16x2.e5m2x2 a, l; cvt.rn.f16x2.e5m2x2 b, h;
fma.rn.f16x2 a, a, z, a; fma.rn.f16x2 b, b, z, b;
mul.rn.f16x2 a, a, $2; mul.rn.f16x2 b, b, $2;
mul.rn.f16x2 a, a, $3; mul.rn.f16x2 b, b, $3;
mul.rn.f16x2 a, a, $4; mul.rn.f16x2 b, b, $4;
cvt.rn.satfinite.e5m2x2.f16x2 l, a; cvt.rn.satfinite.e5m2x2.f16x2 h, b;
mov.b32 $0, {l, h};
}"""
_SHIFT_DOWN_E4M3 = """{
.reg .b16 l, h; .reg .b32 a, b, f;
mov.b32 {l, h}, $1; cvt.rn.f16x2.f32 f, $2, $2;
cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h;
mul.rn.f16x2 a, a, f; mul.rn.f16x2 b, b, f;
cvt.rn.satfinite.e4m3x2.f16x2 l, a; cvt.rn.satfinite.e4m3x2.f16x2 h, b;
mov.b32 $0, {l, h};
}"""
# From the exponent, not from two factors: with two more operands the compiler moves the words to the factors' layout instead of the other way round.
_SHIFT_DOWN_E5M2 = """{
.reg .b16 l, h; .reg .b32 a, b, f, g; .reg .s32 p, q; .reg .f32 u, v;
max.s32 p, $2, -17; sub.s32 q, $2, p; max.s32 q, q, -17;
shl.b32 p, p, 23; add.s32 p, p, 0x3F800000; shl.b32 q, q, 23; add.s32 q, q, 0x3F800000;
mov.b32 u, p; mov.b32 v, q; cvt.rn.f16x2.f32 f, u, u; cvt.rn.f16x2.f32 g, v, v;
mov.b32 {l, h}, $1;
cvt.rn.f16x2.e5m2x2 a, l; cvt.rn.f16x2.e5m2x2 b, h;
mul.rn.f16x2 a, a, f; mul.rn.f16x2 b, b, f;
mul.rn.f16x2 a, a, g; mul.rn.f16x2 b, b, g;
cvt.rn.satfinite.e5m2x2.f16x2 l, a; cvt.rn.satfinite.e5m2x2.f16x2 h, b;
mov.b32 $0, {l, h};
}"""
_TRANSPOSE_4X4 = """{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140;
prmt.b32 c, $4, $5, 0x7362; prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;
prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632;
}"""
_PACK_E4M3 = """{
.reg .b16 l, h;
cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;
mov.b32 $0, {l, h};
}"""
_PACK_E5M2 = _PACK_E4M3.replace("e4m3x2", "e5m2x2")
SHIFT_E4M3 = tl.constexpr(_SHIFT_E4M3)
SHIFT_E5M2 = tl.constexpr(_SHIFT_E5M2)
SHIFT_DOWN_E4M3 = tl.constexpr(_SHIFT_DOWN_E4M3)
SHIFT_DOWN_E5M2 = tl.constexpr(_SHIFT_DOWN_E5M2)
TRANSPOSE_4X4 = tl.constexpr(_TRANSPOSE_4X4)
PACK_E4M3 = tl.constexpr(_PACK_E4M3)
PACK_E5M2 = tl.constexpr(_PACK_E5M2)


@triton.jit
def _f16_pair(exponent):
    """2**exponent as f16, twice in one word; exponent in [-24, 15]. Exponent 255: NaN."""
    factor = tl.where(exponent == 255, float("nan"), pow2(exponent))
    bits = factor.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _shift_portable(word, shift, E5M2: tl.constexpr):
    """Four FP8 bytes in a word times 2**shift (NaN where shift is 255), byte by byte."""
    factor = tl.where(shift == 255, float("nan"), pow2(tl.minimum(tl.maximum(shift, -126), 127)))
    out = tl.zeros_like(word)
    for i in tl.static_range(4):
        value = decode(((word >> (8 * i)) & 0xFF).to(tl.uint8), E5M2) * factor
        out |= encode(finite_or_nan(value), E5M2).to(tl.int32) << (8 * i)
    return out


@triton.jit
def shift_words(word, shift, E5M2: tl.constexpr):
    """Words of four FP8 values times 2**shift, nearest even, saturating; NaN where shift is 255. shift: int32, broadcastable to word."""
    if INTERPRETED:
        return _shift_portable(word, shift, E5M2)
    elif E5M2:
        k = tl.minimum(tl.maximum(shift, -34), 40)
        first = tl.minimum(tl.maximum(k, -17), 15)
        second = tl.minimum(tl.maximum(k - first, -17), 15)
        f = _f16_pair(tl.where(shift == 255, 255, first))
        g = _f16_pair(second)
        h = _f16_pair(k - first - second)
        return tl.inline_asm_elementwise(SHIFT_E5M2, "=r,r,r,r,r", [word, f, g, h], dtype=tl.int32, is_pure=True, pack=1)
    else:
        k = tl.minimum(tl.maximum(shift, -24), 24)
        f = _f16_pair(tl.where(shift == 255, 255, k >> 1))
        g = _f16_pair(k - (k >> 1))
        return tl.inline_asm_elementwise(SHIFT_E4M3, "=r,r,r,r", [word, f, g], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def shift_words_down(word, shift, E5M2: tl.constexpr):
    """Words of four finite or NaN FP8 values times 2**shift, shift <= 0, nearest even: `shift_words` with as few factors as downward shifts need."""
    if INTERPRETED:
        return _shift_portable(word, shift, E5M2)
    elif E5M2:  # everything is flushed at 2**-33; a factor of 2**-17 at most keeps the first product above f16's smallest subnormal
        return tl.inline_asm_elementwise(SHIFT_DOWN_E5M2, "=r,r,r", [word, shift], dtype=tl.int32, is_pure=True, pack=1)
    else:  # 2**-24, the smallest f16, flushes everything
        return tl.inline_asm_elementwise(SHIFT_DOWN_E4M3, "=r,r,f", [word, pow2(tl.maximum(shift, -24))], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def transpose_4x4(a, b, c, d):
    """Byte i of word j goes to byte j of word i."""
    if INTERPRETED:
        o0 = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)
        o1 = ((a >> 8) & 0xFF) | (b & 0xFF00) | ((c & 0xFF00) << 8) | ((d & 0xFF00) << 16)
        o2 = ((a >> 16) & 0xFF) | ((b >> 8) & 0xFF00) | (c & 0xFF0000) | ((d & 0xFF0000) << 8)
        o3 = ((a >> 24) & 0xFF) | ((b >> 16) & 0xFF00) | ((c >> 8) & 0xFF0000) | (d & -0x1000000)
        return o0, o1, o2, o3
    else:
        return tl.inline_asm_elementwise(
            TRANSPOSE_4X4, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def load_quads(payload_ptr, quad, word, in_words, mask):
    """Of four rows each, one word of four columns: four int32 tensors [quads, words]. quad: [quads, 1] groups of four rows, word: [1, words]."""
    source = payload_ptr + quad.to(tl.int64) * 4 * in_words + word
    w0 = tl.load(source, mask=mask, other=0)
    w1 = tl.load(source + in_words, mask=mask, other=0)
    w2 = tl.load(source + 2 * in_words, mask=mask, other=0)
    w3 = tl.load(source + 3 * in_words, mask=mask, other=0)
    return w0, w1, w2, w3


@triton.jit
def store_quads(out_ptr, out_quad, out_word, out_words, mask, o0, o1, o2, o3):
    """What `transpose_4x4` made of what `load_quads` loaded, four tensors [quads, words], into the transpose, whose rows are ``out_words`` words long.
    out_quad: [1, quads] words of its rows, out_word: [words, 1] groups of four of its rows, mask: of both."""
    out = out_ptr + out_word.to(tl.int64) * 4 * out_words + out_quad
    tl.store(out, tl.trans(o0), mask=mask)
    tl.store(out + out_words, tl.trans(o1), mask=mask)
    tl.store(out + 2 * out_words, tl.trans(o2), mask=mask)
    tl.store(out + 3 * out_words, tl.trans(o3), mask=mask)


@triton.jit
def pack_4(a, b, c, d, E5M2: tl.constexpr):
    """Four fp32 values rounded to FP8 in one word, a in the lowest byte."""
    if INTERPRETED:
        low = encode(a, E5M2).to(tl.int32) | (encode(b, E5M2).to(tl.int32) << 8)
        return low | (encode(c, E5M2).to(tl.int32) << 16) | (encode(d, E5M2).to(tl.int32) << 24)
    elif E5M2:
        return tl.inline_asm_elementwise(PACK_E5M2, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(PACK_E4M3, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pack_row(v, E5M2: tl.constexpr):
    """fp32 [TILES, 4, 32] rounded to FP8: words int32 [TILES, 4, 8] of four neighbours."""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], 4, 8, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return pack_4(v0, v1, v2, v3, E5M2)


@triton.jit
def bytes_of(word):
    """int32 [TILES, 4, 8] -> uint8 [TILES, 4, 32], lowest byte first: the inverse of `pack_row`'s grouping."""
    even = tl.join(word.to(tl.uint8), (word >> 16).to(tl.uint8))
    odd = tl.join((word >> 8).to(tl.uint8), (word >> 24).to(tl.uint8))
    return tl.reshape(tl.join(even, odd), (word.shape[0], 4, 32))
