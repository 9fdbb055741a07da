"""Times of memory-bound kernels beside a copy of as many bytes: what scripts/bench_kernels.py measures with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

Calls = dict[str, list[Callable[[], object]]]
Table = list[dict[str, object]]
ROTATE_BYTES = 160 << 20
"""Inputs rotate through at least this much, three times the L2."""


def measure(contenders: Calls, rounds: int) -> dict[str, float]:
    """Median microseconds of each contender; each is a list of the same call on rotating inputs."""
    for calls in contenders.values():
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for i in range(rounds):
        torch.cuda._sleep(1_500_000 + 400_000 * len(contenders))  # the GPU waits while the host fills its queue
        for name, calls in contenders.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            calls[i % len(calls)]()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: statistics.median(b.elapsed_time(e) * 1000 for b, e in pairs) for name, pairs in events.items()}


def copy_calls(nbytes: float) -> list[Callable[[], object]]:
    """Copies that move (read + write) ``nbytes``."""
    half = int(nbytes) // 2
    pairs = [(torch.empty(half, dtype=torch.uint8, device="cuda"), torch.empty(half, dtype=torch.uint8, device="cuda")) for _ in range(rotations(half))]
    return [partial(dst.copy_, src) for src, dst in pairs]


def rotations(nbytes: float) -> int:
    return max(2, min(6, -(-ROTATE_BYTES // int(nbytes))))


def record(table: Table, shape: tuple[int, int], times: dict[str, float], nbytes: dict[str, float], copy: str = "copy") -> None:
    """Print and keep microseconds, GB/s and share of the copy's bandwidth; contenders without byte count are peers."""
    bandwidth = nbytes[copy] / times[copy]
    for name, us in times.items():
        moved = nbytes.get(name)
        rate = moved / us if moved else None
        row = {"shape": f"{shape[0]}x{shape[1]}", "op": name, "us": round(us, 2), "GB/s": round(rate / 1000, 1) if rate else ""}
        row["of_copy"] = round(rate / bandwidth, 3) if rate else ""
        table.append(row)
        shown = f"{rate / 1e6:6.3f} TB/s  {rate / bandwidth:6.1%} of copy" if rate else ""
        print(f"{row['shape']:>12}  {name:<44} {us:9.1f} us  {shown}")
