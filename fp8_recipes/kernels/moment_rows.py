"""Sums and counts of a few rows at a time, one row to a warp: what `moments` adds up.

Everything is elementwise until the end of a row, so a thread has nothing to wait for but its loads. CAREFUL is the second reading of rows with NaN, Inf or
values above what their scale can hold; see `moments`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import decode, pow2, to_fp32
from .word_counts import EACH, above_lost, count_bytes, largest_halves, unpack_4

_BLOCK = tl.constexpr(256)
"""Columns of a tensor that a warp takes at a time: eight a thread, 16 bytes of bf16."""
_TILES = tl.constexpr(4)
"""The same of a payload: four tiles, 16 bytes a thread."""
_LOW, _HIGH = tl.constexpr(2.0**-20), tl.constexpr(2.0**24)
"""Largest values of a row between which sums of x^4 keep fp32's accuracy over 65536 columns."""


class _Values(NamedTuple):
    """Sums over values, elementwise: squares and fourth powers relative to the row's power of two, largest |x|; and counts."""

    s2: Any
    s4: Any
    largest: Any
    nonfinite: Any
    nonzero: Any
    small: Any
    above: Any


class _Codes(NamedTuple):
    """Sums over words of a payload: of squares and fourth powers of the values, largest codes (odd bytes, even bytes), and counts (times `EACH`)."""

    s2: Any
    s4: Any
    odd: Any
    even: Any
    nonfinite: Any
    nonzero: Any
    kept: Any


@triton.jit
def bits_exponent(v):
    """Exponent field of a positive fp32 number."""
    return (v.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def exponent_of(v):
    """`bits_exponent`, at least -126 and at most 126 so that the inverse is normal too."""
    return tl.minimum(tl.maximum(bits_exponent(v), -126), 126)


@triton.jit
def _halves(v):
    """Every other column and the rest: neighbours are in one thread, so this moves nothing. Sums over halves take half of the registers."""
    return tl.split(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)))


@triton.jit
def _add_values(sums, x, unit, lost_at, above_at, COUNT: tl.constexpr, SCALE: tl.constexpr, CAREFUL: tl.constexpr):
    a, b = _halves(to_fp32(x))
    sums = _add_half(sums, a, unit, lost_at, above_at, COUNT, SCALE, CAREFUL)
    return _add_half(sums, b, unit, lost_at, above_at, COUNT, SCALE, CAREFUL)


@triton.jit
def _add_half(sums, v, unit, lost_at, above_at, COUNT: tl.constexpr, SCALE: tl.constexpr, CAREFUL: tl.constexpr):
    """COUNT: values that are not zero, and (CAREFUL) those that are cut off. SCALE: values that are or become zero. CAREFUL: leave out and count NaN and Inf.
    Counts are fp32, exact here, because a comparison gives 0.0 or 1.0 in one instruction."""
    s2, s4, largest, nonfinite, nonzero, small, above = sums
    if CAREFUL:
        finite = tl.abs(v) < float("inf")
        nonfinite += tl.where(finite, 0.0, 1.0)
        v = tl.where(finite, v, 0.0)
    t = v * unit
    square = t * t
    s2 += square
    s4 += square * square
    largest = tl.maximum(largest, tl.abs(v))
    if COUNT:
        nonzero += tl.where(v != 0.0, 1.0, 0.0)
    if SCALE:
        small += tl.where(tl.abs(v) <= lost_at, 1.0, 0.0)
    if CAREFUL and COUNT:
        above += tl.where(tl.abs(v) > above_at, 1.0, 0.0)
    return _Values(s2, s4, largest, nonfinite, nonzero, small, above)


