"""The grouped reference against float64, and against the ungrouped operations it is made of."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, snr_db

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2, is_power_of_two
from fp8_recipes.reference.grouped import (
    SMALLEST_SCALE,
    GroupedTensor,
    grouped_fold_transpose,
    grouped_gemm,
    grouped_wgrad,
    scaling_aware_transpose,
)
from fp8_recipes.tensor import ScaledTensor

SIZES = (256, 0, 128, 1)
OFFSETS = torch.tensor([0, 256, 256, 384, 512], dtype=torch.int32)
BLOCK_EXPERT = torch.tensor([0, 0, 2, 3, -1], dtype=torch.int32)
ROWS, USED = 640, 512


def buffer(cols: int, fmt=E4M3, seed: int = 0) -> ScaledTensor:
    """Rows of four experts, 0, 2 and 3 of them used; expert 3 has one token and 127 rows of padding, expert 0 seven rows of padding."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, cols, generator=gen) * torch.exp2(torch.randint(-6, 7, (ROWS, 1), generator=gen).float())
    x[249:256], x[385:] = 0, 0
    return reference.quantize(x, "row", fmt)


def weights(n: int, k: int, granularity: str) -> GroupedTensor:
    w = [reference.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(e)), granularity) for e in range(4)]
    return GroupedTensor(torch.stack([q.payload for q in w]), torch.stack([q.scale for q in w]))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_gemm_against_float64(granularity: str, fmt) -> None:
    a, b = buffer(48, fmt), weights(24, 48, granularity)
    out = torch.full((ROWS, 24), torch.nan)
    assert grouped_gemm(a, b, BLOCK_EXPERT, out=out) is out
    assert out[USED:].isnan().all() and (out[385:USED] == 0).all() and (out[249:256] == 0).all()
    x = reference.dequantize(a).double()
    w = b.payload.double() * (b.scale[:, :, None] if granularity == "row" else b.scale[:, None, None])
    want = torch.cat([x[:256] @ w[0].t(), x[256:384] @ w[2].t(), x[384:USED] @ w[3].t()])
    assert snr_db(want, out[:USED]) > 120
    assert grouped_gemm(a, b, BLOCK_EXPERT).dtype == torch.bfloat16


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad_against_float64(accumulate: bool) -> None:
    dy, x = buffer(32, E5M2, 1), buffer(48, E4M3, 2)
    dy_t, x_t = (grouped_fold_transpose(q, OFFSETS, BLOCK_EXPERT) for q in (dy, x))
    before = torch.randn(4, 32, 48)
    out = grouped_wgrad(dy_t, x_t, OFFSETS, out=before.clone(), accumulate=accumulate)
    want = before.double() if accumulate else torch.zeros(4, 32, 48, dtype=torch.float64)
    for e in range(4):
        group = slice(OFFSETS[e], OFFSETS[e + 1])
        dy_e, x_e = ((q.payload[:, group].double() * q.scale[e, :, None]) for q in (dy_t, x_t))
        want[e] += dy_e @ x_e.t()
    assert snr_db(want, out) > 120
    assert torch.equal(out[1], before[1] if accumulate else torch.zeros(32, 48))
    separate = [t.clone() for t in before]
    assert grouped_wgrad(dy_t, x_t, OFFSETS, out=separate, accumulate=accumulate) is separate
    assert_bitwise(torch.stack(separate), out)


def test_wgrad_follows_the_unquantised_gradient() -> None:
    dy, x = torch.randn(ROWS, 32), torch.randn(ROWS, 48)
    operands = [grouped_fold_transpose(reference.quantize(t, "tile", fold="row"), OFFSETS, BLOCK_EXPERT) for t in (dy, x)]
    out = grouped_wgrad(*operands, OFFSETS, out=torch.empty(4, 32, 48))
    assert snr_db(dy[:256].t().double() @ x[:256].double(), out[0]) > 25


@pytest.mark.parametrize("granularity", ["row", "tile", "micro"])
def test_fold_transpose_is_the_fold_of_each_expert(granularity: str) -> None:
    x = reference.dequantize(buffer(272))
    x[17, 5] = torch.nan
    q = reference.quantize(x, granularity)
    got = grouped_fold_transpose(q, OFFSETS, BLOCK_EXPERT)
    assert got.payload.shape == (272, ROWS) and got.scale.shape == (4, 272)
    assert (got.scale[1] == SMALLEST_SCALE).all() and bool(is_power_of_two(got.scale).all())
    assert bool(got.payload[5, 17].isnan())
    for e, rows in ((0, slice(0, 256)), (2, slice(256, 384)), (3, slice(384, 512))):
        alone = reference.fold_transpose(reference.quantize(x[rows], granularity))
        assert_bitwise(got.payload[:, rows], alone.payload)
        assert_bitwise(got.scale[e], alone.scale)


def test_padding_decides_nothing() -> None:
    """One tiny token among 127 padding rows keeps its own precision."""
    x = torch.zeros(ROWS, 128)
    x[384] = torch.randn(128) * 2.0**-100
    got = grouped_fold_transpose(reference.quantize(x, "row"), OFFSETS, BLOCK_EXPERT)
    assert snr_db(x[384].double(), got.payload[:, 384].double() * got.scale[3]) > 28


