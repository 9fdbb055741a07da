"""Where an iteration of Megatron goes: what the GPU does, when it waits, and what the host does meanwhile.

    scripts/launch.sh --model dense_8l_7b --recipe moss --steps 8 --profile runs/moss.json     records one iteration and prints the report
    python3 scripts/profile_megatron.py runs/moss.json --from 0 --to 40                        the report of a part of it, in milliseconds

Only CUDA's own activity is recorded (kernels and API calls): recording Python operators as well slows the host several times over, and then shows a host that
is slow. What Python does is seen as the time between two API calls of one thread. Tables of one iteration: kernels by time; gaps in which no kernel runs, with
the kernels on either side; host time by the kernel that was launched at its end. The trace opens in https://ui.perfetto.dev too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = 6
"""The iteration that is recorded: everything is compiled and every buffer has its size."""
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Event:
    """start and stop in us since the first kernel; of the GPU, or of a host thread's API call (then ``name`` is the kernel it launched, or the call)."""

    name: str
    start: float
    stop: float
    thread: int = 0


@dataclass(frozen=True)
class Gap:
    """No kernel ran between ``start`` and ``stop`` (us)."""

    start: float
    stop: float
    after: str
    before: str


def read(path: Path) -> tuple[list[Event], list[Event]]:
    """(GPU events, API calls of the host) of a Chrome trace (.json or .json.gz), each in order of their start. Raises ValueError if no kernel is in it."""
    content = path.read_bytes()
    trace = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    events: list[dict[str, Any]] = [e for e in (trace["traceEvents"] if isinstance(trace, dict) else trace) if e.get("ph") == "X"]
    gpu = [e for e in events if e.get("cat") in ON_GPU]
    if not gpu:
        raise ValueError(f"{path} has no GPU event; record it on a machine with a GPU, with CUDA activity")
    zero = min(e["ts"] for e in gpu)
    launched = {e.get("args", {}).get("correlation"): e["name"] for e in gpu}
    launched.pop(None, None)

    def made(e: dict[str, Any], name: str) -> Event:
        return Event(name, e["ts"] - zero, e["ts"] - zero + e.get("dur", 0), int(e.get("tid", 0)))

    calls = [made(e, launched.get(e.get("args", {}).get("correlation"), e["name"])) for e in events if e.get("cat") in ON_HOST]
    by_start = lambda e: e.start  # noqa: E731
    return sorted((made(e, e["name"]) for e in gpu), key=by_start), sorted(calls, key=by_start)


def busy_and_gaps(gpu: Iterable[Event]) -> tuple[float, list[Gap]]:
    """(us in which at least one kernel ran, the gaps between, longest first). gpu: in order of their start."""
    busy, end, last, gaps = 0.0, None, "", []
    for e in gpu:
        if end is None:
            end = e.start
        if e.start > end:
            gaps.append(Gap(end, e.start, last, e.name))
        busy += max(0.0, e.stop - max(e.start, end))
        if e.stop > end:
            end, last = e.stop, e.name
    return busy, sorted(gaps, key=lambda g: g.start - g.stop)


def host_times(calls: Iterable[Event]) -> dict[str, tuple[float, float, int]]:
    """Kernel or API call -> (us of its thread since that thread's last call: Python; us inside the call; how often)."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    before: dict[int, float] = {}
    for e in calls:
        entry = found[e.name]
        entry[0] += max(0.0, e.start - before.get(e.thread, e.start))
        entry[1] += e.stop - e.start
        entry[2] += 1
        before[e.thread] = e.stop
    return {name: (python, inside, int(count)) for name, (python, inside, count) in found.items()}


def report(gpu: list[Event], calls: list[Event], rows: int) -> str:
    """The tables that the module describes, ``rows`` lines each."""
    busy, gaps = busy_and_gaps(gpu)
    span = max(e.stop for e in gpu) - gpu[0].start
    lines = [f"span {span / 1e3:.1f} ms, GPU busy {busy / 1e3:.1f} ms, idle {(span - busy) / 1e3:.1f} ms", "", "kernels", "      ms  count   us each"]
    total: dict[str, list[float]] = defaultdict(list)
    for e in gpu:
        total[e.name].append(e.stop - e.start)
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))[:rows]:
        lines.append(f"{sum(times) / 1e3:8.2f} {len(times):6d} {sum(times) / len(times):9.1f}  {name[:100]}")
    lines += ["", "gaps", "      us   at ms"]
    lines += [f"{g.stop - g.start:8.0f} {(g.stop - gpu[0].start) / 1e3:7.1f}  {g.after[:50]} -> {g.before[:50]}" for g in gaps[:rows]]
    lines += ["", "host, by what was launched", "python ms  inside the call ms  count"]
    for name, (python, inside, count) in sorted(host_times(calls).items(), key=lambda item: -item[1][0])[:rows]:
        lines.append(f"{python / 1e3:9.2f} {inside / 1e3:15.2f} {count:6d}  {name[:100]}")
    return "\n".join(lines)


def record(path: Path) -> None:
    """Run Megatron's training with the arguments of this process; iteration `STEP` of rank 0 goes to ``path``, and its report to the output."""
    import torch

    from fp8_recipes.megatron import pretrain, shims

    shims.install()
    import megatron.training.training as training

    original, steps = training.train_step, 0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != STEP or os.environ.get("RANK", "0") != "0":
            return original(*args, **kwargs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = original(*args, **kwargs)
            torch.cuda.synchronize()
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        print(f"profile of iteration {STEP} -> {path}\n{report(*read(path), rows=40)}", flush=True)
        return result

    training.train_step = train_step
    pretrain.main()
    if steps < STEP:
        sys.exit(f"profile_megatron.py: iteration {STEP} is the one that is recorded, and training ended after {steps}; use --steps {STEP + 1} or more")


def main() -> None:
    wanted = os.environ.get("FP8_RECIPES_PROFILE")
    if wanted:
        record(Path(wanted))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--from", dest="begin", type=float, default=float("-inf"), metavar="MS")
    parser.add_argument("--to", dest="end", type=float, default=float("inf"), metavar="MS")
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    gpu, calls = ([e for e in events if args.begin <= e.start / 1e3 < args.end] for events in read(args.trace))
    if not gpu:
        sys.exit(f"profile_megatron.py: no kernel starts between {args.begin} and {args.end} ms")
    print(report(gpu, calls, args.rows))


if __name__ == "__main__":
    main()
