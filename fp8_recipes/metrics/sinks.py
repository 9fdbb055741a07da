"""Where readings go: JSON lines (what ``fp8-recipes inspect`` reads), TensorBoard, Weights & Biases.

A sink has ``write(step, readings, alarms, scalars)``; scalars are loss and the like. Only one rank writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .alarms import Alarm, split_name
from .alarms import lines as alarm_lines
from .table import Reading

_PLOTTED = ("kurtosis", "pooled_kurtosis", "amax", "flush_share", "saturation_share", "fold_flush_share", "scale_exponent_min", "scale_exponent_max")


class Sink(Protocol):
    """Takes what one observed step gave."""

    def write(self, step: int, readings: Mapping[str, Reading], alarms: Sequence[Alarm], scalars: Mapping[str, float]) -> None: ...


def alarm_line(alarm: Alarm) -> dict[str, Any]:
    """An alarm as a line of `JsonLines`."""
    fields = asdict(alarm)
    return {"kind": "alarm", "step": alarm.step, "alarm": fields.pop("kind"), **fields, "layer": alarm.layer, "tensor": alarm.tensor}


class JsonLines:
    """One object per observed step, appended to ``path``: {"kind": "metrics", "step", **scalars, "tensors": {name: {...}}}; one per alarm:
    {"kind": "alarm", "step", ...}, with ``alarm`` for the alarm's own kind. Shares are fractions, 0 to 1. run: a name to tell the trainings of one file
    apart, written as "run"."""

    def __init__(self, path: str | Path, run: str | None = None) -> None:
        self.path, self.run = Path(path), run
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, readings: Mapping[str, Reading], alarms: Sequence[Alarm], scalars: Mapping[str, float]) -> None:
        lines: list[dict[str, Any]] = [{"kind": "metrics", "step": step, **scalars, "tensors": {name: r.as_json() for name, r in readings.items()}}]
        lines += [alarm_line(alarm) for alarm in alarms]
        named = {} if self.run is None else {"run": self.run}
        with self.path.open("a") as stream:
            stream.writelines(json.dumps(named | line) + "\n" for line in lines)


def read_kurtosis(path: str | Path, before: int | None = None) -> list[tuple[int, dict[str, float | None]]]:
    """(step, kurtosis by name) of every metrics line of a `JsonLines` file, for a run that resumes. before: only steps below it."""
    found = []
    with Path(path).open() as stream:
        for text in stream:
            line = json.loads(text)
            if line.get("kind") == "metrics" and (before is None or line["step"] < before):
                found.append((line["step"], {name: t.get("kurtosis") for name, t in line["tensors"].items()}))
    return found


def scalars_of(readings: Mapping[str, Reading]) -> dict[str, float]:
    """Tag -> value: "fp8/kurtosis/qkv/layer_03" for every layer and "fp8/kurtosis/qkv/mean" over the layers."""
    tags: dict[str, float] = {}
    layers: dict[str, list[float]] = {}
    for name, reading in readings.items():
        layer, tensor = split_name(name)
        fields = reading.as_json()
        for field in _PLOTTED:
            value = fields.get(field)
            if value is None:
                continue
            tags[f"fp8/{field}/{tensor}" + ("" if layer is None else f"/layer_{layer:02d}")] = value
            if layer is not None:
                layers.setdefault(f"fp8/{field}/{tensor}/mean", []).append(value)
    return tags | {tag: sum(values) / len(values) for tag, values in layers.items()}


class TensorBoard:
    """Scalars into a ``torch.utils.tensorboard.SummaryWriter`` (Megatron's, or one of the caller's), alarms as text."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, step: int, readings: Mapping[str, Reading], alarms: Sequence[Alarm], scalars: Mapping[str, float]) -> None:
        for tag, value in scalars_of(readings).items():
            self.writer.add_scalar(tag, value, step)
        for line in alarm_lines(alarms):
            self.writer.add_text("fp8/alarm", line, step)


class WandB:
    """Scalars into a Weights & Biases run (``wandb.init()``'s result, or the wandb module itself, which is what Megatron hands out)."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def write(self, step: int, readings: Mapping[str, Reading], alarms: Sequence[Alarm], scalars: Mapping[str, float]) -> None:
        self.run.log(scalars_of(readings) | {"fp8/alarms": len(alarms)}, step=step)
