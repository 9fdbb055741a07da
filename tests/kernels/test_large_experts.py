"""More than 2**31 elements in one grouped buffer, or in the weights or gradients of one layer's experts: the last of it comes out as it does alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from assertions import assert_bitwise, assert_snr

from fp8_recipes import kernels
from fp8_recipes.reference import GroupedTensor
from fp8_recipes.reference.dispatch import row_layout
from fp8_recipes.tensor import ScaledTensor

DEVICE = "cuda"
ROWS, COLS, LAST = 70016, 32768, 256
EXPERTS, N, K = 72, 8192, 4096
assert min(ROWS * COLS, EXPERTS * N * K) > 2**31

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one Hopper GPU")]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> None:
    """Without the poison of conftest.py: filling these outputs takes longer than the kernels."""


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def signs_and_mantissas(*shape: int) -> torch.Tensor:
    """bf16 between 1 and 2 or their negatives, so that every group has the same scale and a fold shifts nothing."""
    torch.manual_seed(0)
    values = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    for part in values.view(-1, shape[-1]).split(8192):
        part.copy_((torch.rand_like(part) + 1) * (torch.randint_like(part, 0, 2) * 2 - 1))
    return values


@pytest.fixture(scope="module")
def x() -> Iterator[torch.Tensor]:
    yield signs_and_mantissas(ROWS, COLS)


def last(q: ScaledTensor) -> ScaledTensor:
    """The last rows; what belongs to a row as it is stored for them alone."""
    exponent = None if q.tile_exponent is None else q.tile_exponent[-LAST:].contiguous()
    return ScaledTensor(q.payload[-LAST:].contiguous(), q.scale[-LAST:].contiguous(), q.granularity, tile_exponent=exponent)


def two_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, block_expert): the second expert has the last rows."""
    blocks = torch.zeros(ROWS // 128, dtype=torch.int32, device=DEVICE)
    blocks[-LAST // 128 :] = 1
    return torch.tensor([0, ROWS - LAST, ROWS], dtype=torch.int32, device=DEVICE), blocks


@pytest.mark.parametrize("to", ["column_block", "column"])
def test_fold_transpose(x, to):
    q = kernels.quantize(x, "row")
    t = kernels.grouped_fold_transpose(q, *two_groups(), to)
    assert torch.equal(t.payload[:, -LAST:].view(torch.uint8), q.payload[-LAST:].view(torch.uint8).t())
    assert torch.equal(t.payload[-LAST:].view(torch.uint8), q.payload[:, -LAST:].view(torch.uint8).t())


@pytest.mark.parametrize("promote", [0, 1024])
def test_product_of_many_rows(x, promote):
    """A long operand, then a long result."""
    q, (_, blocks) = kernels.quantize(x, "row"), two_groups()
    for a, shape in ((q, (2, 256, COLS)), (kernels.quantize(x[:, :2048].contiguous(), "row"), (2, COLS, 2048))):
        w = signs_and_mantissas(*shape)
        b = kernels.quantize_experts(list(w), w.abs().amax(dim=(1, 2)).float())
        alone = kernels.grouped_gemm(last(a), GroupedTensor(b.payload[1:], b.scale[1:]), torch.zeros_like(blocks[-LAST // 128 :]), promote=promote)
        assert_snr(alone.float(), kernels.grouped_gemm(a, b, blocks, promote=promote)[-LAST:], 45.0)


def test_weight_gradient_of_many_rows(x):
    q, (offsets, blocks) = kernels.quantize(x, "row"), two_groups()
    a_t, b_t = (kernels.grouped_fold_transpose(p, offsets, blocks) for p in (q, kernels.quantize(x[:, :256].contiguous(), "row")))
    both, alone = (torch.empty(e, COLS, 256, dtype=torch.bfloat16, device=DEVICE) for e in (2, 1))
    kernels.grouped_wgrad(a_t, b_t, offsets, out=both)
    ends = torch.tensor([0, LAST], dtype=torch.int32, device=DEVICE)
    kernels.grouped_wgrad(*(GroupedTensor(t.payload[:, -LAST:].contiguous(), t.scale[1:]) for t in (a_t, b_t)), ends, out=alone)
    assert_snr(alone[0].float(), both[1], 45.0)


def test_weights(x):
    w = signs_and_mantissas(EXPERTS, N, K)
    amax = kernels.measure_experts(list(w))
    assert torch.equal(amax[-1], w[-1].abs().amax().float())
    one = torch.zeros(LAST // 128, dtype=torch.int32, device=DEVICE)
    for transpose in (False, True):
        b = kernels.quantize_experts(list(w), amax, transpose=transpose)
        alone = kernels.quantize_experts([w[-1]], amax[-1:], transpose=transpose)
        assert_bitwise(b.payload[-1], alone.payload[0])
        a = kernels.quantize(x[-LAST:, : b.payload.shape[2]].contiguous(), "row")
        assert_snr(kernels.grouped_gemm(a, alone, one).float(), kernels.grouped_gemm(a, b, one + EXPERTS - 1), 45.0)


@pytest.mark.parametrize(("dtype", "accumulate", "promote"), [("bfloat16", False, 0), ("bfloat16", False, 128), ("float32", True, 0), ("float32", True, 128)])
def test_weight_gradients(x, dtype, accumulate, promote):
    """Groups of 256 rows; with promotion the Gluon kernel, without it Triton's."""
    rows = EXPERTS * LAST
    ends = torch.arange(EXPERTS + 1, dtype=torch.int32, device=DEVICE) * LAST
    blocks = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE).repeat_interleave(LAST // 128)
    a_t, b_t = (kernels.grouped_fold_transpose(kernels.quantize(x[:rows, :cols].contiguous(), "row"), ends, blocks) for cols in (N, K))
    every, alone = (torch.zeros(e, N, K, dtype=getattr(torch, dtype), device=DEVICE) for e in (EXPERTS, 1))
    kernels.grouped_wgrad(a_t, b_t, ends, out=every, accumulate=accumulate, promote=promote)
    tail = (GroupedTensor(t.payload[:, -LAST:].contiguous(), t.scale[-1:]) for t in (a_t, b_t))
    kernels.grouped_wgrad(*tail, ends[:2], out=alone, accumulate=accumulate, promote=promote)
    assert_snr(alone[0].float(), every[-1], 45.0)
    assert alone[0].any()


def test_permutation(x):
    """Two copies of half of the tokens: rows in FP8, rows in bf16, and the sum of both copies."""
    tokens = x[: ROWS // 2]
    index = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE).expand(tokens.shape[0], 2).contiguous()
    row_map, q = kernels.route_map(index, 2), kernels.quantize(tokens, "row")
    places = row_map.destination[-LAST:].long()
    rows, _ = kernels.gather_rows(q, row_map)
    for k in (0, 1):
        assert torch.equal(rows.payload[places[:, k]].view(torch.uint8), q.payload[-LAST:].view(torch.uint8))
    del rows
    copies, _ = kernels.gather_rows(tokens, row_map)
    assert_bitwise(copies[places[:, 1]], tokens[-LAST:])
    assert_bitwise(kernels.combine_rows(copies, row_map)[-LAST:], 2 * tokens[-LAST:])


def test_rows_on_the_wire(x):
    index = (torch.arange(ROWS, device=DEVICE, dtype=torch.int32) % 2)[:, None].contiguous()
    prob = torch.rand(ROWS, 1, device=DEVICE)
    q, send = kernels.quantize(x, "row"), kernels.send_map(index, 2, 2)
    buffer = kernels.pack_rows(q, send, ROWS, index, prob)
    arrived, ids, arrived_prob = kernels.unpack_rows(buffer, row_layout(q, 1), q.payload.dtype)
    places = send.row_of_copy[-LAST:, 0].long()
    assert torch.equal(arrived.payload[places].view(torch.uint8), q.payload[-LAST:].view(torch.uint8))
    assert torch.equal(arrived.scale[places], q.scale[-LAST:]) and torch.equal(arrived_prob[places], prob[-LAST:])
    assert not ids[places].any(), "expert 0 of either rank"
    del buffer, arrived
    sent = torch.empty_like(x)
    sent[send.row_of_copy[:, 0].long()] = x
    assert_bitwise(kernels.combine_sent(sent, send)[-LAST:], x[-LAST:])


def test_swiglu_with_probabilities_and_its_gradient(x):
    prob = torch.rand(ROWS, device=DEVICE) + 0.5
    tail = prob[-LAST:].contiguous()
    q, saved = kernels.swiglu_quantize_saving(x, "row", prob=prob)
    alone, alone_saved = kernels.swiglu_quantize_saving(x[-LAST:], "row", prob=tail)
    assert_bitwise(last(q), alone)
    assert_bitwise(last(saved), alone_saved)
    assert_bitwise(last(kernels.swiglu_quantize(saved, "row", prob=prob)), kernels.swiglu_quantize(alone_saved, "row", prob=tail))
    dy = x[:, : COLS // 2].contiguous()
    dh, dprob = kernels.swiglu_backward_quantize(dy, saved, "row", prob=prob)
    alone_dh, alone_dprob = kernels.swiglu_backward_quantize(dy[-LAST:], alone_saved, "row", prob=tail)
    assert_bitwise(last(dh), alone_dh)
    assert torch.equal(dprob[-LAST:], alone_dprob)
