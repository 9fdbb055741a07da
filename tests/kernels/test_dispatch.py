"""send_map, pack_rows, unpack_rows and what comes back: the reference, bit for bit."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise
from data import nasty

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.kernels import combine_sent, copies_of_sent, gather_rows, pack_rows, send_map, unpack_rows
from fp8_recipes.reference import SendMap
from fp8_recipes.reference.dispatch import row_layout
from fp8_recipes.tensor import ScaledTensor

module = import_module("fp8_recipes.kernels.dispatch")


def routing(tokens: int, k: int, experts: int, device: torch.device, seed: int = 0, drop: float = 0.1) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, k), generator=gen, dtype=torch.int32)
    return index.masked_fill(torch.rand(tokens, k, generator=gen) < drop, -1).to(device)


def assert_same_map(actual: SendMap, expected: SendMap) -> None:
    for field in ("header", "row_of_copy", "destination"):
        assert_bitwise(getattr(actual, field), getattr(expected, field), field)
    assert (actual.num_experts, actual.ranks) == (expected.num_experts, expected.ranks)


ROUTINGS = [
    ("two ranks", 60, 3, 6, 2, 0.1),
    ("several blocks of tokens", 200, 2, 8, 4, 0.1),
    ("one rank", 20, 2, 4, 1, 0.1),
    ("three ranks, top 8", 30, 8, 12, 3, 0.2),
    ("more ranks than copies", 25, 2, 36, 18, 0.1),
    ("top 1", 70, 1, 4, 4, 0.0),
    ("one token", 1, 4, 8, 2, 0.0),
    ("all dropped", 9, 2, 4, 2, 1.1),
    ("no tokens", 0, 4, 4, 2, 0.0),
]


@pytest.mark.parametrize(("tokens", "k", "experts", "ranks", "drop"), [case[1:] for case in ROUTINGS], ids=[case[0] for case in ROUTINGS])
def test_send_map(device, tokens, k, experts, ranks, drop):
    index = routing(tokens, k, experts, device, drop=drop)
    assert_same_map(send_map(index, experts, ranks, tag=7), reference.send_map(index, experts, ranks, tag=7))


def test_send_map_with_more_blocks_than_the_scan_takes_at_once(device, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 4)
    index = routing(600, 2, 6, device)
    assert_same_map(send_map(index, 6, 3), reference.send_map(index, 6, 3))


def test_send_map_all_to_one_rank(device):
    index = torch.full((150, 3), 5, dtype=torch.int32, device=device)
    actual = send_map(index, 8, 4)
    assert_same_map(actual, reference.send_map(index, 8, 4))
    assert actual.header.tolist() == [0, 0, 150, 0, 0, 0, 450, 0, 0, 8, 3, 0]


def test_ids_that_do_not_exist_are_counted_and_dropped(device):
    index = routing(100, 3, 8, device, seed=2)
    index[3, 1], index[70, 0], index[99, 2] = 8, -5, 1 << 30
    actual = send_map(index, 8, 2)
    assert_same_map(actual, reference.send_map(index, 8, 2))
    assert int(actual.header[4]) == 3


def case(device: torch.device, cols: int, k: int, ranks: int, granularity: str = "micro", fmt: str = "e4m3", tokens: int = 23) -> tuple:
    """(q, prob, expert_index, map, rows)."""
    q = reference.quantize(nasty(tokens, cols, device, seed=k), granularity, FORMATS[fmt], fold="row" if granularity != "row" else None)
    prob = torch.rand(tokens, k, generator=torch.Generator().manual_seed(k)).to(device)
    index = routing(tokens, k, 4 * ranks, device, seed=k)
    send = reference.send_map(index, 4 * ranks, ranks)
    return q, prob, index, send, int(send.header[:ranks].sum())


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("cols", "k", "ranks"), [(128, 1, 2), (144, 2, 4), (16, 3, 1), (400, 8, 3), (272, 6, 2)])
def test_pack_and_unpack(device, cols, k, ranks, fmt):
    q, prob, index, send, rows = case(device, cols, k, ranks, fmt=fmt)
    for routed in ((index, prob), (None, None)):
        layout = row_layout(q, 0 if routed[0] is None else k)
        buffer = pack_rows(q, send, rows, *routed)
        expected = reference.pack_rows(q, send, rows, *routed)
        assert_bitwise(buffer, expected, "buffer")
        for actual, wanted, name in zip(unpack_rows(buffer, layout, q.payload.dtype), reference.unpack_rows(expected, layout, q.payload.dtype),
                                        ("q", "ids", "prob"), strict=True):  # fmt: skip
            assert (actual is None) == (wanted is None)
            if wanted is not None:
                assert_bitwise(actual, wanted, name)


def test_received_rows_are_gathered_where_they_lie(device):
    q, prob, index, send, rows = case(device, 144, 3, 2)
    layout = row_layout(q, 3)
    buffer = pack_rows(q, send, rows, index, prob)
    received, ids, arrived = unpack_rows(buffer, layout, q.payload.dtype)
    assert received.payload.data_ptr() == buffer.data_ptr() and received.payload.stride(0) == layout.nbytes > 144
    row_map = reference.route_map(ids.clamp(max=3), 4)
    apart = ScaledTensor(received.payload.contiguous(), received.scale.contiguous(), "row", tile_exponent=received.tile_exponent.contiguous())
    expected, expected_prob = reference.gather_rows(apart, row_map, arrived)
    for gather in (reference.gather_rows, gather_rows):
        actual, actual_prob = gather(received, row_map, arrived)
        assert_bitwise(actual, expected)
        assert_bitwise(actual_prob, expected_prob, "prob")


def test_pack_without_tile_exponents(device):
    q, prob, index, send, rows = case(device, 64, 2, 2, "row")
    q = ScaledTensor(q.payload, q.scale, "row")
    buffer = pack_rows(q, send, rows, index, prob)
    assert_bitwise(buffer, reference.pack_rows(q, send, rows, index, prob), "buffer")
    assert unpack_rows(buffer, row_layout(q, 2), q.payload.dtype)[0].tile_exponent is None


def test_wide_rows_take_several_steps(device):
    q, prob, index, send, rows = case(device, 16400, 2, 2, "row", tokens=5)
    buffer = pack_rows(q, send, rows, index, prob)
    assert_bitwise(buffer, reference.pack_rows(q, send, rows, index, prob), "buffer")
    assert_bitwise(unpack_rows(buffer, row_layout(q, 2), q.payload.dtype)[0], reference.unpack_rows(buffer, row_layout(q, 2), q.payload.dtype)[0])


@pytest.mark.parametrize(("cols", "k", "ranks"), [(16, 1, 2), (144, 3, 2), (1040, 2, 4), (48, 8, 3)])
def test_combine_sent(device, cols, k, ranks):
    _, _, _, send, rows = case(device, 16, k, ranks)
    gen = torch.Generator().manual_seed(cols)
    y = (torch.randn(rows, cols, generator=gen) * torch.exp2(torch.randint(-140, 90, (rows, 1), generator=gen).float())).bfloat16().to(device)
    assert_bitwise(combine_sent(y, send), reference.combine_sent(y, send))
    y[rows - 1, 3] = torch.nan
    token = int((send.destination == rows - 1).any(1).nonzero())
    assert combine_sent(y, send).isnan().nonzero().tolist() == [[token, 3]]


@pytest.mark.parametrize(("k", "ranks"), [(1, 2), (3, 4), (8, 2)])
def test_copies_of_sent(device, k, ranks):
    _, _, _, send, rows = case(device, 16, k, ranks)
    values = torch.randn(rows, k, generator=torch.Generator().manual_seed(k)).to(device)
    assert_bitwise(copies_of_sent(values, send), reference.copies_of_sent(values, send))


@pytest.mark.parametrize(("tokens", "drop"), [(0, 0.0), (6, 1.1)], ids=["no tokens", "all dropped"])
def test_nothing_to_send(device, tokens, drop):
    index = routing(tokens, 2, 4, device, drop=drop)
    send = send_map(index, 4, 2)
    payload = torch.zeros(tokens, 32, device=device).to(torch.float8_e4m3fn)
    q = ScaledTensor(payload, torch.ones(tokens, device=device), "row")
    buffer = pack_rows(q, send, 0, index, torch.rand(tokens, 2, device=device))
    assert buffer.shape == (0, row_layout(q, 2).nbytes)
    received, ids, prob = unpack_rows(buffer, row_layout(q, 2), torch.float8_e4m3fn)
    assert received.shape == (0, 32) and ids.shape == prob.shape == (0, 2)
    assert_bitwise(combine_sent(torch.empty(0, 32, dtype=torch.bfloat16, device=device), send), torch.zeros(tokens, 32, dtype=torch.bfloat16, device=device))
    assert_bitwise(copies_of_sent(torch.empty(0, 2, device=device), send), torch.zeros(tokens, 2, device=device))


def test_bad_input(device):
    q, prob, index, send, rows = case(device, 32, 2, 2)
    with pytest.raises(TypeError, match="must be int32"):
        send_map(index.long(), 8, 2)
    with pytest.raises(ValueError, match="num_experts = 8 cannot be shared equally by 3 ranks"):
        send_map(index, 8, 3)
    with pytest.raises(ValueError, match="travel together"):
        pack_rows(q, send, rows, index)
    with pytest.raises(ValueError, match="prob must be contiguous"):
        pack_rows(q, send, rows, index, prob[:, :1])
    with pytest.raises(ValueError, match="buffer must be contiguous uint8"):
        unpack_rows(torch.zeros(3, 32, dtype=torch.uint8, device=device), row_layout(q, 2), q.payload.dtype)
    with pytest.raises(ValueError, match="one value per copy"):
        copies_of_sent(torch.zeros(rows, 3, device=device), send)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "ranks", "cols"),
    [(16384, 6, 64, 2, 2048), (4096, 8, 256, 32, 7168), (8192, 8, 128, 8, 2048), (16384, 8, 256, 64, 7168)],
    ids=str,
)
def test_real_sizes(device, tokens, k, experts, ranks, cols):
    index = routing(tokens, k, experts, device, drop=0.01)
    send = send_map(index, experts, ranks, 3)
    assert_same_map(send, reference.send_map(index, experts, ranks, 3))
    rows = int(send.header[:ranks].sum())
    q = reference.quantize(torch.randn(tokens, cols, device=device).bfloat16(), "micro", fold="row")
    prob = torch.rand(tokens, k, device=device)
    buffer = pack_rows(q, send, rows, index, prob)
    assert_bitwise(buffer, reference.pack_rows(q, send, rows, index, prob), "buffer")
    layout = row_layout(q, k)
    for actual, wanted in zip(unpack_rows(buffer, layout, q.payload.dtype), reference.unpack_rows(buffer, layout, q.payload.dtype), strict=True):
        assert_bitwise(actual, wanted)
    y, values = torch.randn(rows, cols, device=device).bfloat16(), torch.randn(rows, k, device=device)
    assert_bitwise(combine_sent(y, send), reference.combine_sent(y, send))
    assert_bitwise(copies_of_sent(values, send), reference.copies_of_sent(values, send))
