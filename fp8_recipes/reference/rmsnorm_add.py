"""A residual branch that ends in a norm, ``y = residual + gain * x / rms(x)`` (FOG, arXiv 2505.20524; OLMo 2, arXiv 2501.00656), and its gradients.

The norm's result is never rounded by itself: y is rounded once. The gradient of the residual is dy.
"""

from __future__ import annotations

import torch

from ..tensor import check_matrix


def check_rmsnorm_add(x: torch.Tensor, other: torch.Tensor, gain: torch.Tensor, name: str) -> None:
    """Raise unless x and ``other`` (called ``name``) are matrices of one shape and gain has one number per column, all on one device."""
    check_matrix(x, "x")
    check_matrix(other, name)
    if other.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(other.shape)}")
    if gain.shape != x.shape[1:] or not gain.is_floating_point():
        raise ValueError(f"gain must be floating numbers of shape ({x.shape[1]},), one per column of x, got {gain.dtype} {tuple(gain.shape)}")
    if not x.device == other.device == gain.device:
        raise ValueError(f"x, {name} and gain must be on one device, got {x.device}, {other.device} and {gain.device}")


def check_rstd(rstd: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless rstd is what `rmsnorm_add` gave beside y."""
    if rstd.shape != x.shape[:1] or rstd.dtype != torch.float32 or rstd.device != x.device:
        raise ValueError(f"rstd must be fp32 [{x.shape[0]}] on {x.device}, as rmsnorm_add returns it, got {rstd.dtype} {tuple(rstd.shape)} on {rstd.device}")


def rmsnorm_add(x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + x / sqrt(mean(x^2) + eps) * gain`` in fp32 -> (y [rows, cols] in the residual's dtype, rstd [rows] fp32).

    x, residual: [rows, cols], bf16, fp16 or fp32, each in its own dtype; gain: [cols]. NaN or Inf in a row stays in that row.
    """
    check_rmsnorm_add(x, residual, gain, "residual")
    xf = x.float()
    rstd = torch.rsqrt(xf.square().mean(dim=1) + eps)
    return (residual.float() + xf * rstd[:, None] * gain.float()).to(residual.dtype), rstd


def rmsnorm_add_backward(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [rows, cols] in x's dtype, dgain [cols] in gain's) from dy [rows, cols], in fp32; dgain is summed in fp64.

    With n = x rstd and g = dy gain: ``dx = rstd (g - n mean(g n))``, ``dgain = sum over rows of dy n``. NaN in a row: in that row of dx and in dgain.
    """
    check_rmsnorm_add(x, dy, gain, "dy")
    check_rstd(rstd, x)
    dyf, n = dy.float(), x.float() * rstd[:, None]
    g = dyf * gain.float()
    dx = rstd[:, None] * (g - n * (g * n).mean(dim=1, keepdim=True))
    return dx.to(x.dtype), (dyf * n).sum(dim=0, dtype=torch.float64).to(gain.dtype)
