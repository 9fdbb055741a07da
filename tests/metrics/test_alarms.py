from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from fp8_recipes.metrics import Alarm, Alarms, Reading, Thresholds
from fp8_recipes.metrics.alarms import KINDS, lines, split_name

HEALTHY = Reading(12.0, 12.0, 1.0, 10.0, 1000, 0, 1000, 0, 0, 0, -7, -6)


def run(curve: Callable[[int], float], name: str = "layers.3.qkv", steps: int = 4000, interval: int = 10, thresholds: Thresholds | None = None) -> list[Alarm]:
    alarms = Alarms(thresholds)
    found = []
    for step in range(interval, steps + 1, interval):
        found += alarms.judge(step, {name: replace(HEALTHY, kurtosis=curve(step))})
    return found


@pytest.mark.parametrize(
    "curve",
    [
        lambda t: 3 + 4 * math.log1p(t / 50),  # the paper's healthy growth
        lambda t: 3 * math.sqrt(t),
        lambda t: 40 + 0.03 * t,  # linear, but from where it stands
        lambda t: 12 * (1 + 0.2 * math.sin(t)),  # noise of 20 %
        lambda t: 200.0 / (1 + t / 100),
        lambda t: 2 + (t / 2000) ** 4 * 0.1,  # fast, but still below the floor
    ],
)
def test_healthy_curves_raise_nothing(curve: Callable[[int], float]) -> None:
    assert run(curve) == []


def test_departure_from_logarithmic_growth_is_seen_early_and_named() -> None:
    """Grows like a logarithm for 2000 steps, then doubles every 300."""

    def curve(t: int) -> float:
        return (3 + 4 * math.log1p(t / 50)) * 2 ** max(0.0, (t - 2000) / 300)

    found = run(curve)
    assert len(found) == 1
    alarm = found[0]
    assert 2000 < alarm.step <= 2400
    assert (alarm.kind, alarm.layer, alarm.tensor, alarm.threshold) == ("kurtosis", 3, "qkv", 1.0)
    assert alarm.value >= 1.0
    assert alarm.message.startswith(f"step {alarm.step}, layer 3, qkv: kurtosis ")
    later = run(curve, "layers.3.block_output")
    assert later[0].step == alarm.step + 10  # QKV has one observation less to wait


def test_the_mean_over_layers_is_judged_and_the_largest_is_named() -> None:
    def found(curves: list[Callable[[int], float]]) -> list[Alarm]:
        alarms, raised = Alarms(), []
        for step in range(10, 2001, 10):
            raised += alarms.judge(step, {f"layers.{n}.block_output": replace(HEALTHY, kurtosis=curve(step)) for n, curve in enumerate(curves, 1)})
        return raised

    def grows(t: int) -> float:
        return t * t / 1e3

    assert run(grows, "layers.2.block_output", steps=2000)
    assert found([lambda t: 4e3, grows, lambda t: 4e3]) == [], "one of three, and the mean hardly moves"
    (alarm,) = found([grows, lambda t: 3 * grows(t), grows])
    assert alarm.name == "layers.2.block_output" and alarm.message.startswith(f"step {alarm.step}, layer 2, block_output: kurtosis ")
    largest = 3 * grows(alarm.step)
    assert f"kurtosis {largest:.1f} ({largest * 5 / 9:.1f} on average over layers) grows like step^2.0" in alarm.message


def test_the_down_projections_input_is_judged_from_a_higher_level_on() -> None:
    """Grows like the square of the steps: past 10 at 320, past 100 at 1000."""

    def curve(t: int) -> float:
        return t * t / 1e4

    assert [run(curve, f"layers.3.{tensor}")[0].step for tensor in ("block_output", "down_input", "mlp.shared_down_input")] == [340, 1020, 1020]


def test_alarm_comes_again_only_after_it_has_ceased() -> None:
    def curve(t: int) -> float:
        return 20 * (4 if 1000 < t <= 1100 or t > 3000 else 1)

    assert [a.step for a in run(curve)] == pytest.approx([1030, 3030], abs=10)


def test_warmup_is_not_judged_and_a_resumed_run_remembers() -> None:
    def curve(t: int) -> float:
        return 5.0 * t

    assert run(curve, steps=400, thresholds=Thresholds(warmup=1000)) == []
    assert run(curve, steps=1500, thresholds=Thresholds(warmup=100))
    resumed = Alarms()
    for step in range(10, 1001, 10):
        resumed.remember(step, {"layers.1.qkv": 20.0})
    resumed.remember(1000, {"layers.1.qkv": None})
    found = [a for step in range(1010, 1100, 10) for a in resumed.judge(step, {"layers.1.qkv": replace(HEALTHY, kurtosis=90.0)})]
    assert len(found) == 1


