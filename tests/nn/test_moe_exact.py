"""fold=none and wgrad_fold=none for experts: the same payloads multiplied exactly, to tell what the folds cost."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, snr_db
from moe_cases import SAVED, case, check, flow, results, top_k, truth, with_main_grad

from fp8_recipes import RecipeError, from_name
from fp8_recipes.nn import moe_experts


@pytest.mark.parametrize("saved", SAVED)
def test_values_and_gradients(saved):
    index = top_k(150, 3, 4)
    index[::7, 1] = -1
    index[5, 0] = 5  # expert 5 has one token, 4 none
    c = case(index, 6)
    check(c, results(c, flow(f"fp8_flow_moe:fold=none,moe_saved={saved}")), saved)


def test_only_the_weights_gradients_differ_from_the_folded_experts():
    """One scale per row may stand before or behind the sum: y, dx and dprob are the same numbers."""
    c = case(top_k(160, 2, 4), 4)
    c.x *= torch.exp2(torch.arange(160) % 24 - 12.0)[:, None].bfloat16()  # tokens of very different size, some flushed by the fold
    folded, columns, exact, exact_wgrad = (results(c, flow(f"fp8_flow_moe{spec}")) for spec in ("", ":wgrad_fold=column", ":fold=none", ":wgrad_fold=none"))
    want = truth(c)
    for name in ("y", "dx", "dprob"):
        assert_bitwise(exact[name], folded[name], name)
        assert_bitwise(exact_wgrad[name], folded[name], name)
        assert_bitwise(columns[name], folded[name], name)
    for name in ("dw1", "dw2"):
        assert_bitwise(exact_wgrad[name], exact[name], name)
        assert not torch.equal(exact[name], folded[name]) and not torch.equal(columns[name], folded[name])
        assert snr_db(exact[name].double(), columns[name]) > snr_db(exact[name].double(), folded[name]), "a finer scale loses less"
        assert snr_db(want[name], exact[name]) >= snr_db(want[name], folded[name]) - 0.1, name


def test_main_grad_is_added_to():
    c = case(top_k(60, 2, 3), 3)
    w1, w2 = with_main_grad(c)
    for w in (*w1, *w2):
        w.main_grad.fill_(1.0)  # type: ignore[attr-defined]
    moe_experts(c.x, c.index, c.prob, w1, w2, recipe=from_name("fp8_flow_moe:fold=none")).backward(c.dy)
    alone = results(c, flow("fp8_flow_moe:fold=none"))
    for name, weights in (("dw1", w1), ("dw2", w2)):
        got = torch.stack([w.main_grad for w in weights]) - 1  # type: ignore[attr-defined]
        assert snr_db(alone[name].double(), got) > 45 and all(w.grad is None for w in weights)


@pytest.mark.parametrize("spec", ["fp8_flow_moe:fold=none,activation_granularity=tile", "fp8_flow_moe:fold=none,grad_granularity=micro", "tile:moe=flow"])
def test_finer_scales_cannot_travel_without_a_fold(spec):
    with pytest.raises(RecipeError, match="it needs fold=row, or use moe=none"):
        from_name(spec)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["fp8_flow_moe:fold=none", "fp8_flow_moe:wgrad_fold=none", "fp8_flow_moe:wgrad_fold=column"])
def test_gpu_values_and_gradients(spec):
    c = case(top_k(300, 2, 8), 8, hidden=256, ffn=128).to("cuda")
    got = results(c, flow(spec))
    check(c, got, per_expert=6.0)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), results(c, flow(spec)).values(), strict=True)), "two runs, the same bits"
