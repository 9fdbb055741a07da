"""Metrics of experts that the FP8 flow runs: no module is called there, and the buffers hold more rows than tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_cases import F, H, case, leaves, top_k

from fp8_recipes import from_name
from fp8_recipes.megatron.metrics import _experts_observer
from fp8_recipes.metrics import MonitorHooks
from fp8_recipes.nn import moe_experts
from fp8_recipes.reference import quantize

TOKENS, K, EXPERTS = 100, 2, 4
LAYER: Any = SimpleNamespace(training=True)


def train(hooks: MonitorHooks, layer: Any = LAYER, saved: str = "h", parts: int = 1) -> dict[str, Any]:
    index = top_k(TOKENS, K, EXPERTS)
    index[::10, 1] = -1  # ten dropped copies
    c = case(index, EXPERTS)
    observer = _experts_observer(hooks, layer, "layers.3")
    for x, i, p, dy in zip(*(t.chunk(parts) for t in (c.x, c.index, c.prob, c.dy)), strict=True):
        y = moe_experts(x.clone().requires_grad_(), i.contiguous(), p, *leaves(c), recipe=from_name(f"fp8_flow_moe:moe_saved={saved}"), observer=observer)
        y.backward(dy)
    return hooks.end_step(1) or {}


def test_every_quantised_tensor_is_seen_once_and_without_padding():
    readings = train(MonitorHooks([]))
    copies = TOKENS * K - 10
    assert {name: r.elements for name, r in readings.items()} == {
        "layers.3.mlp.experts.linear_fc1.input": TOKENS * H,
        "layers.3.mlp.experts.linear_fc2.input": copies * F,
        "layers.3.down_input": copies * F,
        "layers.3.mlp.experts.linear_fc2.grad": TOKENS * H,
        "layers.3.mlp.experts.linear_fc1.grad": copies * 2 * F,
    }
    assert all(r.nonfinite == 0 and r.kurtosis is not None for r in readings.values())
    assert readings["layers.3.down_input"].scale_exponent_max is None
    assert readings["layers.3.mlp.experts.linear_fc2.input"].scale_exponent_min > -100, "a padding row's scale was counted"


def test_the_kurtosis_is_that_of_the_down_projections_input():
    c = case(top_k(TOKENS, 1, EXPERTS), EXPERTS)
    hooks = MonitorHooks([])
    moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=from_name("fp8_flow_moe"), observer=_experts_observer(hooks, LAYER, "layers.1"))
    reading = hooks.end_step(1)["layers.1.down_input"]
    h = torch.stack([x.double() @ c.w1[e].double().t() for x, e in zip(c.x, c.index[:, 0], strict=True)])
    gate, up = h.chunk(2, dim=1)
    plain = torch.nn.functional.silu(gate) * up * c.prob.double()
    squares = plain.square()
    # E4M3 moves a value by up to 1/16, its fourth power by a quarter, and few values decide; padding would make the pooled one five times too large
    assert reading.kurtosis == pytest.approx((squares.square().mean(1) / squares.mean(1).square()).mean().item(), rel=0.1)
    assert reading.pooled_kurtosis == pytest.approx((squares.square().mean() / squares.mean().square()).item(), rel=0.1)
    assert reading.rms == pytest.approx(squares.mean().sqrt().item(), rel=0.01)


@pytest.mark.parametrize("saved", ["activation", "input"])
def test_what_is_saved_and_how_the_batch_is_cut_change_nothing(saved):
    """With moe_saved=input the SwiGLU is quantised again in backward; a tensor is counted once all the same."""
    want, got = train(MonitorHooks([])), train(MonitorHooks([]), saved=saved, parts=2)
    assert want.keys() == got.keys()
    for name in want:
        assert got[name].elements == want[name].elements and got[name].kurtosis == pytest.approx(want[name].kurtosis, rel=0.02), name


def test_undefined_rows_do_not_count():
    """Unused rows hold NaN in payload and scale, and the largest tile exponent."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    source = torch.full((256,), -1, dtype=torch.int32)
    source[:40] = torch.arange(40)
    clean, dirty = MonitorHooks([]), MonitorHooks([])
    _experts_observer(clean, LAYER, "a")("linear_fc2", "input", None, quantize(x[:40].contiguous(), "row"), None)
    q = quantize(x, "row")
    q.payload.view(torch.uint8)[40:], q.scale[40:], q.tile_exponent[40:] = 0x7F, torch.nan, 255
    _experts_observer(dirty, LAYER, "a")("linear_fc2", "input", None, q, source)
    assert dirty.end_step(1) == clean.end_step(1)


def test_evaluation_and_steps_between_are_not_counted():
    assert train(MonitorHooks([]), SimpleNamespace(training=False)) == {}
    hooks = MonitorHooks([], interval=5)
    hooks.active = False
    train(hooks)
    assert hooks.table.reduce() == {}


def test_megatrons_layer_hands_its_observer_over(monkeypatch):
    """`metrics` sets fp8_observer on the MoE layer, `routed_experts` passes it on."""
    megatron_moe = pytest.importorskip("fp8_recipes.megatron.moe", reason="megatron-core is not installed")
    given: dict[str, Any] = {}
    monkeypatch.setattr(megatron_moe, "moe_experts", lambda x, *rest, **options: given.update(options) or x)
    monkeypatch.setattr(megatron_moe, "before_forward", lambda experts: None)
    linears = (SimpleNamespace(), SimpleNamespace())
    flow = megatron_moe.LayerFlow(from_name("fp8_flow_moe"), None, [], [], "swiglu", linears)
    layer = SimpleNamespace(experts=None, config=SimpleNamespace(num_moe_experts=2, moe_router_topk=1), fp8_observer=len)
    probs = torch.tensor([[0.7, 0.0]])
    megatron_moe.routed_experts(layer, flow, torch.ones(1, 1, H), probs, probs > 0)
    assert given["observer"] is len


@pytest.mark.gpu
def test_gpu_counts_what_the_cpu_counts():
    c = case(top_k(TOKENS, K, EXPERTS), EXPERTS, hidden=256, ffn=128)
    readings = []
    for here in (c, c.to("cuda")):
        hooks = MonitorHooks([])
        x = here.x.clone().requires_grad_()
        recipe = from_name("fp8_flow_moe")
        moe_experts(x, here.index, here.prob, *leaves(here), recipe=recipe, observer=_experts_observer(hooks, LAYER, "layers.1")).backward(here.dy)
        readings.append(hooks.end_step(1))
    cpu, gpu = readings
    assert cpu.keys() == gpu.keys()
    for name in cpu:
        assert gpu[name].elements == cpu[name].elements and gpu[name].nonfinite == 0
        assert gpu[name].kurtosis == pytest.approx(cpu[name].kurtosis, rel=0.05), name
