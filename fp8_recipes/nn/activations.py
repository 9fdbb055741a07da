"""What an FFN's experts compute between their two products: one value per activation, chosen where a layer is described, so that `nn.experts` asks no question.

    swiglu   fc1's output h [rows, 2F] = [gate | up]      silu(gate) * up
    gelu     fc1's output h [rows, F]                     gelu(h), exact (`reference.gelu`)
    xielu    fc1's output h [rows, F]                     xielu(h) under alpha, fp32 [2], one pair for all experts of a layer (`reference.xielu`)

Smooth SwiGLU is not here: its factor per row would have to be multiplied back behind fc2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import ops
from ..reference.activation import ActivationGradients
from ..reference.xielu import BETA, check_alpha
from ..tensor import ScaledTensor


@dataclass(frozen=True)
class Activation:
    """An activation by its operations. alpha: fp32 [2] where ``has_alpha``, else None. Keywords of the last three: granularity, fmt, fold and prob of
    `fp8_recipes.ops`."""

    name: str
    parts: int
    """fc1's output is parts * F wide."""
    plain: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    """(h [..., parts * F], alpha) -> [..., F], in h's dtype."""
    quantize: Callable[..., ScaledTensor]
    """(h [rows, parts * F], bf16 or saved, alpha) -> activation x prob, quantised [rows, F]."""
    quantize_saving: Callable[..., tuple[ScaledTensor, ScaledTensor]]
    """The same of a bf16 h, and h itself in FP8 under one scale per row."""
    backward_quantize: Callable[..., ActivationGradients]
    """(da [rows, F], h, alpha, source, prob=...) -> gradients of h, quantised [rows, parts * F], of prob [rows] fp32 and of alpha. source: [rows] int32,
    negative where a row holds nothing."""
    has_alpha: bool = False

    def check_alpha(self, alpha: torch.Tensor | None) -> None:
        """Raise unless ``alpha`` is there where it is needed, and only there."""
        if self.has_alpha and alpha is None:
            raise ValueError(f"activation={self.name!r} needs alpha, fp32 (2,) = [alpha_p, alpha_n]; pass alpha=XIELU().alpha() of nn.fog")
        if not self.has_alpha and alpha is not None:
            raise ValueError(f"activation={self.name!r} has no alpha; leave it out, or use activation='xielu'")
        if alpha is not None:
            check_alpha(alpha)


def _swiglu(h: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _xielu(h: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    assert alpha is not None
    x = h if h.dtype == torch.float64 else h.float()
    y = torch.where(x > 0, alpha[0] * x * x, alpha[1] * (torch.expm1(x.clamp(max=0)) - x)) + BETA * x
    return y.to(h.dtype)


# By name at every call, so that a test or a benchmark may stand in for an operation.
SWIGLU = Activation(
    "swiglu",
    2,
    _swiglu,
    lambda h, alpha, **how: ops.swiglu_quantize(h, **how),
    lambda h, alpha, **how: ops.swiglu_quantize_saving(h, **how),
    lambda da, h, alpha, source, **how: ActivationGradients(*ops.swiglu_backward_quantize(da, h, **how)),
)
GELU = Activation(
    "gelu",
    1,
    lambda h, alpha: F.gelu(h),
    lambda h, alpha, **how: ops.gelu_quantize(h, **how),
    lambda h, alpha, **how: ops.gelu_quantize_saving(h, **how),
    lambda da, h, alpha, source, **how: ops.gelu_backward_quantize(da, h, **how),
)
XIELU = Activation(
    "xielu",
    1,
    _xielu,
    lambda h, alpha, **how: ops.xielu_quantize(h, alpha, **how),
    lambda h, alpha, **how: ops.xielu_quantize_saving(h, alpha, **how),
    lambda da, h, alpha, source, **how: ops.xielu_backward_quantize(da, h, alpha, source=source, **how),
    has_alpha=True,
)
ACTIVATIONS = {a.name: a for a in (SWIGLU, GELU, XIELU)}


def activation_of(name: str) -> Activation:
    """The `Activation` called ``name``. Raises ValueError for one that experts do not have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is none of the experts'; use {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
