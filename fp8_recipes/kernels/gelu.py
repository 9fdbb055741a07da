"""GeLU and its slope as device functions of fp32 [TILES, 4, 32] (`kernels.ungated` has the kernels).

There are some twenty instructions to spend on a value before a kernel is slower than the memory, and the library's erf takes more. So, with z = |x|:

    Phi(-z) = P(t) e^(-z^2 / 2),    t = 1 / (1 + 0.31 z),    P of degree 6 without a constant, fitted to 6e-6 of Phi(-z) for z up to 14

The error is relative, far into the tail, and a thousandth of E4M3's. P(1) is 1/2 to the last bit, so that the slope at x = 0 is. The exponential is the one
that the gradient's density needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED

# 1 / (1 + 0.31 z), and 2**(-x^2 log2(e) / 2) from x^2: special-function unit. What is flushed is a tail below 1e-38.
_RECIPROCAL = tl.constexpr("{ .reg .f32 t; fma.rn.f32 t, $1, 0f3E9EB852, 0f3F800000; rcp.approx.ftz.f32 $0, t; }")
_BELL = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0fBF38AA3B; ex2.approx.ftz.f32 $0, t; }")


@triton.jit
def _reciprocal(z):
    if INTERPRETED:
        return 1.0 / (1.0 + 0.31 * z)
    else:
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _bell(square):
    if INTERPRETED:
        return tl.exp(-0.5 * square)
    else:
        return tl.inline_asm_elementwise(_BELL, "=f,f", [square], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _tail(x):
    """(Phi(-|x|), e^(-x^2 / 2))."""
    t = _reciprocal(tl.abs(x))
    p = 0.17872361838817596 + t * -0.07330942898988724
    p = 0.13253575563430786 + t * (0.01756116934120655 + t * p)
    p = 0.12384358048439026 + t * (0.12064532190561295 + t * p)
    bell = _bell(x * x)
    return p * t * bell, bell


@triton.jit
def gelu_value(x):
    tail, bell = _tail(x)
    # x * 0 instead of 0 gives a zero on the left its sign. A NaN that the maximum drops comes back in the product.
    return tl.maximum(x, x * 0.0) - tl.abs(x) * tail


@triton.jit
def gelu_slope(x):
    tail, bell = _tail(x)
    return tl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
