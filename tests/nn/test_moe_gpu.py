"""The FP8 mixture-of-experts layer on one GPU: values, bits, kernel launches, waits."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from assertions import assert_snr
from moe_cases import CALLS, FLOW, SAVED, H, case, check, flow, results, top_k, watched, with_main_grad

from fp8_recipes.nn import moe_experts
from fp8_recipes.weight_scaling import WeightScaling


@pytest.mark.gpu
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("shape", [(300, 2, 8, 256, 128), (512, 8, 64, 512, 384), (7, 2, 16, 256, 96), (200, 1, 4, 1024, 1408)])
def test_gpu_values_and_gradients(shape: tuple[int, ...], saved: str) -> None:
    tokens, k, experts, hidden, ffn = shape
    index = top_k(tokens, k, experts)
    index[::9, 0] = -1
    c = case(index, experts, hidden=hidden, ffn=ffn).to("cuda")
    run = flow(f"fp8_flow_moe:moe_saved={saved}")
    got = results(c, run)
    check(c, got, saved, per_expert=6.0)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), results(c, run).values(), strict=True)), "two runs, the same bits"


@pytest.mark.gpu
def test_gpu_agrees_with_the_reference() -> None:
    c = case(top_k(200, 2, 8), 8, hidden=256, ffn=128)
    want, got = results(c, flow()), results(c.to("cuda"), flow())
    for name in want:  # h differs by the accumulator's 14 bits, so that a few per cent of act and dh round the other way, a whole step of E4M3
        assert_snr(want[name], got[name].cpu(), 31.0, name)


@pytest.mark.gpu
def test_gpu_no_tokens_and_nan() -> None:
    test_gpu_case = case(torch.empty(0, 2), 4).to("cuda")
    got = results(test_gpu_case, flow())
    assert got["y"].shape == (0, H) and not got["dw1"].any() and not got["dw2"].any()
    c = case(top_k(100, 2, 6), 6).to("cuda")
    clean = results(c, flow())
    c.x = c.x.clone()
    c.x[5, 7] = math.nan
    nan = results(c, flow())
    others = torch.arange(100, device="cuda") != 5
    for name in ("y", "dx", "dprob"):
        assert torch.isnan(nan[name][5]).all() and torch.equal(nan[name][others], clean[name][others]), name
    mine = c.index[5].long()
    assert torch.isnan(nan["dw1"][mine]).all() and torch.isfinite(nan["dw1"]).flatten(1).all(1).sum() == 4


KERNELS = {  # of one forward and backward: moe_saved=h, main_grad, predicted scales
    "_quantize_rows_kernel": 2,
    "_quantize_experts_kernel": 2,
    "_quantize_experts_transposed_kernel": 2,
    "_count_kernel": 1,
    "_scan_kernel": 1,
    "_place_kernel": 1,
    "_gather_rows_kernel": 3,
    "_grouped_gemm_kernel": 4,
    "_swiglu_quantize_kernel": 2,
    "_swiglu_backward_quantize_kernel": 1,
    "_block_maximum_kernel": 4,
    "_grouped_fold_transpose_kernel": 4,
    "_grouped_wgrad_kernel": 2,
    "_combine_rows_kernel": 2,
    "_copies_of_rows_kernel": 1,
}


@pytest.mark.gpu
def test_gpu_kernel_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 512
    c = case(top_k(tokens, 2, 8), 8, hidden=256, ffn=128).to("cuda")
    w1, w2 = with_main_grad(c)
    scaling = WeightScaling(attached=True)
    for w in (*w1, *w2):
        scaling.track(w)  # type: ignore[arg-type]
    x, prob = c.x.clone().requires_grad_(), c.prob.clone().requires_grad_()

    def step() -> None:
        moe_experts(x, c.index, prob, w1, w2, recipe=FLOW).backward(c.dy)

    for _ in range(2):
        step()
        x.grad = prob.grad = None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = collections.Counter({event.key: event.count for event in profile.key_averages() if "kernel" in event.key.lower()})
    ours = {name: count for name, count in launched.items() if name in KERNELS}
    assert ours == KERNELS, launched
    unknown = [name for name in launched if name.startswith("_") and name not in KERNELS]
    assert not unknown, f"kernels of this package that the layer does not need: {unknown}"
    x.grad = prob.grad = None
    with watched(monkeypatch, large=tokens * 128) as (calls, movements):
        step()
    assert {**dict.fromkeys(CALLS, 0), **calls} == {**CALLS, "measure_experts": 0}
    assert movements.seen == [], "a pass over a tensor that belongs to no operation"


@pytest.mark.gpu
def test_gpu_waits_for_nothing() -> None:
    c = case(top_k(256, 2, 8), 8, hidden=256, ffn=128).to("cuda")
    w1, w2 = with_main_grad(c)
    x = c.x.clone().requires_grad_()
    moe_experts(x, c.index, c.prob, w1, w2, recipe=FLOW).backward(c.dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_experts(x, c.index, c.prob, w1, w2, recipe=FLOW).backward(c.dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