@pytest.mark.parametrize("rows", [256, 200])
def test_scaling_aware_transpose_takes_the_largest_row_scale_of_a_tile(rows: int) -> None:
    x = torch.randn(rows, 160) * torch.exp2(torch.randint(-3, 4, (rows, 1)).float())
    x[3, 7] = torch.nan
    q = reference.quantize(x, "tile")
    got = scaling_aware_transpose(q)
    assert got.payload.shape == (160, rows) and got.scale.shape == (2, 160)
    assert torch.equal(got.scale[1, :128], q.scale[128:, 0].amax().expand(128)) and torch.equal(got.scale[0, 128:], q.scale[:128, 1].amax().expand(32))
    back = (got.payload.float() * got.scale.repeat_interleave(128, dim=0)[:rows].t()).t()
    assert bool(back[3, 7].isnan())
    assert snr_db(x.nan_to_num().double(), back.nan_to_num()) > 30


def test_scaling_aware_transpose_rounds_into_the_subnormals() -> None:
    """1.875 * 2**-6 ten exponents down is 0.015 of the smallest subnormal: zero, where the authors' code keeps the mantissa (7 * 2**-9)."""
    payload = torch.zeros(128, 128)
    payload[0], payload[1] = 1.875 * 2**-6, 1.75 * 2**-6
    scale = torch.ones(128, 1) * 2.0**-10
    scale[1], scale[2] = 2.0**-3, 1.0
    got = scaling_aware_transpose(ScaledTensor(payload.to(E4M3.dtype), scale, "tile")).payload.float()
    assert (got[:, 0] == 0).all() and (got[:, 1] == 2 * 2.0**-9).all()  # 1.75 units of 2**-9, to nearest


def wgrad_into(out: list[torch.Tensor]) -> None:
    grouped_wgrad(*(grouped_fold_transpose(buffer(cols), OFFSETS, BLOCK_EXPERT) for cols in (32, 48)), OFFSETS, out=out)


BAD_PAYLOAD = torch.zeros(4, 16, 32).to(E4M3.dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupedTensor(BAD_PAYLOAD, torch.ones(3)), "needs a scale of shape"),
        (lambda: GroupedTensor(BAD_PAYLOAD[0], torch.ones(4, 15)), "needs a scale of shape"),
        (lambda: grouped_gemm(buffer(48), weights(16, 32, "row"), BLOCK_EXPERT), "contraction lengths differ"),
        (lambda: grouped_gemm(buffer(32), weights(16, 32, "row"), BLOCK_EXPERT[:4]), "block_expert must be"),
        (lambda: grouped_gemm(reference.quantize(torch.ones(ROWS, 32), "tile"), weights(16, 32, "row"), BLOCK_EXPERT), "fold it to rows"),
        (lambda: grouped_gemm(buffer(32), weights(16, 32, "row"), BLOCK_EXPERT, out=torch.zeros(ROWS, 17)), "out must be contiguous of shape"),
        (lambda: grouped_gemm(reference.quantize(torch.ones(130, 32), "row"), weights(16, 32, "row"), BLOCK_EXPERT), "multiple of 128 rows, got 130"),
        (lambda: grouped_fold_transpose(buffer(32), OFFSETS + 1, BLOCK_EXPERT), "rise in multiples of 128"),
        (lambda: grouped_fold_transpose(ScaledTensor(buffer(32).payload, buffer(32).scale, "row"), OFFSETS, BLOCK_EXPERT), "tile exponents"),
        (
            lambda: grouped_wgrad(*(GroupedTensor(BAD_PAYLOAD[0, :, :0], torch.ones(4, 16)),) * 2, OFFSETS, out=torch.zeros(4, 16, 16)),
            "multiple of 128 rows, got 0",
        ),
        (lambda: grouped_gemm(buffer(32), weights(16, 32, "row"), BLOCK_EXPERT, promote=100), "promote=100 must be 0"),
        (lambda: wgrad_into([torch.zeros(32, 48)] * 3), "out has 3 matrices for 4 experts"),
        (lambda: wgrad_into([torch.zeros(32, 48) for _ in range(3)] + [torch.zeros(48, 32)]), r"out\[3\] must be contiguous of shape \(32, 48\)"),
        (lambda: wgrad_into([torch.zeros(32, 48)] * 4), "two experts' gradients are the same memory"),
        (lambda: wgrad_into([torch.zeros(32, 48, dtype=t) for t in (torch.float32,) * 3 + (torch.bfloat16,)]), r"out\[3\] is torch.bfloat16"),
    ],
)
def test_bad_input_names_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_dtypes() -> None:
    with pytest.raises(TypeError, match="int32"):
        grouped_gemm(buffer(32), weights(16, 32, "row"), BLOCK_EXPERT.long())
    with pytest.raises(TypeError, match="the result must be bfloat16 or float32, got torch.float16"):
        wgrad_into([torch.zeros(32, 48, dtype=torch.float16) for _ in range(4)])
    with pytest.raises(TypeError, match="float32"):
        GroupedTensor(BAD_PAYLOAD, torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="FP8"):
        GroupedTensor(torch.zeros(4, 16, 32), torch.ones(4))
