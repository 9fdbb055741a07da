"""Send maps and rows on the wire, worked out by hand. Whole dispatches over processes: tests/nn/test_dispatch.py."""

from __future__ import annotations

import struct

import pytest
import torch
from assertions import assert_bitwise

from fp8_recipes.reference import combine_sent, copies_of_sent, pack_rows, quantize, send_map, unpack_rows
from fp8_recipes.reference.dispatch import row_layout
from fp8_recipes.tensor import ScaledTensor

INDEX = torch.tensor([[0, 5, 1], [4, -1, 7], [-1, -1, -1], [3, 2, 6]], dtype=torch.int32)
"""Of 8 experts over 4 ranks: token 0 goes to ranks 0 and 2, token 1 to 2 and 3, token 2 nowhere, token 3 to 1 and 3."""


def test_send_map() -> None:
    send = send_map(INDEX, 8, 4, tag=9)
    rows, copies, rest = send.header[:4].tolist(), send.header[4:8].tolist(), send.header[8:].tolist()
    assert (rows, copies, rest) == ([1, 1, 2, 2], [2, 2, 2, 2], [0, 8, 3, 9])
    assert send.destination.tolist() == [[0, 2, -1], [3, 4, -1], [-1, -1, -1], [1, 5, -1]]
    assert send.row_of_copy.tolist() == [[0, 2, 0], [3, -1, 4], [-1, -1, -1], [1, 1, 5]]
    assert (send.tokens, send.copies_per_token, send.local_experts) == (4, 3, 2)


def test_one_row_of_bytes() -> None:
    """Payload, scale, probabilities, ids, tile exponents, zeros, each where the layout says."""
    q = quantize(torch.randn(4, 272, generator=torch.Generator().manual_seed(0)).bfloat16(), "tile", fold="row")
    prob = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    send, layout = send_map(INDEX, 8, 4), row_layout(q, 3)
    assert (layout.prob_at, layout.id_at, layout.tile_at, layout.used, layout.nbytes) == (276, 288, 294, 297, 304)
    buffer = pack_rows(q, send, 6, INDEX, prob)
    assert q.tile_exponent is not None
    p = prob.tolist()
    for row, token, ids, probs in ((0, 0, (0, -1, 1), (p[0][0], 0, p[0][2])), (2, 0, (-1, 1, -1), (0, p[0][1], 0)), (5, 3, (-1, -1, 0), (0, 0, p[3][2]))):
        numbers = struct.pack("=f3f3h", float(q.scale[token]), *probs, *ids)
        expected = bytes(q.payload[token].view(torch.uint8).tolist()) + numbers + bytes(q.tile_exponent[token].tolist()) + bytes(7)
        assert bytes(buffer[row].tolist()) == expected, f"row {row}"
    received, ids, prob_here = unpack_rows(buffer, layout, q.payload.dtype)
    token = torch.tensor([0, 3, 0, 1, 1, 3])
    assert received.tile_exponent is not None and ids is not None and prob_here is not None
    assert_bitwise(received.payload.view(torch.uint8), q.payload.view(torch.uint8)[token])
    assert_bitwise(received.scale, q.scale[token])
    assert_bitwise(received.tile_exponent, q.tile_exponent[token])
    assert ids.tolist() == [[0, -1, 1], [1, 0, -1], [-1, 1, -1], [0, -1, -1], [-1, -1, 1], [-1, -1, 0]]
    assert prob_here.count_nonzero() == 8


def test_the_way_back() -> None:
    send = send_map(INDEX, 8, 4)
    y = 2.0 ** torch.arange(6)[:, None].expand(6, 16)
    assert combine_sent(y.bfloat16().contiguous(), send)[:, 7].tolist() == [1 + 4, 8 + 16, 0, 2 + 32]
    values = torch.arange(18.0).view(6, 3)
    assert copies_of_sent(values, send).tolist() == [[0, 7, 2], [9, 0, 14], [0, 0, 0], [3, 4, 17]]


def test_the_sum_is_in_fp32_in_the_order_of_the_ranks() -> None:
    send = send_map(torch.tensor([[0, 1, 2]], dtype=torch.int32), 3, 3)
    y = torch.tensor([1.0, 2.0**-8, 2.0**-8]).view(3, 1).expand(3, 16).bfloat16().contiguous()
    assert combine_sent(y, send).unique().tolist() == [1 + 2.0**-7], "in bf16 each half would have been lost"


def test_bad_input() -> None:
    q, send = quantize(torch.randn(4, 32), "row"), send_map(INDEX, 8, 4)
    prob = torch.rand(4, 3)
    with pytest.raises(ValueError, match="num_experts = 8 cannot be shared equally by 3 ranks; use a multiple"):
        send_map(INDEX, 8, 3)
    with pytest.raises(ValueError, match="are more than the 32767 whose ids travel in 16 bits"):
        send_map(INDEX, 1 << 17, 2)
    with pytest.raises(TypeError, match=r"must be int32, got torch.int64; use expert_index.int\(\)"):
        send_map(INDEX.long(), 8, 4)
    with pytest.raises(ValueError, match=r"q must be \[4, cols\]; got shape \(3, 32\)"):
        pack_rows(quantize(torch.randn(3, 32), "row"), send, 6)
    with pytest.raises(ValueError, match="cannot send rows of a tile payload"):
        pack_rows(quantize(torch.randn(4, 32), "tile"), send, 6)
    with pytest.raises(ValueError, match="multiple of 16 columns"):
        pack_rows(quantize(torch.randn(4, 40), "row"), send, 6)
    with pytest.raises(ValueError, match="expert_index and prob travel together"):
        pack_rows(q, send, 6, None, prob)
    with pytest.raises(ValueError, match="payload of strides"):
        pack_rows(ScaledTensor(q.payload[:, :16], q.scale, "row"), send, 6)
    with pytest.raises(ValueError, match="got torch.float32"):
        combine_sent(torch.randn(6, 16), send)
