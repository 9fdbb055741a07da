"""RMSNorm and SwiGLU with the quantisation behind them: what the fused kernels compute."""

from __future__ import annotations

import torch

from ..formats import E4M3, Format
from ..tensor import ScaledTensor
from .quantize import quantize


def rmsnorm_quantize(
    x: torch.Tensor, gamma: torch.Tensor, eps: float = 1e-5, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None
) -> tuple[ScaledTensor, torch.Tensor]:
    """``y = x * rstd * gamma`` with ``rstd = (mean(x**2) + eps) ** -0.5``, in fp32, quantised without passing through bf16.

    x: [rows, cols] bf16, gamma: [cols]. Returns (quantised y, rstd [rows] fp32).
    """
    if gamma.shape != x.shape[1:]:
        raise ValueError(f"gamma must have shape ({x.shape[1]},), got {tuple(gamma.shape)}")
    xf = x.float()
    rstd = torch.rsqrt(xf.square().mean(dim=1) + eps)
    return quantize(xf * rstd[:, None] * gamma.float(), granularity, fmt, fold=fold), rstd


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in fp32 for ``h = [gate | up]`` [rows, 2F]."""
    gate, up = h.float().chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up


def swiglu_quantize(h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None) -> ScaledTensor:
    """Quantised ``silu(gate) * up``; h: [rows, 2F] bf16 = [gate | up], result [rows, F]."""
    if h.shape[1] % 2:
        raise ValueError(f"h must be [rows, 2F] = [gate | up], got an odd width {h.shape[1]}")
    return quantize(swiglu(h), granularity, fmt, fold=fold)


def swiglu_backward(dy: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Gradient of `swiglu` in fp32: ``[dgate | dup]`` [rows, 2F] from dy [rows, F]."""
    if h.shape != (dy.shape[0], 2 * dy.shape[1]):
        raise ValueError(f"h must be [rows, 2F] for dy [rows, F]; got h {tuple(h.shape)} and dy {tuple(dy.shape)}")
    gate, up = h.float().chunk(2, dim=1)
    s = torch.sigmoid(gate)
    silu = gate * s
    g = dy.float()
    return torch.cat((g * up * (s + silu * (1 - s)), g * silu), dim=1)


def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None
) -> ScaledTensor:
    """Quantised gradient of `swiglu`: [rows, 2F] from dy [rows, F] bf16 and h [rows, 2F] bf16. One row has one scale over both halves."""
    return quantize(swiglu_backward(dy, h), granularity, fmt, fold=fold)
