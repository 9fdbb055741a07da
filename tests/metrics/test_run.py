from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_recipes.metrics import Alarm, Alarms, JsonLines, MonitorHooks, RunMetrics, Target, TensorBoard, Thresholds, WandB
from fp8_recipes.metrics.sinks import read_kurtosis


def train(metrics: RunMetrics, steps: range, spike: int | None = None) -> None:
    layer = metrics.hooks.targets[0].module
    for step in steps:
        x = torch.ones(2, 8)
        if step == spike:
            x[0, 0] = float("inf")
        layer(x)
        metrics.after_step(step, loss=1.0 / step, grad_norm=None)


def hooks(interval: int = 2) -> MonitorHooks:
    return MonitorHooks([Target("layers.1.qkv", torch.nn.Identity())], interval=interval)


def test_json_lines_hold_readings_scalars_and_alarms(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "deep" / "metrics.jsonl"
    train(RunMetrics(hooks(), sinks=[JsonLines(path)], warn=warnings.append), range(1, 6), spike=4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["kind"], x["step"]) for x in lines] == [("metrics", 1), ("metrics", 2), ("metrics", 4), ("alarm", 4)]
    assert lines[1]["loss"] == 0.5 and "grad_norm" not in lines[1]
    assert lines[1]["tensors"]["layers.1.qkv"] == {"kurtosis": 1.0, "pooled_kurtosis": 1.0, "rms": 1.0, "amax": 1.0, "elements": 16}
    alarm = lines[3]
    assert (alarm["alarm"], alarm["layer"], alarm["tensor"], alarm["name"]) == ("nonfinite", 1, "qkv", "layers.1.qkv")
    assert warnings == [alarm["message"]] and "layer 1, qkv" in warnings[0]
    assert read_kurtosis(path, before=4) == [(1, {"layers.1.qkv": 1.0}), (2, {"layers.1.qkv": 1.0})]


def test_a_tensor_among_the_scalars_is_looked_at_in_observed_steps_only(tmp_path: Path) -> None:
    class Loss(torch.Tensor):
        looked_at = 0

        def __float__(self) -> float:
            Loss.looked_at += 1
            return 2.5

    path = tmp_path / "m.jsonl"
    metrics = RunMetrics(hooks(3), sinks=[JsonLines(path)])
    for step in range(1, 7):
        metrics.hooks.targets[0].module(torch.ones(2, 8))
        metrics.after_step(step, loss=torch.tensor(0.0).as_subclass(Loss))
    assert Loss.looked_at == 3
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.5, 2.5, 2.5]


def test_stop_is_called_once_and_only_for_the_kinds_asked_for() -> None:
    stopped: list[list[Alarm]] = []
    metrics = RunMetrics(hooks(1), stop_on=("nonfinite",), stop=stopped.append)
    train(metrics, range(1, 5), spike=2)
    train(metrics, range(5, 9), spike=6)
    assert len(stopped) == 1 and stopped[0][0].step == 2 and metrics.stopped
    other: list[list[Alarm]] = []
    train(RunMetrics(hooks(1), stop_on=("kurtosis",), stop=other.append), range(1, 5), spike=2)
    assert other == []


def test_ranks_without_sinks_stay_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train(RunMetrics(hooks(1)), range(1, 3), spike=2)
    assert capsys.readouterr().err == ""
    train(RunMetrics(hooks(1), sinks=[JsonLines(tmp_path / "m.jsonl")]), range(1, 3), spike=2)
    assert "fp8_recipes: WARNING: step 2, layer 1, qkv: 1 elements are NaN or Inf" in capsys.readouterr().err


def test_tensorboard_tags(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    train(RunMetrics(hooks(), sinks=[TensorBoard(writer)], warn=lambda text: None), range(1, 5), spike=4)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"fp8/kurtosis/qkv/layer_01", "fp8/kurtosis/qkv/mean", "fp8/amax/qkv/layer_01"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("fp8/kurtosis/qkv/layer_01")] == [(1, 1.0), (2, 1.0), (4, pytest.approx((8 / 7 + 1) / 2))]
    assert "fp8/alarm/text_summary" in events.Tags()["tensors"]


def test_wandb_gets_one_call_per_observed_step() -> None:
    class Run:
        def __init__(self) -> None:
            self.logged: list[tuple[int, dict[str, Any]]] = []

        def log(self, values: dict[str, Any], step: int) -> None:
            self.logged.append((step, values))

    run = Run()
    train(RunMetrics(hooks(), sinks=[WandB(run)], warn=lambda text: None), range(1, 5), spike=4)
    assert [step for step, _ in run.logged] == [1, 2, 4]
    assert run.logged[2][1]["fp8/alarms"] == 1 and run.logged[0][1]["fp8/kurtosis/qkv/layer_01"] == 1.0


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="'loss'"):
        RunMetrics(hooks(), stop_on=("loss",), stop=print)
    with pytest.raises(ValueError, match="stop callback"):
        RunMetrics(hooks(), stop_on=("kurtosis",))
    assert RunMetrics(hooks(), alarms=Alarms(Thresholds(warmup=7))).alarms.thresholds.warmup == 7
