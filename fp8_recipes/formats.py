"""FP8 formats and power-of-two scales.

An FP8 number has few exponent bits, so a tensor is stored as a *payload* (the FP8 bytes) and a *scale* that multiplies it back: ``x ~ payload * scale``.
Here every scale is a power of two, that is, nothing but an exponent. Two consequences carry the whole package:

* changing a payload from one scale to another moves its exponent field and leaves its mantissa alone (exact until the result is subnormal);
* dividing by a scale is exact, so quantisation rounds once.

Scales round **up**: the smallest power of two ``s`` with ``amax <= fmt.max * s``. The OCP rule, ``floor(log2(amax)) - max_exponent``, overflows the
largest element wherever ``amax = m * 2**e`` with ``m > 1.75``, about one group in five (NVIDIA's MXFP8 study, arXiv 2506.08027, saw it diverge).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_EXPONENT_MIN = -126
"""Exponent of the smallest scale: the smallest normal FP32 number. All-zero groups get it, so that they never win a maximum over scales."""
SCALE_EXPONENT_MAX = 127
E8M0_BIAS = 127
"""A scale 2**e is stored in one byte as ``e + 127`` (E8M0): 1..254; 0 and 255 do not occur."""

_FP32_MANTISSA_BITS = 23
_FP32_MANTISSA_MASK = (1 << _FP32_MANTISSA_BITS) - 1
_THREE_QUARTERS = 3 << (_FP32_MANTISSA_BITS - 2)


@dataclass(frozen=True)
class Format:
    """One FP8 format.

    ``max`` is ``1.75 * 2**max_exponent`` in both formats, which is why one comparison of the mantissa decides how a scale rounds.
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    max_exponent: int

    @property
    def max(self) -> float:
        """Largest finite value: 448 (E4M3), 57344 (E5M2)."""
        return torch.finfo(self.dtype).max

    @property
    def min_normal(self) -> float:
        return torch.finfo(self.dtype).smallest_normal

    @property
    def min_subnormal(self) -> float:
        return self.min_normal * 2.0**-self.mantissa_bits

    def __str__(self) -> str:
        return self.name


E4M3 = Format("e4m3", torch.float8_e4m3fn, exponent_bits=4, mantissa_bits=3, max_exponent=8)
E5M2 = Format("e5m2", torch.float8_e5m2, exponent_bits=5, mantissa_bits=2, max_exponent=15)
FORMATS: dict[str, Format] = {f.name: f for f in (E4M3, E5M2)}


def format_of(dtype: torch.dtype) -> Format:
    """The `Format` whose payload has this torch dtype."""
    for fmt in FORMATS.values():
        if fmt.dtype == dtype:
            return fmt
    raise TypeError(f"{dtype} is not an FP8 payload dtype; expected one of {[f.dtype for f in FORMATS.values()]}")


def scale_exponent_from_amax(amax: torch.Tensor, fmt: Format = E4M3) -> torch.Tensor:
    """Exponent of the smallest power of two ``s`` with ``amax <= fmt.max * s``; int32, clamped to [-126, 127].

    Read off the bits of ``amax`` (fp32, >= 0, finite): with ``amax = m * 2**e`` and ``fmt.max = 1.75 * 2**max_exponent`` the answer is
    ``e - max_exponent``, plus one if ``m > 1.75``. No division, so no rounding: 448 * 2**k maps to k exactly.
    """
    bits = amax.to(torch.float32).view(torch.int32)
    exponent = (bits >> _FP32_MANTISSA_BITS) - E8M0_BIAS
    carry = ((bits & _FP32_MANTISSA_MASK) > _THREE_QUARTERS).to(torch.int32)
    return (exponent - fmt.max_exponent + carry).clamp(SCALE_EXPONENT_MIN, SCALE_EXPONENT_MAX)


def pow2(exponent: torch.Tensor) -> torch.Tensor:
    """``2.0**exponent`` in fp32 by writing the exponent field; ``exponent`` int in [-126, 127]."""
    return ((exponent.to(torch.int32) + E8M0_BIAS) << _FP32_MANTISSA_BITS).view(torch.float32)


def scale_from_amax(amax: torch.Tensor, fmt: Format = E4M3) -> torch.Tensor:
    """Smallest power-of-two scale (fp32) under which ``amax`` fits `fmt`. See `scale_exponent_from_amax`."""
    return pow2(scale_exponent_from_amax(amax, fmt))


def global_scale_from_amax(amax: torch.Tensor, fmt: Format = E4M3) -> torch.Tensor:
    """``amax / fmt.max`` in fp32, rounded so that ``amax / result <= fmt.max`` holds in fp32 too: MOSS's FP32 scale of a whole tensor.

    Plain division misses that by one unit in the last place for every twelfth amax, and the largest group would then get a local scale of 2 instead of 1.
    """
    scale = (amax.float() / fmt.max).clamp_min(torch.finfo(torch.float32).smallest_normal)
    return torch.where(amax.float() / scale > fmt.max, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)


def exponent_of(scale: torch.Tensor) -> torch.Tensor:
    """Exponent (int32) of a power-of-two scale (fp32). The inverse of `pow2`."""
    return (scale.view(torch.int32) >> _FP32_MANTISSA_BITS) - E8M0_BIAS


def to_e8m0(exponent: torch.Tensor) -> torch.Tensor:
    """Exponents (int) as E8M0 bytes (uint8)."""
    return (exponent + E8M0_BIAS).to(torch.uint8)


def from_e8m0(byte: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes (uint8) as power-of-two scales (fp32)."""
    return pow2(byte.to(torch.int32) - E8M0_BIAS)


def is_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Elementwise: is this fp32 number a normal power of two?"""
    bits = scale.view(torch.int32)
    exponent = bits >> _FP32_MANTISSA_BITS
    return ((bits & _FP32_MANTISSA_MASK) == 0) & (exponent > 0) & (exponent < 255)


def cast_saturating(x: torch.Tensor, fmt: Format = E4M3) -> torch.Tensor:
    """Round fp32 to `fmt`, nearest even; beyond the largest finite value saturate; NaN and Inf become NaN.

    torch's own cast to E4M3 turns everything above 464 into NaN, which would make a rounding accident look like divergence; hence the clamp.
    """
    finite = torch.isfinite(x)
    clamped = x.clamp(-fmt.max, fmt.max)
    return torch.where(finite, clamped, torch.nan).to(fmt.dtype)
