"""Hooks, alarms and sinks of one training run together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .alarms import KINDS, Alarm, Alarms, lines
from .hooks import MonitorHooks
from .sinks import Sink
from .table import Reading


class RunMetrics:
    """Call `after_step` once per optimizer step on every rank.

    sinks: given on the one rank that writes, empty elsewhere; alarms are judged on every rank, from the same numbers, so all of them decide alike.
    warn: gets a line of text for every kind of alarm and tensor, naming its layers; the default prints to stderr. Called on the rank that has sinks.
    stop_on: kinds of alarm after which ``stop`` is called (once, on every rank): there a trainer saves a checkpoint and leaves.
    """

    def __init__(
        self,
        hooks: MonitorHooks,
        *,
        sinks: Sequence[Sink] = (),
        alarms: Alarms | None = None,
        warn: Callable[[str], None] | None = None,
        stop_on: Sequence[str] = (),
        stop: Callable[[list[Alarm]], Any] | None = None,
    ) -> None:
        unknown = [k for k in stop_on if k not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind of alarm {unknown[0]!r} in stop_on; expected some of {KINDS}")
        if stop_on and stop is None:
            raise ValueError(f"stop_on={tuple(stop_on)} needs a stop callback that saves and ends the run")
        self.hooks = hooks
        self.sinks = list(sinks)
        self.alarms = Alarms() if alarms is None else alarms
        self._warn = _to_stderr if warn is None else warn
        self._stop_on, self._stop = tuple(stop_on), stop
        self.stopped = False

    def after_step(self, step: int, **scalars: float | torch.Tensor | None) -> dict[str, Reading] | None:
        """Readings if ``step`` was observed, else None. scalars: loss=..., grad_norm=..., learning_rate=...; written beside the readings. A tensor is looked at
        in observed steps only, after everything else was queued on its device."""
        readings = self.hooks.end_step(step)
        if readings is None:
            return None
        raised = self.alarms.judge(step, readings)
        known = {name: float(value) for name, value in scalars.items() if value is not None}
        for sink in self.sinks:
            sink.write(step, readings, raised, known)
        if self.sinks:
            for line in lines(raised):
                self._warn(line)
        fatal = [a for a in raised if a.kind in self._stop_on]
        if fatal and not self.stopped and self._stop is not None:
            self.stopped = True
            self._stop(fatal)
        return readings


def _to_stderr(message: str) -> None:
    print(f"fp8_recipes: WARNING: {message}", file=sys.stderr, flush=True)
