"""Runs to tables: Megatron's text log to speed and memory, `--fp8-log` JSON lines to loss curves and bitwise comparisons.

    python -m fp8_recipes.megatron.parse_log speed --csv speed.csv bf16=bf16.log moss=moss.log
    python -m fp8_recipes.megatron.parse_log loss --csv loss.csv --png loss.png bf16=bf16.jsonl moss=moss.jsonl
    python -m fp8_recipes.megatron.parse_log same --from-step 11 through.jsonl resumed.jsonl

The first run given is the baseline of speed-ups and deviations. `same`, `near` and `steps` end with status 1 and say why when the runs differ.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ITERATION = re.compile(r"iteration +(\d+)/ +\d+ \|.*?elapsed time per iteration \(ms\): ([0-9.]+) \|")
_RESIDENT = re.compile(r"\(after \d+ iterations\) memory \(MB\) \| allocated: ([0-9.]+) \|")
_SUMMARY = "fp8_recipes_summary "
WARMUP = 3
"""Iterations left out of the median: compilation, autotuning and the allocator's first passes."""


class LogError(ValueError):
    """A log that lacks what is asked of it."""


@dataclass(frozen=True)
class Speed:
    """ms per iteration: median after warm-up (or mean over a period, see `read_speed`), smallest and largest; peak_mb: largest torch allocation on any rank,
    MB of 2**20 bytes.

    resident_mb: what is allocated between iterations (weights, gradients, optimizer, caches), as Megatron reports it after the first; largest of the ranks
    that print it, None if none does.
    """

    recipe: str
    ms: float
    ms_min: float
    ms_max: float
    iterations: int
    peak_mb: float
    resident_mb: float | None = None


def read_speed(recipe: str, path: str | Path, warmup: int = WARMUP, period: int = 1) -> Speed:
    """Speed and peak memory of one run from its text log.

    period: of work that is done every so many iterations (metrics). A median over all iterations would not see it: the median is then taken of the iterations
    at the same place in the period, and its mean over the places counts. With 1 that is the median of all.
    """
    text = Path(path).read_text(errors="replace")
    times = [float(ms) for number, ms in _ITERATION.findall(text) if int(number) > warmup]
    if not times:
        raise LogError(f"{path}: no iteration after the first {warmup}; run more steps with --log-interval 1")
    if len(times) % period:
        raise LogError(f"{path}: {len(times)} iterations after the first {warmup} are no whole number of periods of {period}; change the steps or --warmup")
    middle = statistics.fmean(statistics.median(times[place::period]) for place in range(period))
    summaries = [line for line in text.splitlines() if _SUMMARY in line]
    if not summaries:
        raise LogError(f"{path}: no '{_SUMMARY.strip()}' line, so the run did not reach its end under fp8_recipes.pretrain_gpt")
    peak = json.loads(summaries[-1].split(_SUMMARY, 1)[1])["peak_allocated_bytes"] / 2**20
    resident = max((float(mb) for mb in _RESIDENT.findall(text)), default=None)
    return Speed(recipe, middle, min(times), max(times), len(times), peak, resident)


