"""The demo end to end with a few steps of a tiny model, and the parts a wrong number could hide in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8_recipes import from_name
from fp8_recipes.architecture import ARCHITECTURES
from fp8_recipes.demo import (
    DemoError,
    MasterWeights,
    Setup,
    Text,
    batches,
    build_model,
    choose_device,
    compare,
    deviation,
    evaluate,
    load_text,
    setup,
    trailing_mean,
    train,
)
from fp8_recipes.nn import Linear
from fp8_recipes.nn.gpt import GPT, GPTConfig, rotary_table, rotate
from fp8_recipes.recipe import BF16, MOSS
from fp8_recipes.weight_scaling import ATTRIBUTE

TINY = Setup("cpu", 6, GPTConfig(layers=1, width=32, heads=2, ffn=64, seq=32), batch=2, peak_lr=3e-3, eval_batches=2)


@pytest.fixture(scope="module")
def text() -> Text:
    words = torch.randint(97, 103, (8000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Text(words[:7000], words[7000:], "test", 1, "0")


def test_same_command_same_numbers(text: Text) -> None:
    first, second = compare(MOSS, TINY, text), compare(MOSS, TINY, text)
    for a, b in zip(first, second, strict=True):
        assert a.losses == b.losses and a.grad_norms == b.grad_norms
        assert a.validation == b.validation and a.counts == b.counts
    assert first[0].losses != first[1].losses  # the recipe does something
    other = train("moss", MOSS, replace(TINY, seed=1), text)
    assert other.losses != first[1].losses


def test_recipe_follows_the_baseline(text: Text) -> None:
    config = replace(TINY, steps=40)
    baseline, quantised = compare(MOSS, config, text)
    assert baseline.final_loss(10) < baseline.losses[0] - 1  # it learns: six equally likely bytes are ln 6 = 1.79
    assert abs(deviation(quantised.final_loss(10), baseline.final_loss(10))) < 1.0
    assert abs(deviation(quantised.validation, baseline.validation)) < 1.0
    assert set(quantised.counts) == {"activation", "weight", "grad"} and baseline.counts == {}
    assert all(c.saturations == 0 and c.nonfinite == 0 and c.flush_share < 0.02 for c in quantised.counts.values())
    assert quantised.observed_steps == baseline.observed_steps == 5  # the first, and every tenth up to the last
    assert len(quantised.losses) == len(quantised.lrs) == len(quantised.grad_norms) == 40 and len(quantised.ms) == 4


def test_weights_are_under_automatic_scaling_and_head_is_not() -> None:
    model, scaling = build_model(from_name("moss:interval=7"), TINY)
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    assert len(linears) == 4 and all(hasattr(m.weight, ATTRIBUTE) for m in linears)
    assert type(model.head) is torch.nn.Linear and scaling.interval == 7
    plain, _ = build_model(BF16, TINY)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_parameters_train_on_fp32_masters(text: Text) -> None:
    torch.manual_seed(0)
    model = GPT(TINY.gpt).bfloat16()
    weights = MasterWeights(model)
    x, y = next(batches(text.train, TINY))
    model(x, y).backward()
    expected = [p.grad.float() for p in model.parameters() if p.grad is not None]
    weights.collect()
    assert all(m.dtype == torch.float32 for m in weights.masters) and all(p.grad is None for p in model.parameters())
    for m, g in zip(weights.masters, expected, strict=True):
        assert m.grad is not None and torch.equal(m.grad, g)
    with torch.no_grad():
        for m in weights.masters:
            m.add_(1e-4)
    weights.publish()
    for p, m in zip(model.parameters(), weights.masters, strict=True):
        assert torch.equal(p, m.bfloat16())
    weights.zero_grad()
    assert not any(m.grad.any() for m in weights.masters if m.grad is not None)


def test_learning_rate_warms_up_and_decays() -> None:
    config = replace(TINY, steps=100)
    lrs = [config.lr(i) for i in range(100)]
    assert lrs[:5] == pytest.approx([config.peak_lr * (i + 1) / 5 for i in range(5)])
    assert max(lrs) == config.peak_lr and lrs[5:] == sorted(lrs[5:], reverse=True)
    assert lrs[-1] == pytest.approx(0.1 * config.peak_lr, rel=0.01)
    assert replace(TINY, steps=1).lr(0) == config.peak_lr


def test_gpu_demo_starts_calmly() -> None:
    """The demo's depth, but narrow: with an embedding of std 0.02, as every other matrix, this first gradient has a norm of 5.6, five times the clip (105 on
    text at full width, and the loss bounces). The bound is the clip: the step is taken whole."""
    demo, tokens = setup("cuda"), torch.randint(0, 256, (4, 129), generator=torch.Generator().manual_seed(1))
    assert demo.gpt.embedding_std == 1.0 and demo.gpt.init_std == 0.02 and setup("cpu").gpt.embedding_std == 0.0
    gpt = replace(demo.gpt, width=256, heads=4, seq=128)
    models, norms = [], []
    for config in (gpt, replace(gpt, embedding_std=0.0)):
        torch.manual_seed(0)
        models.append(GPT(config))
        loss = models[-1](tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        assert loss.item() == pytest.approx(math.log(256), abs=0.1)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in models[-1].parameters() if p.grad is not None])))
    assert norms[0] < demo.clip < 0.2 * norms[1]
    differing = [name for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True) if not torch.equal(a, b)]
    assert differing == ["embedding.weight"] and models[0].embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("name", ["fog-max", "fog-opt", "fog-flash", "op"])
def test_embedding_multipliers_stay_in_the_gpu_demo(name: str) -> None:
    gpt = replace(setup("cuda", arch=ARCHITECTURES[name]).gpt, layers=1, width=64, heads=2)
    model = GPT(gpt)
    assert model.multiplier == 50.0 and model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_batches_are_windows_of_the_text(text: Text) -> None:
    x, y = next(batches(text.train, TINY))
    assert x.shape == y.shape == (2, 32) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    haystack = bytes(text.train.tolist())
    assert all(bytes(row.tolist()) in haystack for row in x)


def test_evaluation_is_the_mean_loss_of_held_out_windows(text: Text) -> None:
    model, _ = build_model(BF16, TINY)
    starts = torch.linspace(0, 1000 - 33, 4).long().tolist()
    rows = torch.stack([text.held_out[s : s + 33].long() for s in starts])
    expected = model(rows[:, :-1], rows[:, 1:]).detach()
    assert evaluate(model, text.held_out, TINY) == pytest.approx(float(expected), rel=1e-6)


def test_model_is_causal_and_rotary_is_relative() -> None:
    model, _ = build_model(BF16, TINY)
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.allclose(a[:, 20:], b[:, 20:])
    table = rotary_table(32, 16, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(2, 1, 1, 32, 16)
    scores = (rotate(q, table) @ rotate(k, table).transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores.diagonal(-3), scores[3, 0].expand(29), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="33 tokens.*seq=32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="width=48.*heads"):
        GPTConfig(width=48, heads=5)


def test_default_text_is_the_standard_library_and_deterministic() -> None:
    first, second = load_text(None, 128), load_text(None, 128)
    assert first.sha256 == second.sha256 and first.files > 100
    assert len(first.held_out) == pytest.approx(0.05 * (len(first.train) + len(first.held_out)), rel=0.01)


def test_text_from_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_bytes(b"a" * 3000)
    (tmp_path / "sub" / "b.md").write_bytes(b"b" * 3000)
    (tmp_path / "c.bin").write_bytes(b"c" * 3000)
    folder = load_text(tmp_path, 32)
    assert folder.files == 2 and len(folder.train) + len(folder.held_out) == 6000
    assert set(folder.train.tolist()) == {97, 98}
    assert load_text(tmp_path / "c.bin", 32).files == 1
    with pytest.raises(DemoError, match="3000 bytes in 1 files.*needs at least"):
        load_text(tmp_path / "a.py", 1000)
    with pytest.raises(DemoError, match="no such file"):
        load_text(tmp_path / "missing", 32)


def test_smoothing_and_deviation() -> None:
    assert trailing_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert deviation(1.01, 1.0) == pytest.approx(1.0)
    with pytest.raises(DemoError, match="--steps 0"):
        setup("cpu", 0)
    assert (setup("cpu").baseline, setup("cuda").baseline) == ("fp32", "bf16")


def test_device_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu")[0] == "cpu" and choose_device("auto") == ("cpu", "torch sees no CUDA device")
    with pytest.raises(DemoError, match="--device cuda.*--device cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert choose_device("auto")[0] == "cpu"
        with pytest.raises(DemoError, match=rf"Old GPU has compute capability {capability[0]}\.0"):
            choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_device("auto") == ("cuda", "Old GPU")


@pytest.mark.parametrize("name", ["fog-max", "fog-opt", "fog-flash", "op"])
def test_other_architectures_learn_and_follow_their_baseline(text: Text, name: str) -> None:
    config = replace(TINY, steps=40, gpt=replace(TINY.gpt, kv_heads=1, arch=ARCHITECTURES[name]))
    baseline, quantised = compare(MOSS, config, text)
    assert baseline.final_loss(10) < baseline.losses[0] - 1
    assert abs(deviation(quantised.final_loss(10), baseline.final_loss(10))) < 1.0
    assert all(c.saturations == 0 and c.nonfinite == 0 for c in quantised.counts.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama3", "fog-max", "fog-flash"])
def test_gpu_run_follows_bf16(text: Text, name: str) -> None:
    gpt = replace(TINY.gpt, width=256, heads=2, ffn=512, seq=128, arch=ARCHITECTURES[name])
    config = replace(TINY, device="cuda", steps=40, gpt=gpt, batch=4, peak_lr=1e-3)
    baseline, quantised = compare(MOSS, config, text)
    assert baseline.final_loss(10) < baseline.losses[0] - 1
    assert abs(deviation(quantised.final_loss(10), baseline.final_loss(10))) < 1.0
    assert all(c.saturations == 0 and c.nonfinite == 0 for c in quantised.counts.values())
    assert math.isfinite(quantised.validation) and json.dumps(quantised.losses)
