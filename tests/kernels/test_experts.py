"""quantize_experts and measure_experts: the reference, bit for bit, wherever the weights are."""

from __future__ import annotations

import copy
import io
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, FORMATS
from fp8_recipes.kernels import measure_experts, quantize_experts, quantize_weight

module = import_module("fp8_recipes.kernels.experts")
SHAPES = [(1, 16, 128), (3, 20, 48), (5, 132, 72), (2, 7, 9), (4, 6, 130)]
"""Experts, N, K: one tile, part of a tile, several; multiples of 16, of 4 and of nothing."""


def weights(experts: int, n: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, shift: int = 0) -> list[torch.Tensor]:
    """Matrices in separate allocations, `shift` elements beyond their starts; scales differ; NaN and Inf in the second, the third all zero."""
    gen = torch.Generator().manual_seed(experts * n + k)
    found = []
    for e in range(experts):
        w = torch.randn(n, k, generator=gen) * 2.0 ** (4 * (e % 7) - 8)
        if e == 1:
            w[n // 2, k // 2], w[0, k - 1] = torch.nan, -torch.inf
        if e == 2:
            w.zero_()
        memory = torch.full((n * k + shift,), torch.nan, dtype=dtype, device=device)
        found.append(memory[shift:].view(n, k).copy_(w))
    return found


def check(w: list[torch.Tensor], fmt=E4M3, increment: float = 0.0) -> None:
    amax = measure_experts(w)
    assert_bitwise(amax, reference.measure_experts(w), "amax")
    for transpose in (False, True):
        q, expected = (f(w, amax, increment, fmt, transpose=transpose) for f in (quantize_experts, reference.quantize_experts))
        assert_bitwise(q.scale, expected.scale, f"scale, transpose={transpose}")
        assert_bitwise(q.payload, expected.payload, f"payload, transpose={transpose}")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_reference(device, shape, fmt):
    check(weights(*shape, device), fmt)
    check(weights(*shape, device), fmt, increment=0.37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(device, dtype):
    check([w.nan_to_num(posinf=1, neginf=-1) for w in weights(2, 20, 48, device, dtype)])


@pytest.mark.parametrize("shift", [1, 4, 8])
def test_weights_that_start_anywhere(device, shift):
    check(weights(3, 20, 64, device, shift=shift))


def test_several_programs_of_one_expert(device, monkeypatch):
    monkeypatch.setattr(module, "MEASURE_BLOCK", 256)
    monkeypatch.setattr(module, "MEASURE_PROGRAMS", 6)
    w = weights(3, 60, 80, device)
    check(w)
    small = module.ExpertPlan(block=1024, rows=32, cols=16, warps=1)
    amax = reference.measure_experts(w)
    for transpose in (False, True):
        expected = reference.quantize_experts(w, amax, transpose=transpose)
        assert_bitwise(quantize_experts(w, amax, transpose=transpose, plan=small).payload, expected.payload)


def test_one_expert_is_a_weight(device):
    w = weights(1, 64, 48, device)
    amax = torch.tensor(1.5, device=device)
    for transpose in (False, True):
        alone = quantize_weight(w[0], amax, 0.25, transpose=transpose)
        q = quantize_experts(w, amax.view(1), 0.25, transpose=transpose)
        assert_bitwise(q.payload[0], alone.payload)
        assert_bitwise(q.scale[0], alone.scale)


def known(w):
    return module._known_weights(w)


def test_parameters_and_changed_values(device):
    """A step of the optimizer changes values and needs no new table; other memory, and other tensors in it, do."""
    w = [torch.nn.Parameter(t) for t in weights(2, 16, 32, device)]
    check(w)
    first = known(w)
    with torch.no_grad():
        for t in w:
            t.copy_(torch.randn(16, 32))
    check(w)
    assert known(w) is first and known(tuple(w)) is first
    w[1].data = torch.randn(16, 32, device=device).bfloat16()
    check(w)
    second = known(w)
    assert second is not first and second.table[0].tolist() == [t.data_ptr() for t in w]
    check(w[::-1])
    assert known(w[::-1]).addresses == second.addresses[::-1]
    assert known(w[:1]).addresses == second.addresses[:1]


def test_what_is_known_is_checked_again(device):
    """Whatever changes about a known set of weights meets the checks: another tensor, other memory, another kind."""
    w = [torch.nn.Parameter(t) for t in weights(3, 16, 32, device)]
    amax = torch.ones(3, device=device)
    quantize_experts(w, amax)
    half = torch.nn.Parameter(w[2].detach()[:8])  # the same address
    with pytest.raises(ValueError, match=r"weights\[2\] is torch.bfloat16 \(8, 32\)"):
        quantize_experts([*w[:2], half], amax)
    w[1].data = torch.randn(32, 16, device=device).bfloat16().t()
    with pytest.raises(ValueError, match=r"weights\[1\] of strides \(1, 16\)"):
        quantize_experts(w, amax)
    w[1].data = torch.randn(16, 32, device=device).bfloat16()
    quantize_experts(w, amax)
    w[0].data = w[0].data.float()
    with pytest.raises(ValueError, match=r"weights\[1\] is torch.bfloat16 .* weights\[0\] is torch.float32"):
        quantize_experts(w, amax)


def test_copies_of_a_known_weight(device):
    """A parameter that carries what is known of its set can be copied and pickled; the copy knows nothing."""
    w = [torch.nn.Parameter(t) for t in weights(2, 16, 32, device)]
    check(w)
    stored = io.BytesIO()
    torch.save(w, stored)
    stored.seek(0)
    for copied in (copy.deepcopy(w), torch.load(stored, weights_only=False)):
        assert known(copied).addresses == tuple(t.data_ptr() for t in copied) != known(w).addresses
        check(copied)


def test_bad_input(device):
    w = weights(2, 16, 32, device)
    amax = torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"weights\[1\] is torch.bfloat16 \(8, 32\)"):
        quantize_experts([w[0], w[1][:8]], amax)
    with pytest.raises(ValueError, match=r"amax must be contiguous fp32 \(2,\)"):
        quantize_experts(w, amax[:1])
    with pytest.raises(ValueError, match="weights is empty"):
        measure_experts([])
    elsewhere = [t.to("meta") for t in w]
    with pytest.raises(ValueError, match="fp8_recipes.ops chooses"):
        measure_experts(elsewhere)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 2816, 2048), (64, 2048, 1408), (8, 4096, 7168), (128, 1536, 2048), (3, 1000, 2056)], ids=str)
def test_real_sizes(device, shape):
    w = weights(*shape, device)
    for fmt in FORMATS.values():
        check(w, fmt, increment=0.01)


@pytest.mark.gpu
def test_a_known_set_of_weights_waits_for_nothing(device):
    w = weights(8, 256, 256, device)
    amax = measure_experts(w)
    quantize_experts(w, amax, transpose=True)
    quantize_experts(w, amax)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for transpose in (False, True):
            quantize_experts(w, measure_experts(w), 0.1, transpose=transpose)
    finally:
        torch.cuda.set_sync_debug_mode("default")
