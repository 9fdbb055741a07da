"""RMSNorm and SwiGLU with the quantisation behind them: what the fused kernels compute; and what all activations share."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch

from ..formats import E4M3, Format
from ..tensor import ScaledTensor
from .quantize import dequantize, quantize


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


class ActivationGradients(NamedTuple):
    """h: the quantised gradient, of h's shape; prob: that of prob, fp32 [rows], None without prob; alpha: that of xIELU's [alpha_p, alpha_n], fp32 [2]."""

    h: ScaledTensor
    prob: torch.Tensor | None
    alpha: torch.Tensor | None = None


def check_prob(prob: torch.Tensor | None, rows: int) -> None:
    """Raise unless ``prob`` is one fp32 number per row, or None."""
    if prob is not None and (prob.shape != (rows,) or prob.dtype != torch.float32 or not prob.is_contiguous()):
        raise ValueError(f"prob must be contiguous fp32 ({rows},), one number per row of h; got {prob.dtype} {tuple(prob.shape)}")


def check_saved(h: ScaledTensor) -> None:
    """Raise unless ``h`` is a saved fc1 output as the saving activations make it: one scale per row."""
    if h.granularity != "row" or h.global_scale is not None:
        raise ValueError(f"h has {h.granularity} scales; a saved h has one scale per row: make it with quantize_saving of its activation")


def values_of(h: torch.Tensor | ScaledTensor) -> torch.Tensor:
    """h in fp32."""
    if isinstance(h, torch.Tensor):
        return h.float()
    check_saved(h)
    return dequantize(h)


def swiglu(h: torch.Tensor | ScaledTensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up`` in fp32 for ``h = [gate | up]`` [rows, 2F]; times ``prob`` [rows] fp32 if given."""
    check_prob(prob, h.shape[0])
    gate, up = values_of(h).chunk(2, dim=1)
    y = gate * torch.sigmoid(gate) * up
    return y if prob is None else y * prob[:, None]


def check_unsaved(h: torch.Tensor | ScaledTensor) -> None:
    """Raise where ``h`` is FP8 already and is to be saved."""
    if isinstance(h, ScaledTensor):
        raise TypeError("h is a ScaledTensor already; the form that saves h is for a bf16 h, use the one that does not")


def check_same(dy: torch.Tensor, h: torch.Tensor | ScaledTensor) -> None:
    """Raise unless ``dy`` and ``h`` have one shape, as an activation without a gate has them."""
    if dy.shape != h.shape:
        raise ValueError(f"h and dy must both be [rows, F]; got h {tuple(h.shape)} and dy {tuple(dy.shape)}")


def check_gated(h: torch.Tensor | ScaledTensor) -> None:
    """Raise unless ``h`` has two halves."""
    if h.shape[1] % 2:
        raise ValueError(f"h must be [rows, 2F] = [gate | up], got an odd width {h.shape[1]}")


def swiglu_quantize(
    h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> ScaledTensor:
    """Quantised ``silu(gate) * up``; h: [rows, 2F] = [gate | up], bf16 or as `swiglu_quantize_saving` saved it; result [rows, F].

    prob: [rows] fp32, the routing probability of each row, multiplied in before the quantisation. A row with h = 0 and prob = 0 (padding) is exactly zero.
    """
    check_gated(h)
    return quantize(swiglu(h, prob), granularity, fmt, fold=fold)


def swiglu_quantize_saving(
    h: torch.Tensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor | None = None
) -> tuple[ScaledTensor, ScaledTensor]:
    """(`swiglu_quantize` of h, h itself in ``fmt`` under one scale per row over both halves, without tile exponents): what backward needs at half of
    bf16's bytes."""
    check_unsaved(h)
    q, saved = swiglu_quantize(h, granularity, fmt, fold=fold, prob=prob), quantize(h, "row", fmt)
    return q, ScaledTensor(saved.payload, saved.scale, "row")


def check_halves(dy: torch.Tensor, h: torch.Tensor | ScaledTensor) -> None:
    """Raise unless ``h`` is [rows, 2F] for ``dy`` [rows, F]."""
    if h.shape != (dy.shape[0], 2 * dy.shape[1]):
        raise ValueError(f"h must be [rows, 2F] for dy [rows, F]; got h {tuple(h.shape)} and dy {tuple(dy.shape)}")


def swiglu_backward(dy: torch.Tensor, h: torch.Tensor | ScaledTensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient of `swiglu` in fp32: ``[dgate | dup]`` [rows, 2F] from dy [rows, F]."""
    check_halves(dy, h)
    check_prob(prob, h.shape[0])
    gate, up = values_of(h).chunk(2, dim=1)
    s = torch.sigmoid(gate)
    silu = gate * s
    g = dy.float() if prob is None else dy.float() * prob[:, None]
    return torch.cat((g * up * (s + silu * (1 - s)), g * silu), dim=1)


def swiglu_prob_gradient(dy: torch.Tensor, h: torch.Tensor | ScaledTensor) -> torch.Tensor:
    """Gradient of `swiglu`'s prob, [rows] fp32: ``sum_f dy * silu(gate) * up``."""
    check_halves(dy, h)
    return (dy.float() * swiglu(h)).sum(dim=1)


@overload
def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: None = None
) -> ScaledTensor: ...


@overload
def swiglu_backward_quantize(
    dy: torch.Tensor, h: torch.Tensor | ScaledTensor, granularity: str = "row", fmt: Format = E4M3, *, fold: str | None = None, prob: torch.Tensor
) -> tuple[ScaledTensor, torch.Tensor]: ...


def swiglu_backward_quantize(
    dy: torch.Tensor,
    h: torch.Tensor | ScaledTensor,
    granularity: str = "row",
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    prob: torch.Tensor | None = None,
) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
    """Quantised gradient of `swiglu`: [rows, 2F] from dy [rows, F] bf16 and h [rows, 2F], bf16 or as `swiglu_quantize_saving` saved it.
    One row of the result has one scale over both halves.

    With prob [rows] fp32 the result is (that gradient, the gradient of prob [rows] fp32).
    """
    q = quantize(swiglu_backward(dy, h, prob), granularity, fmt, fold=fold)
    return q if prob is None else (q, swiglu_prob_gradient(dy, h))
