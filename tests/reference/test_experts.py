"""The experts' weights: each is the weight of `quantize_weight`, and what cannot be quantised together is named."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, snr_db

from fp8_recipes import ops
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference import measure_experts, quantize_experts, quantize_weight


def weights(experts: int, n: int, k: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(experts * n + k)
    return [(torch.randn(n, k, generator=gen) * 2.0 ** (3 * e - 6)).bfloat16() for e in range(experts)]


@pytest.mark.parametrize("experts", [1, 5])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("increment", [0.0, 0.3])
def test_every_expert_is_quantised_as_a_weight_alone(experts: int, fmt, transpose: bool, increment: float) -> None:
    w = weights(experts, 24, 40)
    amax = measure_experts(w)
    q = quantize_experts(w, amax, increment, fmt, transpose=transpose)
    assert q.payload.shape == ((experts, 40, 24) if transpose else (experts, 24, 40)) and q.scale.shape == (experts,)
    for e in range(experts):
        alone = quantize_weight(w[e], amax[e], increment, fmt, transpose=transpose)
        assert_bitwise(q.payload[e], alone.payload)
        assert_bitwise(q.scale[e], alone.scale)
        back = q.payload[e].double() * q.scale[e]
        assert snr_db(w[e].double(), back.t() if transpose else back) > (30 if fmt == E4M3 else 24)


def test_measure_takes_the_largest_finite_value_of_each() -> None:
    w = weights(4, 8, 16)
    w[1][3, 5], w[1][0, 0] = torch.nan, -torch.inf
    w[2][7, 15] = -1e5
    w[3].zero_()
    amax = measure_experts(w)
    assert amax.dtype == torch.float32
    kept = w[1][w[1].isfinite()].abs().max().float()
    assert torch.equal(amax, torch.stack([w[0].abs().max().float(), kept, w[2][7, 15].float().abs(), torch.zeros(())]))
    q = quantize_experts(w, amax)
    assert q.payload[1].float().isnan().nonzero().tolist() == [[0, 0], [3, 5]], "what is not finite is NaN, alone"
    assert q.scale[3] == 2.0**-126 and not q.payload[3].view(torch.uint8).any()


def test_values_beyond_the_given_maximum_saturate() -> None:
    w = [torch.tensor([[1.0, -8.0, 0.5, 2.0]])]
    q = quantize_experts(w, torch.tensor([1.0]))
    assert (q.payload[0].float() * q.scale[0]).tolist() == [[1.0, -448 * 2.0**-8, 0.5, 448 * 2.0**-8]]


def test_parameters_are_taken_as_they_are() -> None:
    w = [torch.nn.Parameter(t) for t in weights(2, 8, 16)]
    q = ops.quantize_experts(w, ops.measure_experts(w))
    assert not q.payload.requires_grad and not q.scale.requires_grad


ONE = torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.measure_experts([]), ValueError, "weights is empty: a rank needs at least one expert"),
        (lambda: ops.quantize_experts(ONE.expand(2, 8, 16), torch.ones(2)), TypeError, r"got one tensor of shape \(2, 8, 16\); pass list\(weights\)"),
        (lambda: measure_experts([ONE[:0]]), ValueError, r"empty tensor: weights\[0\] has shape \(0, 16\)"),
        (lambda: measure_experts([ONE, ONE[:4]]), ValueError, r"weights\[1\] is torch.float32 \(4, 16\) on cpu"),
        (lambda: measure_experts([ONE, ONE, ONE.bfloat16()]), ValueError, r"weights\[2\] is torch.bfloat16"),
        (lambda: measure_experts([ONE, torch.zeros(16, 8).t()]), ValueError, r"weights\[1\] of strides \(1, 8\) is not contiguous"),
        (lambda: measure_experts([ONE.int()]), TypeError, r"weights\[0\] must be bfloat16, float16 or float32"),
        (lambda: measure_experts([ONE[0]]), ValueError, r"weights\[0\] must be 2-D"),
        (lambda: quantize_experts([ONE], torch.ones(2)), ValueError, r"amax must be contiguous fp32 \(1,\) on cpu"),
        (lambda: quantize_experts([ONE], torch.ones(1).bfloat16()), ValueError, "make it with measure_experts"),
    ],
)
def test_bad_input_names_the_value(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