@triton.jit
def _values(x_ptr, row, cols, unit, lost_at, above_at, COUNT: tl.constexpr, SCALE: tl.constexpr, CAREFUL: tl.constexpr):
    """`_Values` of rows of x, reduced to one number a row, ``small`` without the zeros. row: int64 [ROWS]; unit, lost_at, above_at: fp32 [ROWS]."""
    unit, lost_at, above_at = unit[:, None], lost_at[:, None], above_at[:, None]
    number = tl.zeros((row.shape[0], _BLOCK // 2), tl.float32)
    sums = _Values(number, number, number, number, number, number, number)
    column = tl.arange(0, _BLOCK)[None, :]
    source = x_ptr + row[:, None] * cols + column
    whole = 0 if CAREFUL else cols // (4 * _BLOCK) * (4 * _BLOCK)
    for first in range(0, whole, 4 * _BLOCK):
        pieces = [tl.load(source + (first + piece * _BLOCK)) for piece in (0, 1, 2, 3)]  # all on their way before the first is waited for
        for piece in tl.static_range(4):
            sums = _add_values(sums, pieces[piece], unit, lost_at, above_at, COUNT, SCALE, CAREFUL)
    for first in range(whole, cols, _BLOCK):
        x = tl.load(source + first, mask=column < cols - first, other=0.0)
        sums = _add_values(sums, x, unit, lost_at, above_at, COUNT, SCALE, CAREFUL)
    s2, s4, largest, nonfinite, nonzero, small, above = sums
    nonzero = tl.sum(nonzero, axis=1).to(tl.int32)
    beyond = (_BLOCK - cols % _BLOCK) % _BLOCK  # zeros that the last load made up
    lost = tl.sum(small, axis=1).to(tl.int32) + nonzero - cols - beyond
    counts = (tl.sum(nonfinite, axis=1).to(tl.int32), nonzero, lost, tl.sum(above, axis=1).to(tl.int32))
    return _Values(tl.sum(s2, axis=1), tl.sum(s4, axis=1), tl.max(largest, axis=1), counts[0], counts[1], counts[2], counts[3])


@triton.jit
def _add_square(s2, s4, v):
    square = v * v
    return s2 + square, s4 + square * square


@triton.jit
def _add_words(sums, word, kept_from, MOMENTS: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr, CAREFUL: tl.constexpr):
    a, b = _halves(word)
    sums = _add_half_words(sums, a, kept_from, MOMENTS, FOLD, E5M2, CAREFUL)
    return _add_half_words(sums, b, kept_from, MOMENTS, FOLD, E5M2, CAREFUL)


@triton.jit
def _add_half_words(sums, word, kept_from, MOMENTS: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr, CAREFUL: tl.constexpr):
    """MOMENTS: sums, maxima and NaN, not only counts. FOLD: what codes become non-zero again after a fold (`above_lost`)."""
    s2, s4, odd, even, nonfinite, nonzero, kept = sums
    code = word & 0x7F7F7F7F
    nonzero = count_bytes(code + 0x7F7F7F7F, nonzero)
    if FOLD:
        kept = count_bytes(code + kept_from, kept)
    if MOMENTS:
        if CAREFUL:
            flag = (code + (0x04040404 if E5M2 else 0x01010101)) & -0x7F7F7F80  # the highest bit of bytes above 0x7B, 0x7E
            nonfinite = count_bytes(flag, nonfinite)
            code &= ~(flag - ((flag >> 7) & 0x01010101))
        a, b, c, d = unpack_4(code, E5M2)
        s2, s4 = _add_square(s2, s4, a)
        s2, s4 = _add_square(s2, s4, b)
        s2, s4 = _add_square(s2, s4, c)
        s2, s4 = _add_square(s2, s4, d)
        odd = largest_halves(odd, code)
        even = largest_halves(even, code << 8)
    return _Codes(s2, s4, odd, even, nonfinite, nonzero, kept)


@triton.jit
def _kept_from(target_ptr, tile, tiles, row_exponent, FOLD: tl.constexpr, E5M2: tl.constexpr):
    """`above_lost` of the shift from a row's exponent to a tile's target, for every other word of the tiles: [ROWS, tiles * 16]. tile: [tiles]."""
    if FOLD:
        target = tl.load(target_ptr + tile, mask=tile < tiles, other=127) - 127
        kept_from = above_lost(row_exponent[:, None] - target[None, :], E5M2)[:, :, None]
        return tl.reshape(tl.broadcast_to(kept_from, (row_exponent.shape[0], tile.shape[0], 16)), (row_exponent.shape[0], tile.shape[0] * 16))
    else:
        return 0


@triton.jit
def _codes(payload_ptr, target_ptr, row, cols, row_exponent, MOMENTS: tl.constexpr, FOLD: tl.constexpr, E5M2: tl.constexpr, CAREFUL: tl.constexpr):
    """`_Codes` of rows of a payload, reduced to one number a row: largest code in ``odd``, 0 in ``even``; counts in values."""
    number = tl.zeros((row.shape[0], _TILES * 16), tl.float32)
    none = tl.zeros((row.shape[0], _TILES * 16), tl.int32)
    sums = _Codes(number, number, none, none, none, none, none)
    tile = tl.arange(0, _TILES)
    word = tl.arange(0, _TILES * 32)[None, :]
    words, tiles = cols // 4, (cols + 127) // 128
    source = payload_ptr + row[:, None] * words + word
    whole = 0 if CAREFUL else cols // (512 * _TILES) * (4 * _TILES)
    for first in range(0, whole, 4 * _TILES):
        pieces = [tl.load(source + (first + piece * _TILES) * 32) for piece in (0, 1, 2, 3)]
        for piece in tl.static_range(4):
            kept_from = _kept_from(target_ptr, tile + (first + piece * _TILES), tiles, row_exponent, FOLD, E5M2)
            sums = _add_words(sums, pieces[piece], kept_from, MOMENTS, FOLD, E5M2, CAREFUL)
    for first in range(whole, tiles, _TILES):
        piece = tl.load(source + first * 32, mask=word < words - first * 32, other=0)
        sums = _add_words(sums, piece, _kept_from(target_ptr, tile + first, tiles, row_exponent, FOLD, E5M2), MOMENTS, FOLD, E5M2, CAREFUL)
    s2, s4, odd, even, nonfinite, nonzero, kept = sums
    code = tl.maximum(tl.maximum(odd >> 24, (odd >> 8) & 0xFF), tl.maximum(even >> 24, (even >> 8) & 0xFF))
    largest = tl.max(code, axis=1)
    counts = (tl.sum(nonfinite, axis=1) // EACH, tl.sum(nonzero, axis=1) // EACH, tl.sum(kept, axis=1) // EACH)
    return _Codes(tl.sum(s2, axis=1), tl.sum(s4, axis=1), largest, largest, counts[0], counts[1], counts[2])


class Row(NamedTuple):
    """One number a row. s2, s4: relative to the row's power of two, or to its scale where there is only a payload; largest: of |x|. codes: payloads
    that are not zero, with NaN; kept: of these, after the fold."""

    s2: Any
    s4: Any
    largest: Any
    nonfinite: Any
    nonzero: Any
    lost: Any
    above: Any
    codes: Any
    kept: Any


@triton.jit
def read_rows(
    x_ptr,
    payload_ptr,
    target_ptr,
    row,
    cols,
    exponent,
    scale,
    X: tl.constexpr,
    PAYLOAD: tl.constexpr,
    SCALE: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Everything about some rows, x relative to 2**exponent."""
    none = tl.zeros((row.shape[0],), tl.int32)
    codes, kept = none, none
    if PAYLOAD:
        c = _codes(payload_ptr, target_ptr, row, cols, bits_exponent(scale), not X, FOLD, E5M2, CAREFUL)
        codes, kept = c.nonzero, c.kept if FOLD else c.nonzero
    if X:
        lost_at = scale * (2.0**-17 if E5M2 else 2.0**-10)
        above_at = scale * (57344.0 if E5M2 else 448.0)
        v = _values(x_ptr, row, cols, pow2(-exponent), lost_at, above_at, SCALE, SCALE and not PAYLOAD, CAREFUL)
        return Row(v.s2, v.s4, v.largest, v.nonfinite, v.nonzero, v.small, v.above, codes, kept)
    else:
        return Row(c.s2, c.s4, decode(c.odd.to(tl.uint8), E5M2) * scale, c.nonfinite, none, none, none, codes, kept)


@triton.jit
def is_plain(r, exponent, scale, X: tl.constexpr, SCALE: tl.constexpr, E5M2: tl.constexpr):
    """Does a row's first reading stand? False for NaN and Inf."""
    plain = tl.abs(r.s2) < float("inf")
    if X:
        relative = r.largest * pow2(-exponent)
        plain = plain & ((r.largest == 0.0) | ((relative >= _LOW) & (relative <= _HIGH)))
        if SCALE:
            plain = plain & (r.largest <= scale * (57344.0 if E5M2 else 448.0))
    return plain