def test_a_step_run_again_after_a_rollback_replaces_what_was_seen() -> None:
    alarms = Alarms()
    for step in range(10, 501, 10):
        alarms.remember(step, {"x": 20.0})
    alarms.remember(300, {"x": 7.0})
    assert alarms._history["x"][0][-1] == 300 and alarms._history["x"][1][-1] == 7.0


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("layers.2.mlp.down.input", {"saturated": 1}, "saturation"),
        ("layers.2.mlp.down.input", {"flushed": 11}, "flush"),
        ("layers.2.mlp.down.grad", {"flushed": 501}, "flush"),
        ("layers.2.mlp.down.input", {"fold_flushed": 11}, "fold_flush"),
        ("layers.2.block_output", {"nonfinite": 1}, "nonfinite"),
    ],
)
def test_shares_above_their_threshold(name: str, change: dict[str, int], kind: str) -> None:
    alarms = Alarms()
    wait = 3 if "flush" in kind else 1
    bad = replace(HEALTHY, **change)  # type: ignore[arg-type]
    assert alarms.judge(1, {name: HEALTHY}) == []
    for step in range(2, 1 + wait):
        assert alarms.judge(step, {name: bad}) == []
    (alarm,) = alarms.judge(1 + wait, {name: bad})
    assert (alarm.kind, alarm.layer, alarm.name) == (kind, 2, name)
    assert "layer 2" in alarm.message and alarm.value > alarm.threshold
    assert alarms.judge(10, {name: bad}) == []
    assert alarms.judge(11, {name: HEALTHY}) == []
    assert sum(len(alarms.judge(12 + i, {name: bad})) for i in range(wait)) == 1


def test_a_share_that_hovers_around_its_threshold_is_told_once() -> None:
    alarms, name = Alarms(), "layers.2.mlp.down.input"
    found = []
    for step, flushed in enumerate([11, 9, 11, 12, 13, 9, 6, 11, 9, 11, 11, 11, 4, 11, 11, 11]):
        found += alarms.judge(step, {name: replace(HEALTHY, flushed=flushed)})
    assert [a.step for a in found] == [4, 15]


def test_gradients_may_flush_more_and_only_activations_have_a_kurtosis_alarm() -> None:
    alarms = Alarms(Thresholds(patience=1))
    assert alarms.judge(1, {"layers.2.mlp.down.grad": replace(HEALTHY, flushed=499)}) == []
    assert alarms.judge(2, {"layers.2.mlp.down.grad": replace(HEALTHY, flushed=501)}) != []
    assert run(lambda t: 1.01**t, name="layers.2.mlp.down.grad") == []


def test_qkv_comes_first() -> None:
    alarms = Alarms(Thresholds(patience=2))
    found = []
    for step in range(10, 1000, 10):
        k = replace(HEALTHY, kurtosis=20.0 if step < 600 else 100.0)
        found += alarms.judge(step, {"layers.1.block_output": k, "layers.9.qkv": k})
    assert [a.name for a in found] == ["layers.9.qkv", "layers.1.block_output"]


def test_what_several_layers_share_is_one_line_and_one_layer_is_told_as_it_is() -> None:
    alarms = Alarms(Thresholds(patience=1, grad_flush_share=0.05))
    flushed = {1: 278, 2: 300, 3: 940, 6: 100}
    readings = {f"layers.{n}.mlp.fc1.grad": replace(HEALTHY, fold_flushed=count) for n, count in flushed.items()}
    readings |= {"layers.4.qkv": replace(HEALTHY, nonfinite=2), "output_layer.grad": replace(HEALTHY, flushed=237)}
    readings |= {f"layers.{n}.mlp.fc2.weight": replace(HEALTHY, saturated=n) for n in (1, 2)}
    found = alarms.judge(30, readings)
    assert len(found) == 8
    assert lines(found) == [
        "step 30, layer 4, qkv: 2 elements are NaN or Inf (threshold 0)",
        "step 30, layers 1-2, mlp.fc2.weight: 0.1000% (layer 1) to 0.2000% (layer 2) of its values are above what its scale can hold (threshold 1e-05)",
        "step 30, output_layer.grad: 23.70% of its values become zero in FP8 (threshold 0.05)",
        "step 30, layers 1-3,6, mlp.fc1.grad: 10.00% (layer 6) to 94.00% (layer 3) of its FP8 values become zero in the fold for wgrad (threshold 0.05)",
    ]
    assert lines([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_alarm_can_be_told_of_several_layers(kind: str) -> None:
    (line,) = lines([Alarm(7, kind, f"layers.{n}.qkv", n / 10, 0.05, "") for n in (2, 5)])
    assert line.startswith("step 7, layers 2,5, qkv: ") and "(layer 2) to " in line and "(layer 5)" in line and line.endswith("(threshold 0.05)")


def test_names_and_thresholds() -> None:
    assert split_name("layers.12.mlp.down.input") == (12, "mlp.down.input")
    assert split_name("head.input") == (None, "head.input")
    with pytest.raises(ValueError, match="flush_share=0"):
        Thresholds(flush_share=0)
