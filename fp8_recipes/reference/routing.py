"""What a router chose, as one row per token: from a map over all experts to K ids and probabilities, and the gradient back."""

from __future__ import annotations

import torch


def check_choice(probs: torch.Tensor, routing_map: torch.Tensor, topk: int) -> None:
    """Raise unless the arguments of `chosen_experts` have the right shapes and types."""
    if probs.dim() != 2 or probs.shape != routing_map.shape or probs.shape[1] == 0:
        raise ValueError(f"probs and routing_map must both be [tokens, experts], got {tuple(probs.shape)} and {tuple(routing_map.shape)}")
    if routing_map.dtype != torch.bool:
        raise TypeError(f"routing_map must be bool, got {routing_map.dtype}; use routing_map.bool()")
    if not probs.dtype.is_floating_point:
        raise TypeError(f"probs must be floating, got {probs.dtype}")
    if probs.device != routing_map.device:
        raise ValueError(f"probs is on {probs.device}, routing_map on {routing_map.device}; keep them together")
    if not 1 <= topk <= probs.shape[1]:
        raise ValueError(f"topk={topk} must lie between 1 and the {probs.shape[1]} experts of the map")


def chosen_experts(probs: torch.Tensor, routing_map: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [T, K] int32 in rising order, -1 where a token has fewer than K experts; probabilities [T, K] fp32, 0 there).

    probs: [T, E], any float dtype; routing_map: [T, E] bool. By the map, not by the largest probabilities: a chosen expert's may have underflowed to zero.
    Raises ValueError for a token with more than K experts. The kernel cannot (it would wait for the device) and makes that token's probabilities NaN.
    """
    check_choice(probs, routing_map, topk)
    tokens, experts = routing_map.shape
    most = int(routing_map.sum(dim=1).max()) if tokens else 0
    if most > topk:
        raise ValueError(f"routing_map has {most} experts for one token, topk is {topk}")
    slot = routing_map.cumsum(dim=1) * routing_map  # 1 .. K for chosen experts; the others meet in slot 0, which is dropped
    ids = torch.arange(experts, dtype=torch.int32, device=probs.device).expand(tokens, experts)
    index = torch.full((tokens, topk + 1), -1, dtype=torch.int32, device=probs.device).scatter_(1, slot, ids)[:, 1:].contiguous()
    absent = index < 0
    prob = probs.gather(1, index.long().masked_fill_(absent, 0)).float().masked_fill(absent, 0.0)
    return index, prob.contiguous()


def check_choice_gradient(dprob: torch.Tensor, index: torch.Tensor) -> None:
    """Raise unless the arguments of `chosen_experts_backward` have the right shapes and types."""
    if index.dim() != 2 or index.dtype != torch.int32:
        raise TypeError(f"index must be int32 [tokens, K], got {index.dtype} {tuple(index.shape)}")
    if dprob.shape != index.shape or dprob.dtype != torch.float32 or dprob.device != index.device:
        raise ValueError(f"dprob must be float32 {tuple(index.shape)} on {index.device}, got {dprob.dtype} {tuple(dprob.shape)} on {dprob.device}")


def chosen_experts_backward(dprob: torch.Tensor, index: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of `chosen_experts` in probs: [T, E] in ``dtype``, 0 for experts that were not chosen. dprob: [T, K] fp32; index: [T, K] int32, no id twice."""
    check_choice_gradient(dprob, index)
    absent = index < 0
    zeros = torch.zeros(index.shape[0], num_experts, dtype=dtype, device=index.device)
    return zeros.scatter_add_(1, index.long().masked_fill_(absent, 0), dprob.masked_fill(absent, 0.0).to(dtype))
