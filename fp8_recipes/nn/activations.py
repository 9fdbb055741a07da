"""What an FFN's experts compute between their two products: one value per activation, chosen where a layer is described, so that `nn.experts` asks no question.

    swiglu   fc1's output h [rows, 2F] = [gate | up]      silu(gate) * up
    gelu     fc1's output h [rows, F]                     gelu(h), exact (`reference.gelu`)

xIELU and smooth SwiGLU are not here: the first has a trained pair of numbers per layer, whose gradient sums over all experts' rows, and the second a factor
per row that has to be multiplied back behind fc2; neither is built for experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..tensor import ScaledTensor


@dataclass(frozen=True)
class Activation:
    """An activation by its operations. Keywords of all three: granularity, fmt, fold and prob of `fp8_recipes.ops`."""

    name: str
    parts: int
    """fc1's output is parts * F wide."""
    plain: Callable[[torch.Tensor], torch.Tensor]
    """h [..., parts * F] -> [..., F], in h's dtype."""
    quantize: Callable[..., ScaledTensor]
    """h [rows, parts * F], bf16 or saved -> activation x prob, quantised [rows, F]."""
    quantize_saving: Callable[..., tuple[ScaledTensor, ScaledTensor]]
    """The same of a bf16 h, and h itself in FP8 under one scale per row."""
    backward_quantize: Callable[..., tuple[ScaledTensor, torch.Tensor]]
    """(da [rows, F], h, prob=...) -> (quantised dh [rows, parts * F], gradient of prob [rows] fp32)."""


def _swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gelu_backward(da: torch.Tensor, h: torch.Tensor | ScaledTensor, **how: Any) -> tuple[ScaledTensor, torch.Tensor]:
    gradients = ops.gelu_backward_quantize(da, h, **how)
    assert gradients.prob is not None
    return gradients.h, gradients.prob


# By name at every call, so that a test or a benchmark may stand in for an operation.
SWIGLU = Activation(
    "swiglu",
    2,
    _swiglu,
    lambda h, **how: ops.swiglu_quantize(h, **how),
    lambda h, **how: ops.swiglu_quantize_saving(h, **how),
    lambda da, h, **how: ops.swiglu_backward_quantize(da, h, **how),
)
GELU = Activation("gelu", 1, F.gelu, lambda h, **how: ops.gelu_quantize(h, **how), lambda h, **how: ops.gelu_quantize_saving(h, **how), _gelu_backward)
ACTIVATIONS = {a.name: a for a in (SWIGLU, GELU)}


def activation_of(name: str) -> Activation:
    """The `Activation` called ``name``. Raises ValueError for one that experts do not have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is none of the experts'; use {' or '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
