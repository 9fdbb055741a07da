"""The FP8 mixture-of-experts layer in training: accumulation, recomputation, scales of the weights, what it launches and what it keeps."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from assertions import assert_snr
from moe_cases import CALLS, FLOW, SAVED, F, H, case, floor, flow, leaves, normal, results, top_k, truth, watched, with_main_grad
from torch.utils.checkpoint import checkpoint

from fp8_recipes import RecipeError, from_name, ops
from fp8_recipes.nn import moe_experts
from fp8_recipes.nn.experts import expert_operand
from fp8_recipes.weight_scaling import ATTRIBUTE, WeightScaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_every_microbatch(dtype: torch.dtype) -> None:
    batches = [case(top_k(80, 2, 6, seed=s) % 5, 6, seed=0) for s in range(3)]  # expert 5 gets nothing
    for s, b in enumerate(batches):
        b.x, b.dy = normal(80, H, seed=50 + s).bfloat16(), normal(80, H, seed=60 + s).bfloat16()
    w1, w2 = leaves(batches[0])
    for w in (*w1, *w2):
        w.main_grad = torch.zeros(w.shape, dtype=dtype)  # type: ignore[attr-defined]
    for b in batches:
        moe_experts(b.x, b.index, b.prob, w1, w2, recipe=FLOW).backward(b.dy)
    assert all(w.grad is None for w in (*w1, *w2))
    wanted = [truth(b) for b in batches]
    for name, ws in (("dw1", w1), ("dw2", w2)):
        got = torch.stack([w.main_grad for w in ws])  # type: ignore[attr-defined]
        assert_snr(sum(w[name] for w in wanted), got, floor(name), name)  # type: ignore[arg-type]
        assert not got[5].any()


def test_megatrons_protocol() -> None:
    c = case(top_k(64, 2, 4), 4)
    w1, w2 = leaves(c)
    seen: list[Any] = []
    for w in (*w1, *w2):
        w.main_grad = torch.full(w.shape, 7.0)  # type: ignore[attr-defined]
        w.grad_added_to_main_grad, w.overwrite_main_grad = False, True  # type: ignore[attr-defined]
        w.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    moe_experts(c.x, c.index, c.prob, w1, w2, recipe=FLOW).backward(c.dy)
    assert len(seen) == 8 and all(w.grad_added_to_main_grad for w in (*w1, *w2))  # type: ignore[attr-defined]
    assert_snr(truth(c)["dw1"], torch.stack([w.main_grad for w in w1]), floor("dw1"), "overwritten main_grad")  # type: ignore[attr-defined]


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint_changes_no_bit(saved: str, reentrant: bool) -> None:
    c = case(top_k(90, 2, 4), 4)
    plain = flow(f"fp8_flow_moe:moe_saved={saved}")
    want = results(c, plain)
    got = results(c, lambda *args: checkpoint(plain, *args, use_reentrant=reentrant))
    # The reentrant form detaches what is inside lists, so the experts' weights get no gradient from it: arguments that are tensors do.
    for name in ("y", "dx", "dprob") if reentrant else want:
        assert torch.equal(got[name], want[name]), name


def test_second_backward_is_refused_unless_the_graph_is_kept() -> None:
    c = case(top_k(64, 2, 4), 4)
    x = c.x.clone().requires_grad_()
    y = moe_experts(x, c.index, c.prob, c.w1, c.w2, recipe=FLOW)
    y.backward(c.dy, retain_graph=True)
    first = x.grad.clone()  # type: ignore[union-attr]
    x.grad = None
    y.backward(c.dy)
    assert torch.equal(x.grad, first)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(c.dy)
    (gradient,) = torch.autograd.grad(moe_experts(x, c.index, c.prob, c.w1, c.w2, recipe=FLOW).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_weight_changed_between_forward_and_backward_is_refused() -> None:
    c = case(top_k(64, 2, 4), 4)
    w1, w2 = leaves(c)
    y = moe_experts(c.x, c.index, c.prob, w1, w2, recipe=FLOW)
    with torch.no_grad():
        w2[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between forward and backward"):
        y.backward(c.dy)


def test_predicted_scales_are_measured_together_and_hold() -> None:
    c = case(top_k(64, 2, 4), 4)
    params1, params2 = ([torch.nn.Parameter(w.float()) for w in ws] for ws in (c.w1, c.w2))
    optimizer = torch.optim.AdamW([*params1, *params2], lr=1e-2, betas=(0.9, 0.95))
    scaling = WeightScaling(interval=3)
    scaling.attach(optimizer)
    for p in (*params1, *params2):
        scaling.track(p)
    steps = []
    for i in range(7):
        operand = expert_operand(params1, FLOW)
        steps.append(getattr(params1[0], ATTRIBUTE).anchor_step)
        again = expert_operand(params1, FLOW)
        assert again.amax is operand.amax and again.increment == operand.increment, "one step, one measurement"
        for e, p in enumerate(params1):
            state = getattr(p, ATTRIBUTE)
            assert state.anchor_amax == operand.amax[e] and not state.due()
            assert p.detach().abs().max() <= operand.amax[e] + operand.increment
        moe_experts(normal(64, H, seed=i), c.index, c.prob, params1, params2, recipe=FLOW).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert steps == [0, 0, 0, 3, 3, 3, 6]
    scaling.reanchor()
    assert expert_operand(params1, FLOW).amax is not operand.amax


@pytest.mark.parametrize("value", ["ffn", "row"])
def test_kept_payload_lives_for_one_step(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    c = case(top_k(64, 2, 4), 4)
    recipe = from_name(f"fp8_flow_moe:weight_cache={value}")
    w1, w2 = ([torch.nn.Parameter(w.float()) for w in ws] for ws in (c.w1, c.w2))
    with pytest.raises(RecipeError, match=f"weight_cache={value} needs to know where a step begins"):
        moe_experts(c.x, c.index, c.prob, w1, w2, recipe=recipe)
    optimizer = torch.optim.AdamW([*w1, *w2], lr=1e-2, betas=(0.9, 0.95))
    scaling = WeightScaling(interval=2)
    for w in (*w1, *w2):
        scaling.track(w)
    with pytest.raises(RecipeError, match="attach an Adam optimizer"):
        moe_experts(c.x, c.index, c.prob, w1, w2, recipe=recipe)
    scaling.attach(optimizer)
    casts = []
    for step in range(5):
        for _ in range(3):
            with watched(monkeypatch, large=1 << 30) as (calls, _):
                y = moe_experts(c.x, c.index, c.prob, w1, w2, recipe=recipe)
            assert torch.equal(y, moe_experts(c.x, c.index, c.prob, w1, w2, recipe=FLOW)), "the bits of a payload made afresh"
            casts.append(calls["quantize_experts"])
            y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            scaling.reanchor()
            with torch.no_grad():
                w1[2].mul_(3)  # as loading a checkpoint does
    assert casts == [2, 0, 0] * 5
    kept = expert_operand(w1, recipe).row()
    with torch.no_grad():
        w1[1].mul_(0.5)  # by somebody who tells no clock
    assert expert_operand(w1, recipe).row() is not kept


def test_untracked_or_measured_weights_are_measured_at_every_use() -> None:
    weights = [torch.nn.Parameter(normal(32, 16, seed=e)) for e in range(3)]
    wanted = torch.stack([w.detach().abs().max() for w in weights])
    scaling = WeightScaling()
    scaling.track(weights[0])  # one of three is not enough
    for recipe in (FLOW, replace(FLOW, weight_scale="measured")):
        operand = expert_operand(weights, recipe)
        assert operand.increment == 0 and (operand.amax >= wanted).all() and (operand.amax < 1.01 * wanted).all()


def test_experts_of_two_clocks_are_refused() -> None:
    weights = [torch.nn.Parameter(normal(32, 16, seed=e)) for e in range(2)]
    for w in weights:
        WeightScaling().track(w)
    with pytest.raises(ValueError, match="one WeightScaling clock"):
        expert_operand(weights, FLOW)


def test_backward_uses_the_scales_of_the_forward() -> None:
    c = case(top_k(64, 2, 4), 4)
    w1, w2 = ([torch.nn.Parameter(w) for w in ws] for ws in (c.w1, c.w2))
    scaling = WeightScaling(interval=1000, attached=True)
    for w in (*w1, *w2):
        scaling.track(w)
    x = c.x.clone().requires_grad_()
    y = moe_experts(x, c.index, c.prob, w1, w2, recipe=FLOW)
    scaling.advance(1e6)
    y.backward(c.dy)
    assert_snr(truth(c)["dx"], x.grad, floor("dx"), "dx")  # type: ignore[arg-type]


@pytest.mark.parametrize("saved", SAVED)
def test_two_casts_stand_alone(monkeypatch: pytest.MonkeyPatch, saved: str) -> None:
    c = case(top_k(64, 2, 4), 4)
    w1, w2 = with_main_grad(c)
    x, prob = c.x.clone().requires_grad_(), c.prob.clone().requires_grad_()
    wanted = dict(CALLS)
    if saved == "activation":
        del wanted["swiglu_quantize"]
    if saved == "input":
        del wanted["swiglu_quantize_saving"]
        wanted.update(swiglu_quantize=2, gather_rows=4, grouped_gemm=5, quantize_experts=5)
    with watched(monkeypatch, large=64 * H) as (calls, movements):
        moe_experts(x, c.index, prob, w1, w2, recipe=from_name(f"fp8_flow_moe:moe_saved={saved}")).backward(c.dy)
    assert dict(calls) == wanted
    assert movements.seen == [], "a pass over a tensor that belongs to no operation"


def fp8_bytes_alive(shapes: set[tuple[int, ...]]) -> int:
    """Bytes of FP8 tensors of these shapes that anything in the process still holds, each memory once."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float8_e4m3fn and tuple(t.shape) in shapes]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


