"""chosen_experts, its gradient and copies_of_rows: the reference, bit for bit."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise

from fp8_recipes import reference
from fp8_recipes.kernels import chosen_experts, chosen_experts_backward, copies_of_rows

module = import_module("fp8_recipes.kernels.routing")

SHAPES = [(37, 6, 64), (5, 1, 1), (70, 2, 8), (9, 8, 160), (40, 3, 5), (0, 2, 4), (3, 8, 8)]
CASES = [(*shape, torch.float32) for shape in SHAPES] + [(*SHAPES[0], dtype) for dtype in (torch.bfloat16, torch.float64, torch.float16)]


def case(tokens: int, k: int, experts: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and a map with at most K experts per token: some tokens have none, equal probabilities occur, chosen ones may be zero, NaN or subnormal."""
    gen = torch.Generator().manual_seed(experts)
    wish = torch.rand(tokens, experts, generator=gen)
    kept = torch.randint(0, k + 1, (tokens, 1), generator=gen)
    routing_map = wish.argsort(dim=1).argsort(dim=1) < kept
    probs = (torch.rand(tokens, experts, generator=gen) * 8).round() / 8
    if probs.numel():
        probs.view(-1)[::7], probs.view(-1)[::11], probs.view(-1)[::13] = math.nan, 3e-39, -0.0
    return probs.to(dtype).to(device), routing_map.to(device)


@pytest.mark.parametrize(("tokens", "k", "experts", "dtype"), CASES, ids=str)
def test_equal_to_the_reference(device, tokens, k, experts, dtype):
    probs, routing_map = case(tokens, k, experts, device, dtype)
    index, prob = chosen_experts(probs, routing_map, k)
    expected_index, expected_prob = reference.chosen_experts(probs, routing_map, k)
    assert_bitwise(index, expected_index, "index")
    assert_bitwise(prob, expected_prob, "prob")
    dprob = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(device)
    if dprob.numel():
        dprob.view(-1)[::5], dprob.view(-1)[::3], dprob.view(-1)[1::7] = math.nan, -0.0, 3e-39
    gradient = chosen_experts_backward(dprob, index, experts, dtype)
    expected = reference.chosen_experts_backward(dprob, index, experts, dtype)
    assert torch.equal(gradient.isnan(), expected.isnan())  # which NaN, every conversion decides for itself
    assert_bitwise(gradient.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0), "dprobs")


def test_the_gradient_is_autograds(device):
    """Of the reference's torch operations, in double: what the kernel's one launch replaces."""
    probs, routing_map = case(37, 6, 64, device)
    probs = probs.nan_to_num().double().requires_grad_()
    index, prob = reference.chosen_experts(probs, routing_map, 6)
    dprob = torch.randn(37, 6, device=device)
    prob.backward(dprob)
    assert_bitwise(chosen_experts_backward(dprob, index, 64, torch.float64), probs.grad, "dprobs")


def test_more_experts_than_slots_are_seen(device):
    probs, routing_map = torch.rand(3, 8, device=device), torch.zeros(3, 8, dtype=torch.bool, device=device)
    routing_map[:, 2] = True
    routing_map[1, 4:7] = True
    with pytest.raises(ValueError, match="routing_map has 4 experts for one token, topk is 2"):
        reference.chosen_experts(probs, routing_map, 2)
    index, prob = chosen_experts(probs, routing_map, 2)
    assert index.tolist() == [[2, -1], [2, 4], [2, -1]]
    assert torch.isnan(prob[1]).all() and prob[0, 0] == probs[0, 2] and prob[2, 0] == probs[2, 2]


def test_strides(device):
    probs, routing_map = case(40, 3, 5, device)
    index, prob = chosen_experts(probs.t().contiguous().t(), routing_map.t().contiguous().t(), 3)
    expected_index, expected_prob = reference.chosen_experts(probs, routing_map, 3)
    assert_bitwise(index, expected_index, "index")
    assert_bitwise(prob, expected_prob, "prob")


@pytest.mark.parametrize(("tokens", "k"), [(40, 3), (0, 2), (700, 2)])
def test_copies_of_rows(device, tokens, k):
    gen = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 4, (tokens, k), generator=gen, dtype=torch.int32).to(device)
    row_map = reference.route_map(index, 4)
    values = torch.randn(row_map.rows, generator=gen).to(device)
    assert_bitwise(copies_of_rows(values, row_map), reference.copies_of_rows(values, row_map), "copies")


def test_bad_input(device):
    probs, routing_map = torch.rand(4, 8, device=device), torch.zeros(4, 8, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"both be \[tokens, experts\]"):
        chosen_experts(probs, routing_map[:3], 2)
    with pytest.raises(TypeError, match="routing_map must be bool, got torch.int64"):
        chosen_experts(probs, routing_map.long(), 2)
    with pytest.raises(ValueError, match="topk=9 must lie between 1 and the 8 experts"):
        chosen_experts(probs, routing_map, 9)
    with pytest.raises(TypeError, match="probs must be floating"):
        chosen_experts(probs.int(), routing_map, 2)
    index = torch.zeros(4, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"dprob must be float32 \(4, 2\)"):
        chosen_experts_backward(torch.rand(4, 3, device=device), index, 8, torch.float32)
    row_map = reference.route_map(index, 8)
    with pytest.raises(TypeError, match="values must be float32"):
        copies_of_rows(torch.zeros(row_map.rows, dtype=torch.float64, device=device), row_map)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "k", "experts"), [(8192, 6, 64), (4096, 8, 128), (1000, 8, 256)])
def test_real_sizes(device, tokens, k, experts):
    probs, routing_map = case(tokens, k, experts, device)
    index, prob = chosen_experts(probs, routing_map, k)
    expected_index, expected_prob = reference.chosen_experts(probs, routing_map, k)
    assert_bitwise(index, expected_index, "index")
    assert_bitwise(prob, expected_prob, "prob")
    dprob = torch.randn(tokens, k, device=device)
    assert_bitwise(chosen_experts_backward(dprob, index, experts, torch.float32), reference.chosen_experts_backward(dprob, index, experts, torch.float32))
