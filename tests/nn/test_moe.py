"""The FP8 mixture-of-experts layer against float64: values and every gradient, per token and per expert."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from assertions import assert_snr, snr_db
from moe_cases import FLOW, SAVED, Case, H, case, check, check_nan_in_one_token, floor, flow, results, top_k, truth

from fp8_recipes import RecipeError, from_name
from fp8_recipes.nn import moe_experts
from fp8_recipes.recipe import Recipe


@pytest.mark.parametrize(("k", "saved"), [(k, "h") for k in range(1, 9)] + [(k, saved) for k in (1, 6, 8) for saved in ("activation", "input")])
def test_values_and_gradients(k: int, saved: str) -> None:
    c = case(top_k(160, k, 8), 8)
    check(c, results(c, flow(f"fp8_flow_moe:moe_saved={saved}")), saved)


@pytest.mark.parametrize("saved", SAVED)
def test_empty_experts_one_token_experts_and_dropped_copies(saved: str) -> None:
    index = top_k(150, 3, 4)
    index[::7, 1] = -1
    index[30] = -1  # a token without any expert
    index[5, 0], index[9, 2] = 5, 7  # experts 5 and 7 have one token each, 4 and 6 none
    c = case(index, 8)
    got = results(c, flow(f"fp8_flow_moe:moe_saved={saved}"))
    check(c, got, saved)
    assert not got["y"][30].any() and not got["dx"][30].any()
    assert not got["dw1"][4].any() and not got["dw2"][6].any()


@pytest.mark.parametrize("name", ["all to one", "more experts than tokens", "one token", "one expert"])
def test_uneven_routing(name: str) -> None:
    index, experts = {
        "all to one": (torch.full((140, 1), 2), 4),
        "more experts than tokens": (top_k(5, 2, 24), 24),
        "one token": (torch.tensor([[3, 0]]), 4),
        "one expert": (torch.zeros(20, 1, dtype=torch.int64), 1),
    }[name]
    c = case(index, experts)
    check(c, results(c, flow()), per_expert=6.0)


def test_a_token_may_visit_an_expert_twice() -> None:
    c = case(torch.tensor([[1, 1], [0, 1], [2, 2]]).repeat(20, 1), 3)
    check(c, results(c, flow()))


@pytest.mark.parametrize("saved", SAVED)
def test_no_tokens(saved: str) -> None:
    c = case(torch.empty(0, 2), 4)
    got = results(c, flow(f"fp8_flow_moe:moe_saved={saved}"))
    assert got["y"].shape == (0, H) and got["dx"].shape == (0, H) and got["dprob"].shape == (0, 2)
    assert not got["dw1"].any() and not got["dw2"].any()


@pytest.mark.parametrize("saved", SAVED)
def test_nan_in_one_token(saved: str) -> None:
    c = case(top_k(100, 2, 6), 6)
    check_nan_in_one_token(c, flow(f"fp8_flow_moe:moe_saved={saved}"))


def test_infinite_gradient_of_one_token_is_visible() -> None:
    c = case(top_k(100, 2, 6), 6)
    clean = results(c, flow())
    c.dy = c.dy.clone()
    c.dy[8, 3] = math.inf
    got = results(c, flow())
    others = torch.arange(100) != 8
    assert torch.isnan(got["dx"][8]).all() and torch.equal(got["dx"][others], clean["dx"][others])
    assert torch.equal(got["y"], clean["y"])
    mine = c.index[8].long()
    assert torch.isnan(got["dw2"][mine][:, 3]).all() and torch.isfinite(got["dw2"][mine][:, 4:]).all()


@pytest.mark.parametrize("spec", ["activation_granularity=micro,grad_granularity=micro", "activation_granularity=tile,grad_granularity=tile", "promote=0"])
def test_other_granularities(spec: str) -> None:
    c = case(top_k(96, 2, 4), 4)
    check(c, results(c, flow(f"fp8_flow_moe:{spec}")))


def test_e5m2_gradients_lose_what_a_mantissa_bit_loses() -> None:
    c = case(top_k(96, 2, 4), 4)
    got, want = results(c, flow("fp8_flow_moe:grad=e5m2")), truth(c)
    assert_snr(want["y"], got["y"], floor("y"), "y")
    for name in ("dx", "dw1", "dw2"):
        assert floor(name) - 4.5 < snr_db(want[name], got[name]) < floor(name) + 1, name  # up to 6 dB for the units that dy and dh bring


def test_small_gradients_survive() -> None:
    # 2**-40: rows of the gradient far below what a tensor scale of E4M3 would keep beside rows of 1.
    c = case(top_k(96, 2, 4), 4)
    c.dy = c.dy * torch.exp2(-40.0 * (torch.arange(96) % 2)[:, None]).bfloat16()
    got, want = results(c, flow()), truth(c)
    assert_snr(want["dx"][1::2], got["dx"][1::2], floor("dx"), "dx of the small rows")
    assert_snr(want["dprob"][1::2], got["dprob"][1::2], floor("dprob"), "dprob of the small rows")


def test_float32_model_and_autocast() -> None:
    c = case(top_k(64, 2, 4), 4)
    c32 = Case(c.x.float(), c.index, c.prob, [w.float() for w in c.w1], [w.float() for w in c.w2], c.dy.float())
    got = results(c32, flow())
    assert all(t.dtype == torch.float32 for t in got.values())
    check(c32, got)
    x = c32.x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_experts(x, c.index, c.prob, c32.w1, c32.w2, recipe=FLOW)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_inputs_that_need_no_gradient() -> None:
    c = case(top_k(64, 2, 4), 4)
    full = results(c, flow())
    x = c.x.clone().requires_grad_()
    moe_experts(x, c.index, c.prob, c.w1, c.w2, recipe=FLOW).backward(c.dy)
    assert torch.equal(x.grad, full["dx"])  # type: ignore[arg-type]
    prob = c.prob.clone().requires_grad_()
    moe_experts(c.x, c.index, prob, c.w1, c.w2, recipe=FLOW).backward(c.dy)
    assert torch.equal(prob.grad, full["dprob"])  # type: ignore[arg-type]
    w2 = [w.clone().requires_grad_() for w in c.w2]
    moe_experts(c.x, c.index, c.prob, c.w1, w2, recipe=FLOW).backward(c.dy)
    assert torch.equal(torch.stack([w.grad for w in w2]), full["dw2"])  # type: ignore[misc]
    assert not moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=FLOW).requires_grad
    with torch.no_grad():
        assert torch.equal(moe_experts(x, c.index, c.prob, c.w1, c.w2, recipe=FLOW), full["y"])


def test_functorch_is_refused() -> None:
    """torch.func differentiates through wrappers that this function would have to unwrap; torch says so itself."""
    c = case(top_k(12, 2, 4), 4)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: moe_experts(x, c.index, c.prob, c.w1, c.w2, recipe=FLOW).sum())(c.x)


def test_bad_input_is_named() -> None:
    c = case(top_k(32, 2, 4), 4)

    def refused(kind: type[Exception], match: str, recipe: Recipe = FLOW, num_experts: int | None = None, **changed: Any) -> None:
        b = replace(c, **changed)
        with pytest.raises(kind, match=match):
            moe_experts(b.x, b.index, b.prob, b.w1, b.w2, recipe=recipe, num_experts=num_experts)

    refused(ValueError, r"x must be \[tokens, hidden\], got shape \(2, 16, 128\); flatten", x=c.x.view(2, 16, H))
    refused(ValueError, r"expert_index must be \[32, K\]", index=c.index[:30])
    refused(ValueError, r"K >= 1", index=c.index[:, :0], prob=c.prob[:, :0])
    refused(TypeError, r"expert_index must be int32, got torch.int64; use expert_index.int\(\)", index=c.index.long())
    refused(ValueError, r"prob must have expert_index's shape \(32, 2\), got \(32, 1\)", prob=c.prob[:, :1])
    refused(TypeError, r"prob must be float32, got torch.bfloat16; run the router in fp32", prob=c.prob.bfloat16())
    refused(ValueError, "at least one; got 0 and 0", w1=[], w2=[])
    refused(ValueError, "got 4 and 3", w2=c.w2[:3])
    refused(ValueError, "num_experts=8 over 1 ranks leaves 8 here, but w1 holds 4", num_experts=8)
    refused(ValueError, r"w1 must be \[2F, H\].*got \(192, 128\) and \(128, 95\)", w2=[w[:, :95] for w in c.w2])
    refused(TypeError, "got torch.float16; cast them", w1=[w.half() for w in c.w1])
    refused(ValueError, r"w1\[0\] on meta", w1=[w.to("meta") for w in c.w1])
    refused(ValueError, "expert_index has 4; ids are 0 .. 3", index=c.index.clamp(min=0) + 1)
    refused(ValueError, r"weights\[2\] is .*all experts of a layer must be alike", w1=[*c.w1[:2], c.w1[2].float(), c.w1[3]])
    refused(RecipeError, "recipe 'moss': moe=none has no grouped products; use fp8_flow_moe, or moss:moe=flow", recipe=from_name("moss"))
    odd = case(top_k(8, 1, 2), 2, hidden=24)
    refused(ValueError, "hidden=24 must be a multiple of 16", **vars(odd))
    odd = case(top_k(8, 1, 2), 2, ffn=40)
    refused(ValueError, "ffn=40 must be a multiple of 16", **vars(odd))


def test_moss_runs_experts_when_asked_to() -> None:
    c = case(top_k(64, 2, 4), 4)
    check(c, results(c, flow("moss:moe=flow")))


def test_unquantised_recipe_is_plain_torch() -> None:
    c = case(top_k(64, 2, 4), 4)
    got, want = results(c, flow("bf16")), truth(c)
    assert all(snr_db(want[name], got[name]) > 44 for name in want)
