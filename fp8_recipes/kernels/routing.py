"""Between the router and the permutation: `fp8_recipes.reference.routing` and `copies_of_rows`, bit for bit, one launch each instead of five to ten.

The tensors are small (8192 tokens x 64 experts), so what these save is the host's time. One token's experts lie in the lanes of one program; its slots follow
from a prefix sum of the map, so the order is the experts' and the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.permute import RowMap, check_copies
from ..reference.routing import check_choice, check_choice_gradient
from . import common
from .common import INTERPRETED, cdiv, check_device, next_power_of_2, to_fp32
from .launch import launch

CELLS = 2048
"""Tokens x experts of one program."""
COPIES = 1024
"""Copies of one program of `copies_of_rows`."""


@triton.jit
def _chosen_experts_kernel(prob_ptr, map_ptr, index_ptr, out_ptr, tokens, experts, K: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, E: tl.constexpr):
    """TOKENS rows of the map. SLOTS, E: powers of two that cover K and the experts. The two stores write different slots: chosen ones, and those left over."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, E)[None, :]
    there = (token < tokens) & (expert < experts)
    chosen = tl.load(map_ptr + token * experts + expert, mask=there, other=0).to(tl.int32)
    slot = tl.cumsum(chosen, axis=1) - 1
    count = tl.sum(chosen, axis=1)[:, None]
    mine = (chosen != 0) & (slot < K)
    prob = to_fp32(tl.load(prob_ptr + token * experts + expert, mask=there & mine, other=0.0))
    prob = tl.where(count > K, float("nan"), prob)
    tl.store(index_ptr + token * K + slot, expert + tl.zeros_like(slot), mask=mine)
    tl.store(out_ptr + token * K + slot, prob, mask=mine)
    left = tl.arange(0, SLOTS)[None, :]
    over = (left >= count) & (left < K) & (token < tokens)
    tl.store(index_ptr + token * K + left, tl.full((TOKENS, SLOTS), -1, tl.int32), mask=over)
    tl.store(out_ptr + token * K + left, tl.zeros((TOKENS, SLOTS), tl.float32), mask=over)


@triton.jit
def _to_dtype(x, like_ptr):
    """fp32 -> the type that ``like_ptr`` points to, nearest even. The interpreter's own conversion to bf16 truncates subnormals: there, integer arithmetic."""
    if INTERPRETED and like_ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(like_ptr.dtype.element_ty)


@triton.jit
def _chosen_experts_backward_kernel(grad_ptr, index_ptr, out_ptr, tokens, experts, K: tl.constexpr, TOKENS: tl.constexpr, E: tl.constexpr):
    """Every element of out [tokens, experts]: the gradient of the slot that holds the expert, else zero."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, E)[None, :]
    gradient = tl.zeros((TOKENS, E), tl.float32)
    for k in tl.static_range(K):
        held = tl.load(index_ptr + token * K + k, mask=token < tokens, other=-1)
        value = tl.load(grad_ptr + token * K + k, mask=token < tokens, other=0.0)
        gradient += tl.where(held == expert, value, 0.0)
    tl.store(out_ptr + token * experts + expert, _to_dtype(gradient, out_ptr), mask=(token < tokens) & (expert < experts))


@triton.jit
def _copies_of_rows_kernel(value_ptr, destination_ptr, out_ptr, copies, BLOCK: tl.constexpr):
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(destination_ptr + copy, mask=copy < copies, other=-1)
    tl.store(out_ptr + copy, tl.load(value_ptr + row, mask=row >= 0, other=0.0), mask=copy < copies)


def chosen_experts(probs: torch.Tensor, routing_map: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.chosen_experts`, one launch. A token with more than K experts gets NaN probabilities; the reference raises."""
    check_choice(probs, routing_map, topk)
    check_device(probs, "probs")
    probs, routing_map = probs.contiguous(), routing_map.contiguous()
    tokens, experts = probs.shape
    index = common.empty((tokens, topk), torch.int32, probs.device)
    prob = common.empty((tokens, topk), torch.float32, probs.device)
    lanes = next_power_of_2(experts)
    rows = max(1, CELLS // lanes)
    if tokens:
        constants = {"K": topk, "SLOTS": next_power_of_2(topk), "TOKENS": rows, "E": lanes, "num_warps": 4}
        launch(_chosen_experts_kernel, (cdiv(tokens, rows),), probs, routing_map.view(torch.uint8), index, prob, tokens, experts, **constants)
    return index, prob


def chosen_experts_backward(dprob: torch.Tensor, index: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.chosen_experts_backward`, one launch."""
    check_choice_gradient(dprob, index)
    check_device(index, "index")
    (tokens, copies), lanes = index.shape, next_power_of_2(num_experts)
    out = common.empty((tokens, num_experts), dtype, index.device)
    rows = max(1, CELLS // lanes)
    if tokens:
        constants = {"K": copies, "TOKENS": rows, "E": lanes, "num_warps": 4}
        launch(_chosen_experts_backward_kernel, (cdiv(tokens, rows),), dprob.contiguous(), index.contiguous(), out, tokens, num_experts, **constants)
    return out


def copies_of_rows(values: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.copies_of_rows`: [rows] fp32 -> [T, K], 0 for dropped copies."""
    check_copies(values, row_map)
    check_device(values, "values")
    out = common.empty(tuple(row_map.destination.shape), torch.float32, values.device)
    copies = out.numel()
    if copies:
        launch(_copies_of_rows_kernel, (cdiv(copies, COPIES),), values.contiguous(), row_map.destination, out, copies, BLOCK=COPIES, num_warps=4)
    return out


__all__ = ["chosen_experts", "chosen_experts_backward", "copies_of_rows"]
