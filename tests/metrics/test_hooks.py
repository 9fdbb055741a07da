from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fp8_recipes.metrics import MomentTable, MonitorHooks, Target, gpt_targets, observe_linears
from fp8_recipes.metrics.hooks import first_tensor, layer_name
from fp8_recipes.nn import convert
from fp8_recipes.nn.gpt import GPT, GPTConfig, is_high_precision

CONFIG = GPTConfig(layers=2, width=64, heads=2, seq=16)


def gpt() -> GPT:
    torch.manual_seed(0)
    return convert(GPT(CONFIG), "moss", skip=is_high_precision)  # type: ignore[return-value]


def batch(sequences: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (sequences, CONFIG.seq), generator=torch.Generator().manual_seed(1))


def test_kurtosis_is_that_of_the_tensors_named() -> None:
    model = gpt()
    hooks = MonitorHooks(gpt_targets(model))
    seen: dict[str, torch.Tensor] = {}
    block = model.blocks[1]
    block.register_forward_hook(lambda m, args, out: seen.update(block_output=out.detach()))
    block.attention.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv=out.detach()))
    block.mlp.down.register_forward_hook(lambda m, args, out: seen.update(down_input=args[0].detach()))
    model(batch()).sum().backward()
    readings = hooks.end_step(1)
    assert readings is not None and len(readings) == 6
    for tensor, x in seen.items():
        x = x.double().flatten(0, 1)
        expected = (x.pow(4).mean(1) / x.square().mean(1).square()).mean()
        assert readings[f"layers.2.{tensor}"].kurtosis == pytest.approx(float(expected), rel=1e-6)
        assert readings[f"layers.2.{tensor}"].rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_tensors_count_once(reentrant: bool) -> None:
    model = gpt()
    hooks = MonitorHooks(gpt_targets(model))
    observe_linears(model, hooks)
    model(batch()).sum().backward()
    plain = hooks.end_step(1)
    for block in model.blocks:
        original = block.forward
        block.forward = lambda x, table, f=original: checkpoint(f, x, table, use_reentrant=reentrant)  # type: ignore[method-assign]
    hooks.active = True
    model(batch()).sum().backward()
    assert hooks.end_step(1) == plain
    assert plain is not None and {n.rpartition(".")[2] for n in plain} == {"qkv", "down_input", "block_output", "input", "weight", "grad"}


def test_a_whole_recomputed_block_counts_once() -> None:
    """The hook of the checkpointed module itself fires again in backward."""
    layer = torch.nn.Linear(8, 8)
    hooks = MonitorHooks([Target("x", layer)])
    x = torch.randn(4, 8, requires_grad=True)
    for reentrant in (True, False):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    readings = hooks.end_step(1)
    assert readings is not None and readings["x"].elements == 2 * 32


def test_gradient_accumulation_equals_the_large_batch() -> None:
    model = gpt()
    hooks = MonitorHooks(gpt_targets(model))
    tokens = batch(4)
    model(tokens).sum().backward()
    whole = hooks.end_step(1)
    hooks.active = True
    for part in tokens.split(1):
        model(part).sum().backward()
    parts = hooks.end_step(1)
    assert whole is not None and parts is not None
    for name, reading in whole.items():
        assert parts[name].elements == reading.elements
        assert parts[name].kurtosis == pytest.approx(reading.kurtosis, rel=1e-5)


def test_steps_observed_are_the_first_and_multiples_of_the_interval_and_evaluation_is_not_counted() -> None:
    layer = torch.nn.Linear(4, 4)
    hooks = MonitorHooks([Target("y", layer)], interval=3)
    observed = {}
    for step in range(7, 15):
        layer.train()
        layer(torch.ones(2, 4))
        layer.eval()
        layer(torch.ones(5, 4))
        readings = hooks.end_step(step)
        if readings is not None:
            observed[step] = readings["y"].elements
    assert observed == {7: 8, 9: 8, 12: 8}
    hooks.remove()
    hooks.active = True
    layer.train()
    layer(torch.ones(2, 4))
    readings = hooks.end_step(15)
    assert readings is not None and readings["y"].elements == 0


def test_input_side_takes_keyword_arguments_and_tuples() -> None:
    class Down(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, splits: list[int]) -> tuple[torch.Tensor, None]:
            return hidden * 2, None

    down = Down()
    hooks = MonitorHooks([Target("in", down, "input"), Target("out", down)])
    down(hidden=torch.ones(2, 4), splits=[1, 1])
    readings = hooks.end_step(1)
    assert readings is not None and (readings["in"].amax, readings["out"].amax) == (1.0, 2.0)
    assert first_tensor([torch.ones(2, dtype=torch.int64), (None, [torch.ones(3)])]).shape == (3,)  # type: ignore[union-attr]


def test_quantised_tensors_are_named_by_layer_and_role() -> None:
    model = gpt()
    hooks = MonitorHooks([], MomentTable())
    assert observe_linears(model, hooks) == 8
    model(batch()).sum().backward()
    readings = hooks.end_step(1)
    assert readings is not None and len(readings) == 24
    weight = readings["layers.1.mlp.down.weight"]
    assert weight.saturation_share == 0 and weight.scale_exponent_min == weight.scale_exponent_max
    assert readings["layers.2.attention.qkv.grad"].elements == 2 * CONFIG.seq * 3 * CONFIG.width
    hooks.active = False
    model(batch()).sum().backward()
    hooks.active = True
    with torch.no_grad():
        model.eval()(batch())
    readings = hooks.end_step(2)
    assert readings is not None and all(r.elements == 0 for r in readings.values())


@pytest.mark.parametrize(("path", "name"), [("blocks.0.mlp.down", "layers.1.mlp.down"), ("head", "head"), ("blocks.x", "blocks.x")])
def test_layer_names(path: str, name: str) -> None:
    assert layer_name(path) == name


def test_what_cannot_be_watched_is_named() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="interval.*0"):
        MonitorHooks([Target("y", layer)], interval=0)
    with pytest.raises(ValueError, match="'y'"):
        MonitorHooks([Target("y", layer), Target("y", layer, "input")])
    parts = MonitorHooks([Target("y", layer), Target("y", torch.nn.Identity())])
    for target in parts.targets:
        target.module(torch.ones(2, 4))
    readings = parts.end_step(1)
    assert readings is not None and readings["y"].elements == 16
    with pytest.raises(ValueError, match="'middle'"):
        Target("y", layer, "middle")
    with pytest.raises(ValueError, match="Linear has no blocks"):
        gpt_targets(layer)
    hooks = MonitorHooks([Target("tokens", torch.nn.Embedding(4, 4), "input")])
    with pytest.raises(TypeError, match="tokens"):
        hooks.targets[0].module(torch.tensor([1]))
