"""The experts' weights of a mixture-of-experts layer: separate parameters, anywhere in memory, quantised into one grouped payload.

An expert is a weight like any other: one scale, from its own maximum, which is given and not measured here (`quantize_weight`). What differs is that there
are many of them and they are small, so one launch takes all, and that they are separate parameters (checkpoints and optimizers know them by name), so nothing
may stack them into one tensor first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats import E4M3, Format
from ..tensor import check_matrix
from .grouped import GroupedTensor
from .quantize import finite_abs, quantize_weight


def check_experts(weights: Sequence[torch.Tensor], name: str = "weights") -> tuple[int, int, int]:
    """(L, N, K) of L experts' [N, K] matrices; raise unless they are contiguous and alike in shape, dtype and device."""
    if isinstance(weights, torch.Tensor):
        raise TypeError(f"{name} must be a sequence of one [N, K] tensor per expert, got one tensor of shape {tuple(weights.shape)}; pass list({name})")
    if len(weights) == 0:
        raise ValueError(f"{name} is empty: a rank needs at least one expert")
    first = weights[0]
    check_matrix(first, f"{name}[0]")
    shape, dtype, device = first.shape, first.dtype, first.device
    if first.numel() == 0:
        raise ValueError(f"cannot take scales of an empty tensor: {name}[0] has shape {tuple(shape)}")
    for e, w in enumerate(weights):
        if w.shape != shape or w.dtype != dtype or w.device != device:
            found, wanted = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (w, first))
            raise ValueError(f"{name}[{e}] is {found}, {name}[0] is {wanted}; all experts of a layer must be alike")
        if not w.is_contiguous():
            raise ValueError(f"{name}[{e}] of strides {w.stride()} is not contiguous; call .contiguous()")
    return len(weights), shape[0], shape[1]


def check_expert_amax(amax: torch.Tensor, experts: int, device: torch.device) -> None:
    """Raise unless ``amax`` is one fp32 maximum per expert."""
    if tuple(amax.shape) != (experts,) or amax.dtype != torch.float32 or not amax.is_contiguous() or amax.device != device:
        found = f"{amax.dtype} {tuple(amax.shape)} on {amax.device}"
        raise ValueError(f"amax must be contiguous fp32 ({experts},) on {device}, one maximum per expert, got {found}; make it with measure_experts")


def measure_experts(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest finite |w| of every expert, [L] fp32; 0 for an expert that is all zero. weights: L contiguous [N, K] bf16, fp16 or fp32."""
    check_experts(weights)
    return torch.stack([finite_abs(w.detach()).amax() for w in weights])


def quantize_experts(
    weights: Sequence[torch.Tensor], amax: torch.Tensor, increment: float = 0.0, fmt: Format = E4M3, *, transpose: bool = False
) -> GroupedTensor:
    """Quantise L experts' weights, each under the scale of its ``amax + increment`` (`quantize_weight`): payload [L, N, K], scale [L].

    weights: L contiguous [N, K] tensors (bf16, fp16 or fp32), e.g. the parameters themselves. amax: [L] fp32, the maxima when they were last measured
    (`measure_experts`); increment: how far any of them can have grown since. Values beyond saturate; non-finite ones become NaN, alone.
    transpose: payload [L, K, N], the operand of dgrad.
    """
    experts, _, _ = check_experts(weights)
    check_expert_amax(amax, experts, weights[0].device)
    q = [quantize_weight(w.detach(), amax[e], increment, fmt, transpose=transpose) for e, w in enumerate(weights)]
    return GroupedTensor(torch.stack([p.payload.view(torch.uint8) for p in q]).view(fmt.dtype), torch.stack([p.scale for p in q]))
