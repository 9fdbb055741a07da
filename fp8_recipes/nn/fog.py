"""The parts that FOG's architectures (arXiv 2505.20524) and their baselines put into a transformer block; `nn.gpt` puts them together.

    xIELU           FFN activation of FOG-max               LayerScale      gain on a branch's output (OP)
    TanhBound       queries and keys of FOG-flash           smooth_swiglu   the Smooth-SwiGLU baseline's FFN
    RMSNorm         with trained gains or none
    PostNorm        RMSNorm of a branch's output, added to the residual stream in the same pass

Each computes in fp32 and saves its input alone, in the input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..reference.xielu import BETA, xielu, xielu_alpha_gradient, xielu_backward

XIELU_ALPHA = 0.8
"""Initial alpha_p and alpha_n."""


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension, computed in fp32, returned in x's dtype.

    The gains [width] are one at first; with trained=False there are none, and nothing is stored.
    """

    def __init__(self, width: int, trained: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if trained else None
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xf = x.float()
        y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + self.eps)
        return (y if self.weight is None else y * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}{'' if self.weight is not None else ', no gain'}"


class PostNorm(nn.Module):
    """``residual + RMSNorm(x)`` as one operation each way (`ops.rmsnorm_add`): the end of a branch. Computed in fp32, rounded once, to the residual's dtype.

    gain: initial value of the trained gains [width].
    """

    def __init__(self, width: int, gain: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), gain))
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor, train_gain: bool = True) -> torch.Tensor:
        """x, residual: [..., width] of one shape, each in its own dtype. train_gain=False: the gains are constants of this call."""
        return _RMSNormAdd.apply(x, residual, self.weight if train_gain else self.weight.detach(), self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


class _RMSNormAdd(torch.autograd.Function):
    """Keeps x and one number per row if x or the gains want a gradient, else nothing: the residual's gradient is dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        rows = (-1, x.shape[-1])
        y, rstd = ops.rmsnorm_add(x.contiguous().view(rows), residual.contiguous().view(rows), gain, eps)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            ctx.save_for_backward(x, gain, rstd)
        return y.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_residual, need_gain, _ = ctx.needs_input_grad
        dx = dgain = None
        if need_x or need_gain:
            x, gain, rstd = ctx.saved_tensors
            rows = (-1, x.shape[-1])
            dx, dgain = ops.rmsnorm_add_backward(dy.contiguous().view(rows), x.contiguous().view(rows), gain, rstd)
            dx = dx.view(x.shape)
        return dx if need_x else None, dy if need_residual else None, dgain if need_gain else None, None


class LayerScale(nn.Module):
    """``x * weight``, one trained factor per feature, all initially `init` (arXiv 2103.17239). The gradient of the weight is the sum of dy * x over tokens."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.to(x.dtype)


class TanhBound(nn.Module):
    """``tanh(alpha x)`` with one trained alpha: bounds queries and keys without a reduction over features. alpha: 0-dim parameter."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Tanh.apply(x, self.alpha)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, alpha)
        return ops.tanh_bound(_as_rows(x), alpha.float()).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        rows = _as_rows(x)
        dx, dalpha = ops.tanh_bound_backward(dy.contiguous().view(rows.shape), rows, alpha.float())
        return dx.view(x.shape) if ctx.needs_input_grad[0] else None, dalpha.to(alpha.dtype) if ctx.needs_input_grad[1] else None


def bound_and_rotated(
    mixed: torch.Tensor, alpha_q: torch.Tensor, alpha_k: torch.Tensor, angles: torch.Tensor, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention takes, from a joint projection in Megatron's order, as one operation each way (`ops.qkv_tanh_rotary`): (q, k, v), contiguous.

    mixed: [s, ..., groups * (heads_per_group + 2) * E]; alpha_q, alpha_k: 0-dim; angles: [s, E / 2] fp32. q: [s, ..., groups * heads_per_group, E]; k, v:
    [s, ..., groups, E]. Keeps mixed alone.
    """
    return _BoundAndRotated.apply(mixed, alpha_q, alpha_k, angles, heads_per_group)


class _BoundAndRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, alpha_q: torch.Tensor, alpha_k: torch.Tensor, angles: torch.Tensor, heads_per_group: int
    ) -> tuple[torch.Tensor, ...]:
        mixed = mixed.contiguous()
        ctx.heads_per_group = heads_per_group
        ctx.save_for_backward(mixed, alpha_q, alpha_k, angles)
        parts = ops.qkv_tanh_rotary(mixed.view(-1, mixed.shape[-1]), alpha_q, alpha_k, angles, heads_per_group)
        return tuple(part.view(*mixed.shape[:-1], -1, 2 * angles.shape[1]) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mixed, alpha_q, alpha_k, angles = ctx.saved_tensors
        rows = mixed.view(-1, mixed.shape[-1])
        flat = (gradient.contiguous().view(rows.shape[0], -1) for gradient in gradients)
        dmixed, *dalphas = ops.qkv_tanh_rotary_backward(*flat, rows, alpha_q, alpha_k, angles, ctx.heads_per_group)
        found = (dmixed.view(mixed.shape), *dalphas)
        return *(gradient if needed else None for gradient, needed in zip(found, ctx.needs_input_grad, strict=False)), None, None


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, cols] with contiguous rows: queries inside a joint projection [B, S, H', E] become [B * S, H * E] where they lie. Layouts whose last
    dimension has gaps are copied."""
    if x.is_contiguous():
        return x.reshape(-1, x.shape[-1])
    cols = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if size != 1 and stride != cols:
            break
        cols *= size
    return x.reshape(-1, cols) if cols > 1 else x.contiguous().reshape(-1, x.shape[-1])


class XIELU(nn.Module):
    """xIELU (arXiv 2411.13010; `fp8_recipes.reference.xielu` has the equations), elementwise, with two trained numbers.

    alpha_p, alpha_n: 0-dim parameters *before* softplus, initially such that both effective alphas are 0.8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(_softplus_inverse(XIELU_ALPHA))
        self.alpha_n = nn.Parameter(_softplus_inverse(XIELU_ALPHA - BETA))

    def alpha(self) -> torch.Tensor:
        """[alpha_p, alpha_n] as the operations take them: ``[softplus(p), 1/2 + softplus(n)]`` fp32."""
        raw = torch.stack((self.alpha_p, self.alpha_n)).float()
        return F.softplus(raw) + torch.tensor((0.0, BETA), device=raw.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Xielu.apply(x, self.alpha())

    def extra_repr(self) -> str:
        return "alpha_p={:.4g}, alpha_n={:.4g}".format(*self.alpha().tolist()) if self.alpha_p.device.type != "meta" else ""


def _softplus_inverse(y: float) -> torch.Tensor:
    """x with log(1 + e^x) = y."""
    return torch.tensor(y, dtype=torch.float64).expm1().log().float()


class _Xielu(torch.autograd.Function):
    """See `XIELU`. alpha: effective alphas fp32 [2]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, alpha)
        return xielu(x.reshape(-1, x.shape[-1]), alpha).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        x2d, dy2d = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        dx = xielu_backward(dy2d, x2d, alpha).to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, xielu_alpha_gradient(dy2d, x2d) if ctx.needs_input_grad[1] else None


def smooth_swiglu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(``silu(gate) * up / s``, s) with s = max |gate| of the token [..., 1], a constant to the gradient; 1 where the whole gate is zero.

    The caller multiplies the FFN's output by s. In exact arithmetic nothing changes; what FP8 sees is smaller. The published method (arXiv 2409.12517)
    has one factor per channel; this is FOG's baseline. Under a recipe with one scale per row s is mostly absorbed by that scale.
    """
    s = gate.detach().abs().amax(-1, keepdim=True)
    s = torch.where(s == 0, torch.ones_like(s), s)
    return F.silu(gate) * (up / s), s