def read_losses(path: str | Path) -> dict[int, float]:
    """Iteration -> loss, exact, from JSON lines. A step that a resumed run repeats counts as the last run wrote it."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    if not lines:
        raise LogError(f"{path}: no iterations")
    return {int(line["iteration"]): float.fromhex(line["lm_loss_hex"]) for line in lines}


def smoothed_final(losses: dict[int, float], window: int) -> float:
    """Mean loss of the last ``window`` steps."""
    steps = sorted(losses)[-window:]
    return math.fsum(losses[s] for s in steps) / len(steps)


def write_speed(runs: list[Speed], path: str | Path | None) -> str:
    """CSV to ``path``; returns the table."""
    base = runs[0]
    rows = [
        {
            "recipe": r.recipe,
            "ms_per_iteration": f"{r.ms:.1f}",
            "speedup": f"{base.ms / r.ms:.3f}",
            "ms_min": f"{r.ms_min:.1f}",
            "ms_max": f"{r.ms_max:.1f}",
            "iterations": r.iterations,
            "peak_mb": f"{r.peak_mb:.0f}",
            "peak_vs_baseline_mb": f"{r.peak_mb - base.peak_mb:+.0f}",
            "resident_mb": "" if r.resident_mb is None else f"{r.resident_mb:.0f}",
            "peak_above_resident_mb": "" if r.resident_mb is None else f"{r.peak_mb - r.resident_mb:.0f}",
        }
        for r in runs
    ]
    if path:
        write_csv(path, rows)
    return table(rows)


def write_losses(runs: dict[str, dict[int, float]], window: int, csv_path: str | Path | None, png: str | Path | None) -> str:
    """Curves to ``csv_path``, summary beside it, plot to ``png``; returns the summary table."""
    baseline = next(iter(runs))
    steps = sorted(set.intersection(*(set(losses) for losses in runs.values())))
    if not steps:
        raise LogError("the runs have no step in common")
    common = {name: {s: losses[s] for s in steps} for name, losses in runs.items()}
    reference = smoothed_final(common[baseline], window)
    summary = []
    for name, losses in common.items():
        final = smoothed_final(losses, window)
        worst = max(abs(losses[s] / common[baseline][s] - 1) for s in steps)
        summary.append(
            {
                "recipe": name,
                "steps": steps[-1],
                f"loss_mean_last_{min(window, len(steps))}": f"{final:.5f}",
                "deviation_percent": f"{100 * (final / reference - 1):+.4f}",
                "largest_step_deviation_percent": f"{100 * worst:.3f}",
            }
        )
    if csv_path:
        write_csv(csv_path, [{"step": s, **{name: repr(losses[s]) for name, losses in common.items()}} for s in steps])
        write_csv(Path(csv_path).with_name(Path(csv_path).stem + "_summary.csv"), summary)
    if png:
        plot(common, png)
    return table(summary)


def plot(runs: dict[str, dict[int, float]], path: str | Path) -> None:
    """Loss over steps, and below it, if there are several runs, the deviation of each from the first in percent (running mean)."""
    try:
        import matplotlib
    except ImportError as error:
        raise LogError("a plot needs matplotlib: pip install matplotlib, or leave --png out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    baseline, several = next(iter(runs)), len(runs) > 1
    heights = [4, 2] if several else [4]
    figure, panels = pyplot.subplots(len(heights), 1, sharex=True, squeeze=False, figsize=(8, sum(heights)), gridspec_kw={"height_ratios": heights})
    curve, lowest = panels[0, 0], panels[-1, 0]  # the deviation's panel, if there is one
    for name, losses in runs.items():
        steps = list(losses)
        (line,) = curve.plot(steps, [losses[s] for s in steps], label=name, linewidth=1)
        if name != baseline:
            relative = [100 * (losses[s] / runs[baseline][s] - 1) for s in steps]
            width = max(1, len(steps) // 50)
            means = [math.fsum(relative[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(relative))]
            lowest.plot(steps, means, color=line.get_color(), linewidth=1)
    curve.set_ylabel("loss")
    curve.legend()
    if several:
        lowest.axhline(0.0, color="black", linewidth=0.5)
        lowest.set_ylabel(f"% from {baseline}")
    lowest.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def compare(first: str | Path, second: str | Path, from_step: int, tolerance: float | None) -> str:
    """Raise LogError unless both runs have the same losses from ``from_step`` on: bit for bit, or within a relative ``tolerance``. Returns a sentence."""
    a, b = read_losses(first), read_losses(second)
    steps = [s for s in sorted(a) if s >= from_step and s in b]
    if not steps:
        raise LogError(f"{first} and {second} have no step from {from_step} on in common")
    wrong = [s for s in steps if (a[s] != b[s] if tolerance is None else not abs(a[s] / b[s] - 1) <= tolerance)]
    if wrong:
        s = wrong[0]
        raise LogError(f"{len(wrong)} of {len(steps)} steps differ, first step {s}: {a[s]!r} ({a[s].hex()}) in {first}, {b[s]!r} ({b[s].hex()}) in {second}")
    how = "bit for bit" if tolerance is None else f"within {100 * tolerance:g} %"
    return f"{len(steps)} steps ({steps[0]} to {steps[-1]}) equal {how}: {Path(first).name}, {Path(second).name}"


def expect_steps(path: str | Path, expected: str) -> str:
    """Raise LogError unless the run has exactly the steps "A-B", all with a finite loss."""
    low, _, high = expected.partition("-")
    losses = read_losses(path)
    wanted = list(range(int(low), int(high) + 1))
    if sorted(losses) != wanted:
        raise LogError(f"{path}: steps {min(losses)} to {max(losses)} ({len(losses)}), expected {expected}")
    broken = [s for s in wanted if not math.isfinite(losses[s])]
    if broken:
        raise LogError(f"{path}: loss is not finite at steps {broken[:5]}")
    return f"{Path(path).name}: steps {expected}, final loss {losses[wanted[-1]]:.5f}"


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _named(values: list[str]) -> dict[str, str]:
    named = {}
    for value in values:
        name, equals, path = value.rpartition("=")
        if not equals:
            raise LogError(f"{value!r} must be NAME=PATH")
        named[name] = path
    return named


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fp8_recipes.megatron.parse_log")
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed", help="ms per iteration and peak memory")
    speed.add_argument("--csv")
    speed.add_argument("--warmup", type=int, default=WARMUP, help="iterations left out at the start")
    speed.add_argument("--period", type=int, default=1, help="iterations between two of those that do more work")
    speed.add_argument("runs", nargs="+", metavar="NAME=LOG")
    loss = commands.add_parser("loss", help="loss curves and deviation from the first run")
    loss.add_argument("--csv")
    loss.add_argument("--png")
    loss.add_argument("--window", type=int, default=50, help="steps in the final mean")
    loss.add_argument("runs", nargs="+", metavar="NAME=JSONL")
    for name in ("same", "near"):
        command = commands.add_parser(name, help="are two runs equal " + ("bit for bit" if name == "same" else "within a tolerance"))
        command.add_argument("--from-step", type=int, default=1)
        if name == "near":
            command.add_argument("--tolerance", type=float, required=True)
        command.add_argument("runs", nargs=2, metavar="JSONL")
    steps = commands.add_parser("steps", help="does a run have exactly these steps")
    steps.add_argument("--expect", required=True, metavar="A-B")
    steps.add_argument("run", metavar="JSONL")
    o = parser.parse_args(argv)
    try:
        if o.command == "speed":
            print(write_speed([read_speed(name, path, o.warmup, o.period) for name, path in _named(o.runs).items()], o.csv))
        elif o.command == "loss":
            print(write_losses({name: read_losses(path) for name, path in _named(o.runs).items()}, o.window, o.csv, o.png))
        elif o.command == "steps":
            print(expect_steps(o.run, o.expect))
        else:
            first, second = o.runs
            print(compare(first, second, o.from_step, getattr(o, "tolerance", None)))
    except (LogError, OSError) as error:
        sys.exit(f"parse_log: {error}")


if __name__ == "__main__":
    main()