@pytest.mark.parametrize("cache", ["none", "ffn", "row"])
def test_at_most_one_fp8_byte_per_parameter_lives_beside_the_weights(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Between the passes and after them; during a product its one operand, row-major or transposed, beside what is kept."""
    c = case(top_k(64, 2, 4), 4)
    w1, w2 = ([torch.nn.Parameter(w) for w in ws] for ws in (c.w1, c.w2))
    scaling = WeightScaling()
    scaling.attach(torch.optim.AdamW([*w1, *w2], lr=1e-3, betas=(0.9, 0.95)))
    for w in (*w1, *w2):
        scaling.track(w)
    values = [4 * 2 * F * H, 4 * H * F]
    shapes = {(4, *dims[::step]) for dims in ((2 * F, H), (H, F)) for step in (1, -1)}
    kept = 0 if cache == "none" else sum(values)
    before, during = fp8_bytes_alive(shapes), list[int]()
    original = ops.grouped_gemm
    monkeypatch.setattr(ops, "grouped_gemm", lambda *args, **how: (during.append(fp8_bytes_alive(shapes) - before), original(*args, **how))[1])
    for microbatch in range(2):
        y = moe_experts(c.x, c.index, c.prob, w1, w2, recipe=from_name(f"fp8_flow_moe:weight_cache={cache}"))
        assert fp8_bytes_alive(shapes) - before == kept, f"after the forward pass of microbatch {microbatch}"
        y.backward(c.dy)
        assert fp8_bytes_alive(shapes) - before == kept, f"after the backward pass of microbatch {microbatch}"
    assert len(during) == 6 and max(during) <= kept + max(values)


def test_saved_bytes() -> None:
    tokens, k, experts = 256, 4, 8
    c = case(top_k(tokens, k, experts), experts)
    w1, w2 = leaves(c)
    rows = ops.rows_for(tokens * k, experts)
    tiles, ffn_tiles, index = -(-H // 128), -(-F // 128), 4 * (rows + tokens * k + experts + 1 + rows // 128 + experts)
    arrived, prob = tokens * (H + 4 + tiles), 4 * rows
    wanted = {
        "input": arrived + prob + index,
        "h": arrived + prob + index + rows * (2 * F + 4),
        "activation": arrived + prob + index + rows * (2 * F + 4) + rows * (F + 4 + ffn_tiles),
    }
    for saved, nbytes in wanted.items():
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):  # type: ignore[misc]
            moe_experts(c.x, c.index, c.prob, w1, w2, recipe=from_name(f"fp8_flow_moe:moe_saved={saved}"))
        assert sum(t.numel() * t.element_size() for t in kept) == nbytes, saved
    assert wanted["h"] < rows * 2 * F * 2, "less than fc1's output alone in bf16"
