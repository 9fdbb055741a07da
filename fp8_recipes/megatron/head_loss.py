"""The loss of an FP8 LM head: cross-entropy whose gradient is quantised where it is computed, so that the logits' gradient is never written in bf16.

Megatron computes logits and loss in two calls, with an autograd edge of the logits' shape between them. FP8 cannot travel on it: autograd would cast it to the
logits' dtype, without its scales. So the edge carries a stand-in without memory, and the gradient goes beside it, through the `Edge` that forward made: the
loss puts it there, the head's backward takes it. If anything else had used the logits, autograd would have added its gradient to the stand-in; `take` sees
that and raises. A loss that is not ours (logits changed on the way, gathered, or scaled) puts nothing there, and the head quantises what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import ops
from ..recipe import Recipe
from ..tensor import ScaledTensor

_ATTRIBUTE = "fp8_recipes_edge"


class Edge:
    """Between one forward pass of the head and its loss. recipe: the head's. group: ranks with the other parts of the vocabulary, None if there are none."""

    def __init__(self, recipe: Recipe, group: Any) -> None:
        self.recipe, self.group = recipe, group
        self._gradient: ScaledTensor | None = None
        self._stand_in: torch.Tensor | None = None

    def mark(self, logits: torch.Tensor) -> None:
        """Let the loss find this edge by the logits."""
        setattr(logits, _ATTRIBUTE, self)

    @staticmethod
    def of(logits: torch.Tensor) -> Edge | None:
        return getattr(logits, _ATTRIBUTE, None)

    def put(self, gradient: ScaledTensor, like: torch.Tensor) -> torch.Tensor:
        """Leave the gradient of the logits [T, V]; what autograd is to carry instead, of the shape and dtype of ``like``."""
        self._gradient, self._stand_in = gradient, like.new_zeros(())
        return self._stand_in.expand(like.shape)

    def take(self, carried: torch.Tensor) -> ScaledTensor | None:
        """The gradient that the loss left, once; None if it left none. carried: what autograd brought. RuntimeError if that is more than the stand-in."""
        gradient, stand_in = self._gradient, self._stand_in
        self._gradient = self._stand_in = None
        if gradient is None or stand_in is None:
            return None
        if carried.data_ptr() != stand_in.data_ptr() or any(carried.stride()):
            raise RuntimeError(
                "the logits of an LM head in FP8 were used by more than its loss (an auxiliary loss of the logits?); for that leave the head in bf16: "
                "add head=bf16 to the recipe, as in --fp8-recipe moss:head=bf16"
            )
        return gradient


def takes(recipe: Recipe) -> bool:
    """Can the gradient be quantised row by row, as it is computed? Not under a scale of the whole tensor that is measured first."""
    return recipe.global_scale == "unit" or recipe.grad_granularity != "micro"


def fused(original: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """GPTModel.compute_language_model_loss(labels [B, S], logits [S, B, V/TP]) -> loss [B, S] fp32: `CrossEntropy` where the logits come from an FP8 head."""

    def compute_language_model_loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        edge = Edge.of(logits)
        if edge is None:
            return original(labels, logits)
        loss: torch.Tensor = CrossEntropy.apply(logits, labels.transpose(0, 1), edge)
        return loss.transpose(0, 1).contiguous()

    return compute_language_model_loss


class CrossEntropy(torch.autograd.Function):
    """logits: [S, B, V/TP], labels: int64 [S, B] in the whole vocabulary -> loss [S, B] fp32. A label outside it costs log sum exp(x - m), as Megatron's."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, edge: Edge) -> torch.Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        first = 0 if edge.group is None else edge.group.rank() * rows.shape[1]
        local = labels.reshape(-1).to(torch.int64) - first
        m, s, target = ops.softmax_parts(rows, local)
        if edge.group is not None:
            m, s, target = _of_all_ranks(m, s, target, edge.group)
        log_sum = s.log()
        lse = m + log_sum
        ctx.save_for_backward(logits, local, lse, target)
        ctx.edge = edge
        return torch.where(target == -torch.inf, log_sum, lse - target).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, local, lse, target = ctx.saved_tensors
        recipe = ctx.edge.recipe
        # A row's scale is known before its entries are: they are rounded to it at once, where other tensors are rounded finely first and then folded.
        granularity = "row" if recipe.folded else recipe.grad_granularity
        rows, weights = logits.reshape(-1, logits.shape[-1]), dloss.reshape(-1).float().contiguous()
        gradient = ops.cross_entropy_backward_quantize(rows, local, lse, target, weights, granularity, recipe.grad_format)
        return ctx.edge.put(gradient, logits), None, None


def _of_all_ranks(m: torch.Tensor, s: torch.Tensor, target: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`softmax_parts` of the whole vocabulary, from each rank's: two collectives of a few numbers per token."""
    most = torch.stack((m, target))
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    s = s * (m - most[0]).exp()
    dist.all_reduce(s, group=group)
    return most[0], s, most[1]
