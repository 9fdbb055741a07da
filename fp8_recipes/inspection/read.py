"""From JSON lines to series over steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..metrics.alarms import FATAL, Alarms, split_name
from ..metrics.sinks import alarm_line

Series = dict[int, float]
"""Step -> value, in the order of steps."""
WATCHED = ("qkv", "q", "kv", "down_input", "shared_down_input", "block_output")
"""Tensors whose kurtosis is drawn, QKV first."""
ROLES = ("input", "weight", "grad")
SHARES = ("flush_share", "saturation_share", "fold_flush_share")
_SCALARS = {"loss": "loss", "lm_loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "lr": "learning_rate"}


class InspectError(Exception):
    """A run that cannot be read; the text says which file and why."""


@dataclass
class RunLog:
    """One training.

    scalars: "loss", "grad_norm", "learning_rate". tensors: name -> field of `metrics.Reading` -> series. alarms: as written by `metrics.JsonLines`.
    """

    name: str
    scalars: dict[str, Series] = field(default_factory=dict)
    tensors: dict[str, dict[str, Series]] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        series = [*self.scalars.values(), *(s for fields in self.tensors.values() for s in fields.values())]
        return max((max(s) for s in series if s), default=0)

    @property
    def foreseeing(self) -> list[dict[str, Any]]:
        """Alarms of `FATAL` kinds: shares of flushed or saturated values may be beyond their thresholds from the start."""
        return [a for a in self.alarms if a["alarm"] in FATAL]

    def layers(self, tensor: str, what: str) -> dict[int, Series]:
        """Series of one field of one tensor, by layer, e.g. layers("qkv", "kurtosis")."""
        found = {}
        for name, fields in self.tensors.items():
            layer, rest = split_name(name)
            if layer is not None and rest == tensor and fields.get(what):
                found[layer] = fields[what]
        return dict(sorted(found.items()))

    def watched(self) -> list[str]:
        """Those of `WATCHED` that this run has."""
        return [t for t in WATCHED if self.layers(t, "kurtosis")]

    def of_role(self, role: str, what: str) -> dict[str, Series]:
        """Series of one field of every quantised tensor of a role ("input", "weight" or "grad"), by name."""
        return {n: f[what] for n, f in self.tensors.items() if n.endswith("." + role) and f.get(what)}


def mean_over(series: dict[Any, Series]) -> Series:
    """Mean over the members, at every step that any of them has."""
    steps = sorted({s for one in series.values() for s in one})
    values = {step: [one[step] for one in series.values() if step in one] for step in steps}
    return {step: sum(v) / len(v) for step, v in values.items()}


def judge_again(log: RunLog) -> None:
    """Put the alarms of kurtosis that the readings give by the defaults of this version in place of those in the log. Their warm-up is 100 steps, whatever the
    run's own was: the log does not say."""
    alarms = Alarms()
    readings: dict[int, dict[str, float | None]] = {}
    for name, fields in log.tensors.items():
        for step, value in fields.get("kurtosis", {}).items():
            readings.setdefault(step, {})[name] = value
    found = [alarm_line(alarm) for step in sorted(readings) for alarm in alarms.judge_kurtosis(step, readings[step])]
    log.alarms = sorted([a for a in log.alarms if a["alarm"] != "kurtosis"] + found, key=lambda a: a["step"])


def read_run(path: Path) -> list[RunLog]:
    """The runs in a folder (all its .jsonl files together) or in one file. The demo's log holds two, told apart by ``run``."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not path.exists():
        raise InspectError(f"{path}: no such file or folder; name a folder that holds .jsonl files, or one of them")
    if not files:
        raise InspectError(f"{path} holds no .jsonl file; a run writes them under --fp8-metrics-log and --fp8-log, the demo under --out")
    logs: dict[str | None, RunLog] = {}
    name = path.resolve().name if path.is_dir() else path.stem
    for file in files:
        for line in _lines(file):
            key = line.get("run")
            log = logs.setdefault(key, RunLog(name if key is None else f"{name}: {key}"))
            _take(log, line)
    if not logs:
        raise InspectError(f"{path}: no line of {', '.join(f.name for f in files)} holds a step with loss or metrics")
    for log in logs.values():
        _sort(log)
    return list(logs.values())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects with a step. The last line may be cut off: the run may still be writing."""
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InspectError(f"{file} cannot be read as text ({error}); is this the log of a run?") from None
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                return
            raise InspectError(f"{file}, line {number}: not JSON ({error.msg}); is this the log of a run?") from None
        if isinstance(line, dict) and ("step" in line or "iteration" in line):
            yield line


def _take(log: RunLog, line: dict[str, Any]) -> None:
    step = int(line["step"] if "step" in line else line["iteration"])
    if line.get("kind") == "alarm":
        log.alarms.append(line)
        return
    for key, scalar in _SCALARS.items():
        if isinstance(line.get(key), (int, float)):
            log.scalars.setdefault(scalar, {})[step] = float(line[key])
    for name, fields in line.get("tensors", {}).items():
        for what, value in fields.items():
            if isinstance(value, (int, float)):
                log.tensors.setdefault(name, {}).setdefault(what, {})[step] = float(value)


def _sort(log: RunLog) -> None:
    """Steps ascending, whichever file they came from; a step run twice (after a resume) keeps what was written last."""
    log.scalars = {k: dict(sorted(s.items())) for k, s in log.scalars.items()}
    log.tensors = {n: {k: dict(sorted(s.items())) for k, s in f.items()} for n, f in log.tensors.items()}
    log.alarms.sort(key=lambda a: a["step"])
