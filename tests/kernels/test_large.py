"""More than 2**31 elements in one tensor, as the logits of 128k tokens are: the last rows come out as they do alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from assertions import assert_bitwise, assert_snr

from fp8_recipes import kernels
from fp8_recipes.formats import E5M2
from fp8_recipes.tensor import ScaledTensor

ROWS, COLS, LAST = 70016, 32768, 256
assert ROWS * COLS > 2**31

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one Hopper GPU")]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> None:
    """Without the poison of conftest.py: filling these outputs takes longer than the kernels."""


@pytest.fixture(scope="module")
def x() -> Iterator[torch.Tensor]:
    """Between 1 and 2 or their negatives, so that every group has the same scale and a fold shifts nothing."""
    torch.manual_seed(0)
    values = torch.empty(ROWS, COLS, device="cuda", dtype=torch.bfloat16)
    for part in values.split(8192):
        part.copy_((torch.rand_like(part) + 1) * (torch.randint_like(part, 0, 2) * 2 - 1))
    yield values
    del values
    torch.cuda.empty_cache()


def last(q: ScaledTensor) -> ScaledTensor:
    """The last rows; what belongs to a row as it is stored for them alone."""
    exponent = None if q.tile_exponent is None else q.tile_exponent[-LAST:].contiguous()
    return ScaledTensor(q.payload[-LAST:].contiguous(), q.scale[-LAST:].contiguous(), q.granularity, tile_exponent=exponent)


@pytest.mark.parametrize(("granularity", "fold"), [("micro", "row"), ("tile", None), ("row", None)])
def test_quantize(x, granularity, fold):
    assert_bitwise(last(kernels.quantize(x, granularity, fold=fold)), kernels.quantize(x[-LAST:], granularity, fold=fold))


def test_fold_transpose(x):
    q = kernels.quantize(x, "micro", fold="row")
    t = kernels.fold_transpose(q)
    assert t.payload.shape == (COLS, ROWS)
    assert torch.equal(t.payload[:, -LAST:].view(torch.uint8), q.payload[-LAST:].view(torch.uint8).t())
    assert torch.equal(t.payload[-LAST:].view(torch.uint8), q.payload[:, -LAST:].view(torch.uint8).t())


def test_rmsnorm(x):
    gamma = torch.ones(COLS, device="cuda", dtype=torch.bfloat16)
    q, rstd = kernels.rmsnorm_quantize(x, gamma, 1e-5, "micro", fold="row")
    alone, alone_rstd = kernels.rmsnorm_quantize(x[-LAST:], gamma, 1e-5, "micro", fold="row")
    assert_bitwise(last(q), alone)
    assert torch.equal(rstd[-LAST:], alone_rstd)


def test_rmsnorm_add_and_its_gradient(x):
    gain = torch.ones(COLS, device="cuda", dtype=torch.bfloat16)
    y, rstd = kernels.rmsnorm_add(x, x, gain)
    alone, alone_rstd = kernels.rmsnorm_add(x[-LAST:], x[-LAST:], gain)
    assert_bitwise(y[-LAST:], alone)
    assert torch.equal(rstd[-LAST:], alone_rstd)
    dx, _ = kernels.rmsnorm_add_backward(y, x, gain, rstd)
    assert_bitwise(dx[-LAST:], kernels.rmsnorm_add_backward(alone, x[-LAST:], gain, alone_rstd)[0])


def test_queries_and_keys_and_their_gradient(x):
    alpha, heads = torch.tensor(0.5, device="cuda"), 2
    angles = torch.outer(torch.arange(ROWS, device="cuda").float(), 10000.0 ** (-torch.arange(64, device="cuda") / 64))
    whole = kernels.qkv_tanh_rotary(x, alpha, alpha, angles, heads)
    alone = kernels.qkv_tanh_rotary(x[-LAST:], alpha, alpha, angles[-LAST:], heads)
    for y, expected in zip(whole, alone, strict=True):
        assert_bitwise(y[-LAST:], expected)
    dx = kernels.qkv_tanh_rotary_backward(*whole, x, alpha, alpha, angles, heads)[0]
    assert_bitwise(dx[-LAST:], kernels.qkv_tanh_rotary_backward(*alone, x[-LAST:], alpha, alpha, angles[-LAST:], heads)[0])


def test_swiglu_and_its_gradient(x):
    assert_bitwise(last(kernels.swiglu_quantize(x, "micro", fold="row")), kernels.swiglu_quantize(x[-LAST:], "micro", fold="row"))
    dy = x[:, : COLS // 2].contiguous()
    q = kernels.swiglu_backward_quantize(dy, x, "micro", fold="row")
    assert_bitwise(last(q), kernels.swiglu_backward_quantize(dy[-LAST:], x[-LAST:], "micro", fold="row"))


def test_loss_and_its_gradient(x):
    labels = torch.randint(0, COLS, (ROWS,), device="cuda")
    dloss = torch.full((ROWS,), 2.0**-17, device="cuda")
    parts = kernels.softmax_parts(x, labels)
    alone = kernels.softmax_parts(x[-LAST:], labels[-LAST:])
    for whole, part in zip(parts, alone, strict=True):
        assert torch.equal(whole[-LAST:], part)
    lse, target = parts[0] + parts[1].log(), parts[2]
    q = kernels.cross_entropy_backward_quantize(x, labels, lse, target, dloss, "row", E5M2)
    tail = kernels.cross_entropy_backward_quantize(x[-LAST:], labels[-LAST:], lse[-LAST:], target[-LAST:], dloss[-LAST:], "row", E5M2)
    assert_bitwise(last(q), tail)


def test_gemm_in_both_roles(x):
    q = kernels.quantize(x, "row")
    small = kernels.quantize(torch.randn(256, COLS, device="cuda").bfloat16(), "row")
    assert_snr(kernels.gemm(q, small, promote=2048)[-LAST:], kernels.gemm(last(q), small, promote=2048).float(), 45.0)
    tall = kernels.quantize(torch.randn(ROWS, 256, device="cuda").bfloat16(), "row")
    wide = kernels.quantize(torch.randn(COLS, 256, device="cuda").bfloat16(), "row")
    assert_snr(kernels.gemm(tall, wide)[-LAST:], kernels.gemm(last(tall), wide).float(), 45.0)
