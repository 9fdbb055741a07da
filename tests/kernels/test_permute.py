"""route_map, gather_rows and combine_rows: the reference, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise
from data import nasty

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.kernels import combine_rows, gather_rows, route_map
from fp8_recipes.reference import RowMap
from fp8_recipes.tensor import ScaledTensor

module = import_module("fp8_recipes.kernels.permute")


def routing(tokens: int, k: int, experts: int, device: torch.device, seed: int = 0, drop: float = 0.1) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, k), generator=gen, dtype=torch.int32)
    return index.masked_fill(torch.rand(tokens, k, generator=gen) < drop, -1).to(device)


def assert_same_map(actual: RowMap, expected: RowMap) -> None:
    for field in fields(RowMap):
        assert_bitwise(getattr(actual, field.name), getattr(expected, field.name), field.name)


ROUTINGS = [
    ("usual", 60, 3, 5, 0.1),
    ("several blocks of copies", 200, 4, 6, 0.05),
    ("top 1", 40, 1, 3, 0.0),
    ("top 8, more experts than tokens", 3, 8, 70, 0.2),
    ("one expert", 150, 1, 1, 0.0),
    ("all dropped", 7, 2, 4, 1.1),
    ("no tokens", 0, 4, 3, 0.0),
]


@pytest.mark.parametrize(("tokens", "k", "experts", "drop"), [case[1:] for case in ROUTINGS], ids=[case[0] for case in ROUTINGS])
def test_route_map(device, tokens, k, experts, drop):
    index = routing(tokens, k, experts, device, drop=drop)
    assert_same_map(route_map(index, experts), reference.route_map(index, experts))


def test_route_map_many_blocks_of_copies(device, monkeypatch):
    """More blocks than the scan takes in one step."""
    monkeypatch.setattr(module, "COPIES", 16)
    index = routing(600, 2, 5, device, drop=0.1)
    index[:, 0] = index[:, 0].clamp(max=1)
    assert_same_map(route_map(index, 5), reference.route_map(index, 5))


def test_route_map_all_to_one(device):
    index = torch.full((170, 2), 2, dtype=torch.int32, device=device)
    assert_same_map(route_map(index, 4), reference.route_map(index, 4))


@pytest.mark.parametrize("rows", [128, 256, 384, 1024])
def test_route_map_given_rows(device, rows):
    index = routing(150, 2, 3, device, seed=1)
    assert_same_map(route_map(index, 3, rows), reference.route_map(index, 3, rows))


def test_ids_that_do_not_exist_are_dropped(device):
    """The reference raises; the kernel, which does not wait for the device, drops the copy."""
    index = routing(20, 2, 4, device, seed=2)
    spoiled = index.clone()
    spoiled[3, 1], spoiled[7, 0] = 4, -5
    index[3, 1] = index[7, 0] = -1
    assert_same_map(route_map(spoiled, 4), reference.route_map(index, 4))


def inputs(device: torch.device, cols: int, k: int, tokens: int = 23, experts: int = 4) -> tuple[torch.Tensor, torch.Tensor, RowMap]:
    x = nasty(tokens, cols, device, seed=k)
    prob = torch.rand(tokens, k, generator=torch.Generator().manual_seed(k)).to(device)
    return x, prob, reference.route_map(routing(tokens, k, experts, device, seed=k), experts)


@pytest.mark.parametrize("granularity", ["row", "tile"])
@pytest.mark.parametrize(("cols", "k", "fmt"), [(128, 1, E4M3), (144, 2, E5M2), (16, 3, E4M3), (400, 8, E5M2)], ids=str)
def test_gather_payload(device, cols, k, fmt, granularity):
    x, prob, row_map = inputs(device, cols, k, experts=2)
    q = reference.quantize(x, granularity, fmt)
    expected, expected_prob = reference.gather_rows(q, row_map, prob)
    actual, actual_prob = gather_rows(q, row_map, prob)
    assert_bitwise(actual, expected)
    assert_bitwise(actual_prob, expected_prob, "prob")
    without, none = gather_rows(q, row_map)
    assert none is None
    assert_bitwise(without, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("cols", "k"), [(16, 1), (208, 6), (8208, 2)])
def test_gather_tensor(device, cols, k, dtype):
    x, prob, row_map = inputs(device, cols, k, tokens=9)
    actual, expected = gather_rows(x.to(dtype), row_map, prob), reference.gather_rows(x.to(dtype), row_map, prob)
    assert_bitwise(actual[0], expected[0])
    assert_bitwise(actual[1], expected[1], "prob")


def test_a_row_payload_without_tile_exponents_moves_too(device):
    x, _, row_map = inputs(device, 64, 2)
    q = reference.quantize(x, "row")
    q = ScaledTensor(q.payload, q.scale, "row")
    assert_bitwise(gather_rows(q, row_map)[0], reference.gather_rows(q, row_map)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("cols", "k"), [(16, 1), (144, 2), (1040, 3), (48, 8)])
def test_combine(device, cols, k, weighted):
    _, prob, row_map = inputs(device, cols, k)
    weight = prob.masked_fill(row_map.destination < 0, torch.nan) if weighted else None
    gen = torch.Generator().manual_seed(cols)
    y = torch.randn(row_map.rows, cols, generator=gen) * torch.exp2(torch.randint(-140, 90, (row_map.rows, 1), generator=gen).float())
    y = y.bfloat16().to(device)
    y[row_map.source < 0] = torch.nan  # padding is not read
    actual, expected = combine_rows(y, row_map, weight), reference.combine_rows(y, row_map, weight)
    assert actual.isfinite().all()
    assert_bitwise(actual, expected)


def test_nan_and_inf_stay_in_their_token(device):
    _, _, row_map = inputs(device, 32, 2)
    y = torch.randn(row_map.rows, 32, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    token = int((row_map.destination >= 0).all(1).nonzero()[0])
    y[row_map.destination[token, 0].long(), 5], y[row_map.destination[token, 1].long(), 9] = torch.nan, torch.inf
    out = combine_rows(y, row_map)
    assert out.isnan().nonzero().tolist() == [[token, 5]]
    assert out.isinf().nonzero().tolist() == [[token, 9]]


def test_no_tokens(device):
    row_map = route_map(torch.empty(0, 4, dtype=torch.int32, device=device), 3)
    q = ScaledTensor(torch.empty(0, 32, dtype=torch.float8_e4m3fn, device=device), torch.empty(0, device=device), "row")
    buffer, prob = gather_rows(q, row_map, torch.empty(0, 4, device=device))
    assert_bitwise(buffer, reference.gather_rows(q, row_map)[0])
    assert prob is not None and not prob.any()
    assert combine_rows(torch.zeros(row_map.rows, 32, dtype=torch.bfloat16, device=device), row_map).shape == (0, 32)


def test_bad_input(device):
    x, prob, row_map = inputs(device, 32, 2)
    with pytest.raises(TypeError, match="must be int32"):
        route_map(row_map.destination.long(), 4)
    with pytest.raises(ValueError, match="got shape"):
        gather_rows(x[1:], row_map)
    with pytest.raises(ValueError, match="prob must be contiguous fp32"):
        gather_rows(x, row_map, prob[:, :1])
    with pytest.raises(ValueError, match="a micro payload"):
        gather_rows(reference.quantize(x, "micro"), row_map)
    with pytest.raises(ValueError, match="y must be"):
        combine_rows(x, row_map)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "k", "experts", "cols"), [(8192, 6, 64, 2048), (4096, 8, 256, 7168), (16384, 8, 128, 2048), (32768, 1, 8, 7168)], ids=str)
def test_real_sizes(device, tokens, k, experts, cols):
    index = routing(tokens, k, experts, device, drop=0.01)
    row_map = reference.route_map(index, experts)
    assert_same_map(route_map(index, experts), row_map)
    x = torch.randn(tokens, cols, device=device).bfloat16()
    prob = torch.rand(tokens, k, device=device)
    for granularity in ("row", "tile"):
        q = reference.quantize(x, granularity)
        actual, expected = gather_rows(q, row_map, prob), reference.gather_rows(q, row_map, prob)
        assert_bitwise(actual[0], expected[0])
        assert_bitwise(actual[1], expected[1], "prob")
    y = gather_rows(x, row_map)[0]
    assert_bitwise(y, reference.gather_rows(x, row_map)[0])
    for weight in (None, prob):
        assert_bitwise(combine_rows(y, row_map, weight), reference.combine_rows(y, row_map, weight))
