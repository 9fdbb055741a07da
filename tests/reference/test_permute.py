"""Row maps, gather and combine: the map against a loop, the moves against a permutation matrix in float64, each as the other's gradient."""

from __future__ import annotations

import pytest
import torch

from fp8_recipes.formats import E5M2
from fp8_recipes.reference import RowMap, combine_rows, copies_of_rows, dequantize, gather_rows, quantize, route_map, rows_for


def routing(tokens: int, k: int, experts: int, seed: int = 0, drop: float = 0.1) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, k), generator=gen, dtype=torch.int32)
    return index.masked_fill(torch.rand(tokens, k, generator=gen) < drop, -1)


def normal(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


def by_loop(index: torch.Tensor, experts: int, rows: int) -> dict[str, list[int]]:
    """What the map must hold, written as a loop over experts."""
    flat = index.flatten().tolist()
    source, destination, offsets, blocks, counts = [-1] * rows, [-1] * len(flat), [0], [-1] * (rows // 128), []
    for e in range(experts):
        mine = [c for c, expert in enumerate(flat) if expert == e]
        start = offsets[-1]
        for i, copy in enumerate(mine):
            source[start + i], destination[copy] = copy, start + i
        end = start + -(-len(mine) // 128) * 128
        blocks[start // 128 : end // 128] = [e] * ((end - start) // 128)
        offsets.append(end)
        counts.append(len(mine))
    return {"source": source, "destination": destination, "offsets": offsets, "block_expert": blocks, "counts": counts}


CASES = {
    "usual": (routing(60, 3, 5), 5),
    "empty experts": (routing(40, 2, 3) * 2, 9),
    "one token per expert": (torch.arange(6, dtype=torch.int32)[:, None], 6),
    "all to one": (torch.full((150, 2), 3, dtype=torch.int32), 4),
    "all dropped": (torch.full((5, 2), -1, dtype=torch.int32), 3),
    "more experts than tokens": (routing(3, 8, 40), 40),
    "one expert, a full block": (torch.zeros(128, 1, dtype=torch.int32), 1),
    "no tokens": (torch.empty(0, 4, dtype=torch.int32), 3),
}


@pytest.mark.parametrize(("index", "experts"), CASES.values(), ids=CASES)
def test_map_is_what_a_loop_finds(index: torch.Tensor, experts: int) -> None:
    index = index.where(index >= 0, -1)
    row_map = route_map(index, experts)
    assert row_map.rows == rows_for(index.numel(), experts)
    expected = by_loop(index, experts, row_map.rows)
    for name, values in expected.items():
        got = getattr(row_map, name)
        assert got.dtype == torch.int32
        assert got.flatten().tolist() == values, name
    assert (row_map.tokens, row_map.copies_per_token, row_map.num_experts) == (*index.shape, experts)


def test_buffer_that_is_too_small_drops_the_last_experts_copies() -> None:
    index = torch.tensor([0] * 130 + [1] * 10 + [2] * 5, dtype=torch.int32)[:, None]
    row_map = route_map(index, 3, rows=256)
    assert row_map.offsets.tolist() == [0, 256, 256, 256]
    assert row_map.counts.tolist() == [130, 0, 0]
    assert (row_map.destination[130:] == -1).all()
    row_map = route_map(index[128:], 3, rows=128)
    assert row_map.counts.tolist() == [2, 0, 0], "no row beyond the buffer"


def matrix(row_map: RowMap) -> torch.Tensor:
    """[T, rows] of zeros and ones, one for each copy that has a row."""
    p = torch.zeros(row_map.tokens, row_map.rows, dtype=torch.float64)
    for row, copy in enumerate(row_map.source.tolist()):
        if copy >= 0:
            p[copy // row_map.copies_per_token, row] += 1
    return p


@pytest.mark.parametrize("k", [1, 2, 8])
def test_gather_and_combine_are_each_other_s_gradient(k: int) -> None:
    row_map = route_map(routing(30, k, 4, seed=k), 4)
    p = matrix(row_map)
    x = normal(30, 48, 1)
    x64 = x.double().requires_grad_()
    buffer = p.t() @ x64
    gathered, prob = gather_rows(x, row_map)
    assert prob is None
    assert torch.equal(gathered.double(), buffer.detach())
    dy = normal(row_map.rows, 48, 2)
    buffer.backward(dy.double())
    assert_rounded(combine_rows(dy, row_map), x64.grad, (p @ dy.double().abs()))
    y64 = dy.double().requires_grad_()
    (p @ y64).backward(x.double())
    assert torch.equal(gather_rows(x, row_map)[0].double(), y64.grad)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """bf16 of the exact sum: half a unit of bf16 beside a few roundings of fp32."""
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() * 1.01 + 8 * 2.0**-24 * magnitude + 1e-38).all()


def test_weighted_combine_is_autograd_s_and_ignores_dropped_weights() -> None:
    index = routing(25, 4, 3, seed=3, drop=0.3)
    row_map = route_map(index, 3)
    y, weight = normal(row_map.rows, 32, 4), torch.rand(25, 4, generator=torch.Generator().manual_seed(5))
    kept = (row_map.destination >= 0).double()
    rows = y.double()[row_map.destination.clamp(min=0).long()]
    exact = (rows * (weight.double() * kept)[..., None]).sum(1)
    assert_rounded(combine_rows(y, row_map, weight), exact, (rows.abs() * weight.double()[..., None]).sum(1))
    spoiled = weight.masked_fill(index < 0, torch.nan)
    assert torch.equal(combine_rows(y, row_map, spoiled), combine_rows(y, row_map, weight))


def test_gradient_of_prob_goes_back_to_its_copy() -> None:
    index = routing(20, 3, 4, seed=6)
    row_map = route_map(index, 4)
    prob64 = torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    per_row = torch.randn(row_map.rows, generator=torch.Generator().manual_seed(8))
    buffer = torch.where(row_map.source >= 0, prob64.flatten()[row_map.source.clamp(min=0).long()], 0)
    (buffer * per_row.double()).sum().backward()
    _, moved = gather_rows(normal(20, 16, 9), row_map, prob64.detach().float())
    assert torch.equal(moved, buffer.detach().float())
    assert torch.equal(copies_of_rows(per_row, row_map).double(), prob64.grad)


@pytest.mark.parametrize("granularity", ["row", "tile"])
def test_gathering_a_payload_is_quantising_the_gathered(granularity: str) -> None:
    """Quantising is row by row, so it may come before the move; a padding row is what quantising zeros gives."""
    row_map = route_map(routing(40, 3, 5, seed=10), 5)
    x = normal(40, 272, 11)
    q, _ = gather_rows(quantize(x, granularity, E5M2), row_map)
    expected = quantize(gather_rows(x, row_map)[0], granularity, E5M2)
    assert torch.equal(q.payload.view(torch.uint8), expected.payload.view(torch.uint8))
    assert torch.equal(q.scale, expected.scale)
    assert q.granularity == granularity
    assert (q.tile_exponent is None) == (granularity == "tile")
    if q.tile_exponent is not None:
        assert torch.equal(q.tile_exponent, expected.tile_exponent)
    padding = row_map.source < 0
    assert (q.scale[padding] == 2.0**-126).all() and not q.payload.view(torch.uint8)[padding].any()


def test_nan_token_stays_in_its_rows() -> None:
    row_map = route_map(routing(12, 2, 3, seed=12, drop=0), 3)
    x = normal(12, 32, 13)
    x[5, 3] = torch.nan
    buffer = dequantize(gather_rows(quantize(x, "row"), row_map)[0])
    assert set(buffer.isnan().any(1).nonzero()[:, 0].tolist()) == set(row_map.destination[5].tolist())
    y = combine_rows(buffer.bfloat16(), row_map)
    assert y.isnan().nonzero().tolist() == [[5, 3]]


def test_no_tokens() -> None:
    row_map = route_map(torch.empty(0, 4, dtype=torch.int32), 3)
    buffer, prob = gather_rows(torch.empty(0, 32, dtype=torch.bfloat16), row_map, torch.empty(0, 4))
    assert buffer.shape == (row_map.rows, 32) and not buffer.any() and not prob.any()
    assert combine_rows(buffer, row_map).shape == (0, 32)
    assert copies_of_rows(prob, row_map).shape == (0, 4)


def test_refusals() -> None:
    index = routing(6, 2, 3)
    with pytest.raises(ValueError, match="expert_index has 3; ids are 0 .. 2, and -1"):
        route_map(torch.full((2, 2), 3, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="expert_index has -2"):
        route_map(torch.full((2, 2), -2, dtype=torch.int32), 3)
    with pytest.raises(TypeError, match=r"must be int32, got torch.int64; use expert_index.int\(\)"):
        route_map(index.long(), 3)
    with pytest.raises(ValueError, match=r"\[tokens, K\] with K >= 1, got shape \(12,\)"):
        route_map(index.flatten(), 3)
    with pytest.raises(ValueError, match="rows must be a positive multiple of 128, got 100"):
        route_map(index, 3, rows=100)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        route_map(index, 0)
    row_map = route_map(index, 3)
    with pytest.raises(ValueError, match=r"must be \[6, cols\]; got shape \(5, 32\)"):
        gather_rows(normal(5, 32, 1), row_map)
    with pytest.raises(ValueError, match="multiple of 16 columns"):
        gather_rows(normal(6, 24, 1), row_map)
    with pytest.raises(ValueError, match="cannot gather rows of a block payload"):
        gather_rows(quantize(normal(6, 32, 1), "block"), row_map)
    with pytest.raises(ValueError, match=r"prob must be contiguous fp32 \(6, 2\), got torch.float64"):
        gather_rows(normal(6, 32, 1), row_map, torch.rand(6, 2).double())
    with pytest.raises(ValueError, match=rf"y must be \[{row_map.rows}, cols\]"):
        combine_rows(normal(6, 32, 1), row_map)
    with pytest.raises(TypeError, match="y must be bfloat16"):
        combine_rows(normal(row_map.rows, 32, 1).float(), row_map)
    with pytest.raises(ValueError, match=r"weight must be contiguous fp32 \(6, 2\)"):
        combine_rows(normal(row_map.rows, 32, 1), row_map, torch.rand(6))
    with pytest.raises(ValueError, match=rf"values must have shape \({row_map.rows},\)"):
        copies_of_rows(torch.rand(6), row_map)
