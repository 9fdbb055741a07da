"""Counting in words of four FP8 values: all four at once, in integer arithmetic.

Without its sign an FP8 code is an integer of seven bits that grows with the value. Adding ``0x7F - limit`` to it sets the eighth bit exactly where the code is
above ``limit``, and no byte carries into the next. A dot product of bytes then adds up the eighth bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED, decode, encode, pow2

_COUNT = "{ .reg .b32 t; and.b32 t, $1, 0x80808080; dp4a.u32.u32 $0, t, 0x01010101, $2; }"
_LARGEST = "max.u16x2 $0, $1, $2;"
_UNPACK_E4M3 = """{
.reg .b16 l, h; .reg .b32 a, b;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h;
mov.b32 {l, h}, a; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;
mov.b32 {l, h}, b; cvt.f32.f16 $2, l; cvt.f32.f16 $3, h;
}"""
_UNPACK_E5M2 = _UNPACK_E4M3.replace("e4m3x2", "e5m2x2")
COUNT, LARGEST = tl.constexpr(_COUNT), tl.constexpr(_LARGEST)
UNPACK_E4M3, UNPACK_E5M2 = tl.constexpr(_UNPACK_E4M3), tl.constexpr(_UNPACK_E5M2)
EACH = tl.constexpr(128)
"""What one value adds to a count."""


@triton.jit
def unpack_4(word, E5M2: tl.constexpr):
    """The four FP8 values of each word (int32) as fp32, lowest byte first. Codes for NaN and Inf give one of the two."""
    if INTERPRETED:
        v0, v1 = decode((word & 0xFF).to(tl.uint8), E5M2), decode(((word >> 8) & 0xFF).to(tl.uint8), E5M2)
        return v0, v1, decode(((word >> 16) & 0xFF).to(tl.uint8), E5M2), decode(((word >> 24) & 0xFF).to(tl.uint8), E5M2)
    elif E5M2:
        return tl.inline_asm_elementwise(UNPACK_E5M2, "=f,=f,=f,=f,r", [word], dtype=(tl.float32,) * 4, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(UNPACK_E4M3, "=f,=f,=f,=f,r", [word], dtype=(tl.float32,) * 4, is_pure=True, pack=1)


@triton.jit
def count_bytes(word, count):
    """``count`` plus `EACH` for every byte of ``word`` whose highest bit is set (int32 each)."""
    if INTERPRETED:
        return count + EACH * (((word >> 7) & 1) + ((word >> 15) & 1) + ((word >> 23) & 1) + ((word >> 31) & 1))
    else:
        return tl.inline_asm_elementwise(COUNT, "=r,r,r", [word, count], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def largest_halves(a, b):
    """Maximum of each half of two non-negative words."""
    if INTERPRETED:
        return (tl.maximum(a >> 16, b >> 16) << 16) | tl.maximum(a & 0xFFFF, b & 0xFFFF)
    else:
        return tl.inline_asm_elementwise(LARGEST, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def above_lost(shift, E5M2: tl.constexpr):
    """What to add to a word of codes without signs, so that `count_bytes` counts values that 2**shift does not turn into zero (int32)."""
    limit = -17 - shift if E5M2 else -10 - shift  # half of the smallest subnormal rounds to even zero
    code = encode(pow2(tl.minimum(tl.maximum(limit, -126), 127)), E5M2).to(tl.int32)
    return 0x7F7F7F7F - code * 0x01010101
