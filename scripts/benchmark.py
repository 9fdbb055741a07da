"""Shared by the bench_*.py scripts: contenders that take turns on the GPU, and tables as CSV."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def timed(contenders: dict[str, Callable[[int], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds per call. A contender gets a counter and picks its operands by it. The GPU sleeps first, while the host enqueues."""
    counter = itertools.count()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(next(counter))
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, run in contenders.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_500_000)
            run(next(counter))
            start.record()
            for _ in range(calls):
                run(next(counter))
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) / calls)
    return {name: statistics.median(values) for name, values in samples.items()}


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line per row under the keys of the first, numbers to four digits; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
