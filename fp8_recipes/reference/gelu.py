"""GeLU, the activation of FOG-opt and FOG-flash (and of OP), with the quantisation behind it: what the fused kernels compute.

    y = x Phi(x),    Phi(x) = erfc(-x / sqrt(2)) / 2          dy/dx = Phi(x) + x phi(x),    phi(x) = e^(-x^2 / 2) / sqrt(2 pi)

The exact form (arXiv 1606.08415), which Megatron-LM computes where linear layers have no bias; not the tanh approximation.
"""

from __future__ import annotations

import math

import torch

from ..formats import E4M3, Format
from ..tensor import ScaledTensor
from .activation import ActivationGradients, check_prob, check_same, check_unsaved, values_of
from .quantize import quantize


def gelu(h: torch.Tensor | ScaledTensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """GeLU in fp32 of h [rows, F]; times ``prob`` [rows] fp32 if given."""
    check_prob(prob, h.shape[0])
    x = values_of(h)
    y = x * (torch.special.erfc(x * -math.sqrt(0.5)) / 2)
    return y if prob is None else y * prob[:, None]


def gelu_backward(dy: torch.Tensor, h: torch.Tensor | ScaledTensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient of `gelu` by h in fp32 [rows, F]."""
    check_same(dy, h)
    check_prob(prob, h.shape[0])
    x = values_of(h)
    g = dy.float() if prob is None else dy.float() * prob[:, None]
    density = torch.exp(x * x * -0.5) / math.sqrt(2 * math.pi)
    return g * (torch.special.erfc(x * -math.sqrt(0.5)) / 2 + x * density)


def gelu_prob_gradient(dy: torch.Tensor, h: torch.Tensor | ScaledTensor) -> torch.Tensor:
    """Gradient of `gelu` by prob, fp32 [rows]."""
    check_same(dy, h)
    return (dy.float() * gelu(h)).sum(dim=1)


def gelu_quantize(
    h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Quantised GeLU of h [rows, F], bf16 or as `gelu_quantize_saving` saved it.

    prob: [rows] fp32, the routing probability of each row, multiplied in before the quantisation. A row with h = 0 (padding) is exactly zero.
    """
    return quantize(gelu(h, prob), granularity, fmt, fold=fold)


def gelu_quantize_saving(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """(`gelu_quantize` of h, h itself in ``fmt`` under one scale per row, without tile exponents): what backward needs at half of bf16's bytes."""
    check_unsaved(h)
    q, saved = gelu_quantize(h, granularity, fmt, fold=fold, prob=prob), quantize(h, "row", fmt)
    return q, ScaledTensor(saved.payload, saved.scale, "row")


def gelu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> ActivationGradients:
    """Gradients of `gelu_quantize` from dy [rows, F] bf16 and its h: by h quantised, by prob in fp32."""
    q = quantize(gelu_backward(dy, h, prob), granularity, fmt, fold=fold)
    return ActivationGradients(q, None if prob is None else gelu_prob_gradient(dy, h))
