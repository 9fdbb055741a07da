"""Formats against tables decoded by hand from the bit layout, and scales against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from fp8_recipes import formats
from fp8_recipes.formats import E4M3, E5M2, Format

BOTH = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)


def decode(code: int, fmt: Format) -> float:
    """Value of one FP8 byte from the field layout: sign, exponent (bias 2**(bits-1) - 1), mantissa."""
    mantissa = code & ((1 << fmt.mantissa_bits) - 1)
    exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    sign = -1.0 if code & 0x80 else 1.0
    if fmt is E4M3 and code & 0x7F == 0x7F:  # the only NaN of e4m3fn; it has no infinity
        return math.nan
    if fmt is E5M2 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    bias = (1 << (fmt.exponent_bits - 1)) - 1
    fraction = mantissa / (1 << fmt.mantissa_bits)
    return sign * (math.ldexp(fraction, 1 - bias) if exponent == 0 else math.ldexp(1 + fraction, exponent - bias))


def magnitudes(fmt: Format) -> torch.Tensor:
    """All finite non-negative values, ascending, float64; the index is the code."""
    values = [decode(code, fmt) for code in range(128)]
    return torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)


def nearest_even(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Brute force over the table: the nearest value; on a tie the one with the even code; beyond the table its last; NaN and Inf to NaN."""
    table = magnitudes(fmt)
    mag = x.double().abs()
    above = torch.searchsorted(table, mag.nan_to_num(0, 0)).clamp(1, len(table) - 1)
    below = above - 1
    up, down = table[above] - mag, mag - table[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    value = torch.copysign(table[code], x.double())
    return torch.where(torch.isfinite(x), value, torch.nan)


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


@BOTH
def test_torch_decodes_all_256_codes_as_the_layout_says(fmt: Format) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([decode(c, fmt) for c in range(256)])
    assert torch.equal(codes.view(fmt.dtype).float().nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


@BOTH
def test_limits_are_those_of_the_table(fmt: Format) -> None:
    table = magnitudes(fmt)
    assert fmt.max == table[-1] == 1.75 * 2.0**fmt.max_exponent
    assert fmt.min_subnormal == table[1]
    assert fmt.min_normal == table[1 << fmt.mantissa_bits]


def test_limits_in_numbers() -> None:
    assert (E4M3.max, E4M3.min_normal, E4M3.min_subnormal) == (448.0, 2.0**-6, 2.0**-9)
    assert (E5M2.max, E5M2.min_normal, E5M2.min_subnormal) == (57344.0, 2.0**-14, 2.0**-16)


@BOTH
def test_cast_rounds_every_bfloat16_number_to_nearest_even(fmt: Format) -> None:
    x = all_bfloat16()
    got, expected = formats.cast_saturating(x, fmt).float(), nearest_even(x, fmt).float()
    assert torch.equal(got.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(x)[~got.isnan()]), "the sign of a flushed value is kept"


@BOTH
def test_cast_at_and_one_fp32_step_around_every_tie(fmt: Format) -> None:
    table = magnitudes(fmt)
    ties = ((table[1:] + table[:-1]) / 2).float()
    infinity = torch.full_like(ties, math.inf)
    x = torch.cat((ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)))
    x = torch.cat((x, -x))
    assert torch.equal(formats.cast_saturating(x, fmt).float(), nearest_even(x, fmt).float())


@BOTH
def test_cast_saturates_and_keeps_non_finite_visible(fmt: Format) -> None:
    half_step = 2.0 ** (fmt.max_exponent - fmt.mantissa_bits - 1)
    x = torch.tensor([fmt.max, fmt.max + half_step, fmt.max + 2 * half_step, 3e38, -3e38])
    assert formats.cast_saturating(x, fmt).float().tolist() == [fmt.max] * 4 + [-fmt.max]
    assert formats.cast_saturating(torch.tensor([math.nan, math.inf, -math.inf]), fmt).float().isnan().all()


def test_464_would_be_rounded_up_to_nan_by_a_plain_cast() -> None:
    assert formats.cast_saturating(torch.tensor([464.0, 465.0, 1e4]), E4M3).float().tolist() == [448.0] * 3


def exact_scale_exponent(amax: float, fmt: Format) -> int:
    """Smallest e in [-126, 127] with amax <= max * 2**e, in rational arithmetic."""
    if amax == 0:
        return -126
    ratio = Fraction(amax) / Fraction(fmt.max)
    e = ratio.numerator.bit_length() - ratio.denominator.bit_length()  # ratio in (2**(e-1), 2**(e+1))
    e = next(c for c in (e - 1, e, e + 1) if ratio <= Fraction(2) ** c)
    return min(max(e, -126), 127)


@BOTH
def test_scale_of_every_bfloat16_magnitude_is_the_exact_smallest(fmt: Format) -> None:
    amax = torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    expected = [exact_scale_exponent(a, fmt) for a in amax.tolist()]
    assert formats.scale_exponent_from_amax(amax, fmt).tolist() == expected
    assert formats.scale_from_amax(amax, fmt).double().log2().tolist() == expected


@BOTH
def test_scale_one_fp32_step_around_every_boundary(fmt: Format) -> None:
    at = torch.tensor([fmt.max * 2.0**k for k in range(-110, 100)])
    above, below = torch.nextafter(at, at * 2), torch.nextafter(at, at / 2)
    exponent = torch.arange(-110, 100, dtype=torch.int32)
    assert torch.equal(formats.scale_exponent_from_amax(at, fmt), exponent)
    assert torch.equal(formats.scale_exponent_from_amax(below, fmt), exponent)
    assert torch.equal(formats.scale_exponent_from_amax(above, fmt), exponent + 1)


def test_zero_has_the_smallest_scale() -> None:
    assert formats.scale_from_amax(torch.zeros(3)).tolist() == [2.0**-126] * 3


def test_powers_of_two_round_trip_through_exponents_and_bytes() -> None:
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    scales = formats.pow2(exponents)
    assert scales.tolist() == [math.ldexp(1.0, e) for e in range(-126, 128)]
    assert torch.equal(formats.exponent_of(scales), exponents)
    stored = formats.to_e8m0(exponents)
    assert stored.tolist() == list(range(1, 255))
    assert torch.equal(formats.from_e8m0(stored), scales)
    assert formats.is_power_of_two(scales).all()


def test_what_is_not_a_normal_power_of_two() -> None:
    bad = torch.tensor([0.0, 3.0, 1.0 + 2**-23, 2.0**-127, -2.0, math.inf, math.nan])
    assert not formats.is_power_of_two(bad).any()


@BOTH
def test_global_scale_never_leaves_a_ratio_above_the_maximum(fmt: Format) -> None:
    """MOSS's local scales are at most one only if amax / global_scale <= max in fp32; plain division misses that for 8 % of all amax."""
    amax = torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    plain = (amax / fmt.max).clamp_min(2.0**-126)
    scale = formats.global_scale_from_amax(amax, fmt)
    assert (amax / plain > fmt.max).sum() > 2000, "the trap that the function exists for"
    assert (amax / scale <= fmt.max).all()
    assert ((scale == plain) | (scale == torch.nextafter(plain, plain * 2))).all(), "at most one unit in the last place above the quotient"


def test_format_of_a_payload() -> None:
    assert formats.format_of(torch.float8_e4m3fn) is E4M3
    assert formats.format_of(torch.float8_e5m2) is E5M2
    with pytest.raises(TypeError, match="bfloat16 is not an FP8 payload dtype; expected one of"):
        formats.format_of(torch.bfloat16)
