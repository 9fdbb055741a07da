"""xIELU and its gradients as device functions of fp32 [TILES, 4, 32] (`kernels.ungated` has the kernels)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED

# 2**(x log2(e)) on the special-function unit. Flushing subnormals does not matter: 1 is subtracted from the result.
_EXP = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }")


@triton.jit
def _exp(x):
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(_EXP, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def xielu_value(x, alpha_p, alpha_n):
    """xIELU. What a branch computes for the other's x is dropped, Inf included; on the right of -1/32 both are x^2 times a slope."""
    far = alpha_n * _exp(x) - (alpha_n * x + alpha_n)
    # Two terms where the reference takes three: off by 1e-4 of the curved part at most, and that is 2e-6 of y.
    near = x * x * tl.where(x > 0, alpha_p, alpha_n * 0.5 + x * (alpha_n * 0.16666667))
    return tl.where(x > -0.03125, near, far) + 0.5 * x


@triton.jit
def xielu_alpha_terms(dy, x):
    """The terms of the gradients by alpha_p and by alpha_n."""
    by_p = tl.where(x > 0, dy * x * x, 0.0)
    by_n = tl.where(x > 0, 0.0, dy * tl.where(x > -0.03125, x * x * (0.5 + x * 0.16666667), _exp(x) - 1.0 - x))
    return by_p, by_n


@triton.jit
def xielu_slope(x, alpha_p, alpha_n):
    return tl.where(x > 0, 2 * alpha_p * x, alpha_n * (_exp(x) - 1.0)) + 0.5
