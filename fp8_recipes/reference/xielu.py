"""xIELU, the activation of FOG-max, with the quantisation behind it: what the fused kernels compute.

    y = alpha_p x^2 + x/2                   x > 0           (xIELU, arXiv 2411.13010; FOG, arXiv 2505.20524, takes its constants)
    y = alpha_n (e^x - 1 - x) + x/2         x <= 0

One gateless input of F columns gives F columns. Two numbers per layer are trained; the operations here take their effective values ``alpha`` = [alpha_p,
alpha_n] fp32, which the layer makes from its parameters as softplus(p) and 1/2 + softplus(n) (`fp8_recipes.nn.fog.XIELU`), so that y grows at both ends.

FOG's code replaces min(x, 0) by min(x, -1e-6) inside the exponential. That moves y by 1e-6 alpha_n at most, at x = 0; it is not repeated here.
"""

from __future__ import annotations

import torch

from ..formats import E4M3, Format
from ..tensor import ScaledTensor
from .activation import ActivationGradients, check_prob, check_same, check_unsaved, values_of
from .quantize import quantize

BETA = 0.5
"""Slope at zero."""
SERIES = 1 / 32
"""Below this |x|, e^x - 1 - x is summed as x^2 (1/2 + x/6 + x^2/24): the subtraction would leave only rounding errors."""


def check_alpha(alpha: torch.Tensor) -> None:
    """Raise unless ``alpha`` is [alpha_p, alpha_n] in fp32."""
    if alpha.shape != (2,) or alpha.dtype != torch.float32 or not alpha.is_contiguous():
        raise ValueError(f"alpha must be contiguous fp32 (2,) = [alpha_p, alpha_n]; got {alpha.dtype} {tuple(alpha.shape)}")


def check_source(source: torch.Tensor | None, rows: int) -> None:
    """Raise unless ``source`` is one int32 per row, or None."""
    if source is not None and (source.shape != (rows,) or source.dtype != torch.int32 or not source.is_contiguous()):
        raise ValueError(f"source must be contiguous int32 ({rows},), one number per row of h; got {source.dtype} {tuple(source.shape)}")


def _left(x: torch.Tensor) -> torch.Tensor:
    """``e^x - 1 - x`` for x <= 0, and 0 for x > 0: what alpha_n multiplies."""
    n = x.clamp(max=0)
    return torch.where(n > -SERIES, n * n * (0.5 + n * (1 / 6 + n / 24)), torch.expm1(n) - n)


def xielu(h: torch.Tensor | ScaledTensor, alpha: torch.Tensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """xIELU in fp32 of h [rows, F]; alpha: fp32 [2]; times ``prob`` [rows] fp32 if given."""
    check_alpha(alpha)
    check_prob(prob, h.shape[0])
    x = values_of(h)
    y = torch.where(x > 0, alpha[0] * x * x, alpha[1] * _left(x)) + BETA * x
    return y if prob is None else y * prob[:, None]


def xielu_backward(dy: torch.Tensor, h: torch.Tensor | ScaledTensor, alpha: torch.Tensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient of `xielu` by h in fp32 [rows, F]: ``dy (2 alpha_p x + 1/2)`` or ``dy (alpha_n (e^x - 1) + 1/2)``."""
    check_same(dy, h)
    check_alpha(alpha)
    check_prob(prob, h.shape[0])
    x = values_of(h)
    g = dy.float() if prob is None else dy.float() * prob[:, None]
    return g * (torch.where(x > 0, 2 * alpha[0] * x, alpha[1] * torch.expm1(x.clamp(max=0))) + BETA)


def xielu_alpha_gradient(
    dy: torch.Tensor, h: torch.Tensor | ScaledTensor, prob: torch.Tensor | None = None, source: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient of `xielu` by alpha, fp32 [2]: the sums of dy x^2 over x > 0 and of dy (e^x - 1 - x) over x <= 0, summed in fp64.

    source: [rows] int32; a row where it is negative adds nothing, whatever is in it.
    """
    check_same(dy, h)
    check_prob(prob, h.shape[0])
    check_source(source, h.shape[0])
    x = values_of(h)
    g = dy.float() if prob is None else dy.float() * prob[:, None]
    terms = [torch.where(x > 0, g * x * x, 0), torch.where(x > 0, 0, g * _left(x))]
    if source is not None:
        terms = [torch.where(source[:, None] >= 0, t, 0) for t in terms]
    return torch.stack([t.sum(dtype=torch.float64) for t in terms]).float()


def xielu_prob_gradient(dy: torch.Tensor, h: torch.Tensor | ScaledTensor, alpha: torch.Tensor) -> torch.Tensor:
    """Gradient of `xielu` by prob, fp32 [rows]."""
    check_same(dy, h)
    return (dy.float() * xielu(h, alpha)).sum(dim=1)


def xielu_quantize(
    h: torch.Tensor | ScaledTensor,
    alpha: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> ScaledTensor:
    """Quantised xIELU of h [rows, F], bf16 or as `xielu_quantize_saving` saved it; alpha: fp32 [2] = [alpha_p, alpha_n].

    prob: [rows] fp32, the routing probability of each row, multiplied in before the quantisation. A row of zeros stays exactly zero.
    """
    return quantize(xielu(h, alpha, prob), granularity, fmt, fold=fold)


def xielu_quantize_saving(
    h: torch.Tensor, alpha: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """(`xielu_quantize` of h, h itself in ``fmt`` under one scale per row, without tile exponents): what backward needs at half of bf16's bytes."""
    check_unsaved(h)
    q, saved = xielu_quantize(h, alpha, granularity, fmt, fold=fold, prob=prob), quantize(h, "row", fmt)
    return q, ScaledTensor(saved.payload, saved.scale, "row")


def xielu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    alpha: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
) -> ActivationGradients:
    """Gradients of `xielu_quantize` from dy [rows, F] bf16 and its h: by h quantised, by prob and by alpha in fp32.

    source: [rows] int32, negative where a row of a grouped buffer holds no token (`RowMap.source`): such a row adds nothing to alpha's gradient, which is the
    only sum over rows here. Its dh and prob's gradient are those of whatever dy and h hold there.
    """
    q = quantize(xielu_backward(dy, h, alpha, prob), granularity, fmt, fold=fold)
    dprob = None if prob is None else xielu_prob_gradient(dy, h, alpha)
    return ActivationGradients(q, dprob, xielu_alpha_gradient(dy, h, prob, source))
