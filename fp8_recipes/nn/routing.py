"""A router's map over all experts as the ids and probabilities that `nn.moe.moe_experts` takes, differentiable in the probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import ops


class _ChosenExperts(torch.autograd.Function):
    """See `chosen_experts`."""

    @staticmethod
    def forward(ctx: Any, probs: torch.Tensor, routing_map: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        index, prob = ops.chosen_experts(probs, routing_map, topk)
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)  # or a gradient of zeros is filled for the ids
        ctx.experts, ctx.dtype = probs.shape[1], probs.dtype
        return index, prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, dprob: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        (index,) = ctx.saved_tensors
        return None if dprob is None else ops.chosen_experts_backward(dprob, index, ctx.experts, ctx.dtype), None, None


_apply = super(torch.autograd.Function, _ChosenExperts).apply  # type: ignore[misc]
"""`_ChosenExperts.apply` without its questions about functorch, which has no use for a function without setup_context: see `nn.experts.run_experts`."""


def chosen_experts(probs: torch.Tensor, routing_map: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert ids [T, K] int32 in rising order, -1 where fewer than K were chosen; probabilities [T, K] fp32, whose gradients flow back into probs).

    probs: [T, E], any float dtype; routing_map: [T, E] bool (`fp8_recipes.reference.chosen_experts`).
    """
    if torch._C._are_functorch_transforms_active():
        _ChosenExperts.apply(probs, routing_map, topk)  # raises
    index, prob = _apply(probs, routing_map, topk)
    return index, prob
