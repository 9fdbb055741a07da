"""``tanh(alpha x)`` with one trained alpha, the bound on queries and keys of FOG-flash (arXiv 2505.20524), and its gradients."""

from __future__ import annotations

import torch


def check_tanh(x: torch.Tensor, alpha: torch.Tensor) -> None:
    """Raise unless x is a matrix of rows without gaps and alpha a 0-dim fp32 number on its device."""
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [rows, cols] with contiguous rows, got shape {tuple(x.shape)} and strides {x.stride()}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if alpha.dim() != 0 or alpha.dtype != torch.float32 or alpha.device != x.device:
        raise ValueError(f"alpha must be a 0-dim fp32 tensor on {x.device}, got {alpha.dtype} {tuple(alpha.shape)} on {alpha.device}")


def tanh_bound(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """``tanh(alpha x)`` in fp32, rounded to x's dtype. x: [rows, cols], rows contiguous, at any stride; alpha: 0-dim fp32. Returns contiguous [rows, cols]."""
    check_tanh(x, alpha)
    return torch.tanh(alpha * x.float()).to(x.dtype)


def tanh_bound_backward(dy: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx in x's dtype, dalpha 0-dim fp32) from dy and x [rows, cols]: ``dx = dy (1 - t^2) alpha``, ``dalpha = sum dy (1 - t^2) x``, summed in fp64.

    ``1 - t^2 = 4 e / (1 + e)^2`` with ``e = exp(-2 |alpha x|)``, which loses nothing where t is nearly one.
    """
    check_tanh(x, alpha)
    check_tanh(dy, alpha)
    if dy.shape != x.shape:
        raise ValueError(f"dy and x must have one shape, got {tuple(dy.shape)} and {tuple(x.shape)}")
    xf = x.float()
    e = torch.exp(-2 * (alpha * xf).abs())
    dz = dy.float() * (4 * e / (1 + e).square())
    return (dz * alpha).to(x.dtype), (dz * xf).sum(dtype=torch.float64).float()
