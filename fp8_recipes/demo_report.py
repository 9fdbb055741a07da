"""What the demo leaves behind: a table on the console, loss.png, log.jsonl, metrics.jsonl and summary.json."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .architecture import Architecture
from .demo import DemoError, Run, Setup, Text, choose_device, compare, deviation, load_text, setup, trailing_mean
from .monitor import as_percent, describe_range, total
from .nn.linear import check_recipe
from .recipe import Recipe

_BASELINE_COLOUR, _RECIPE_COLOUR = "#4c566a", "#c2410c"


def run_demo(recipe: Recipe, arch: Architecture, *, steps: int | None, device: str, out: Path, data: Path | None, seed: int) -> None:
    """``fp8-recipes demo``: check everything, train twice with a progress bar, report. Raises `DemoError` or `RecipeError` before any training."""
    missing = [m for m in ("rich", "matplotlib") if importlib.util.find_spec(m) is None]
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is a file; name a folder")
    check_recipe(recipe)
    if not 0 <= seed < 2**63:
        raise DemoError(f"--seed {seed} must be at least 0 and below 2**63")
    chosen, why = choose_device(device)
    config = setup(chosen, steps, seed, arch)
    text = load_text(data, config.gpt.seq)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out} cannot be made: {error.strerror}; name a folder that you may write") from None
    if chosen == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and on a busy machine every operation would wait for it

    from rich.console import Console

    console = Console()
    numerics = "Triton kernels" if chosen == "cuda" else "reference numerics"
    console.print(f"[bold]fp8-recipes demo[/]: {recipe.name} against {config.baseline}, {numerics} on {chosen} ({why})", highlight=False)
    console.print(f"architecture: {arch}", highlight=False, soft_wrap=True)
    console.print(f"text: {text.source}, {text.files} files, {(len(text.train) + len(text.held_out)) / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    metrics = out / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    baseline, quantised = _train_with_progress(console, recipe, config, text, metrics)
    write_log(out / "log.jsonl", config, [baseline, quantised])
    write_summary(out / "summary.json", recipe, config, text, baseline, quantised)
    plot(out / "loss.png", config, baseline, quantised)
    console.print(table(recipe, config, baseline, quantised))
    if chosen == "cpu":
        console.print("Times on the CPU are those of the reference numerics; they say nothing about a GPU.", style="dim")
    for run in (baseline, quantised):
        for warning in run.warnings:
            console.print(f"WARNING, {run.name}: {warning}", highlight=False, soft_wrap=True)
    console.print(f"wrote {out / 'loss.png'}, {out / 'log.jsonl'}, {metrics}, {out / 'summary.json'}", highlight=False, soft_wrap=True)
    console.print(f"kurtosis and scales per layer: fp8-recipes inspect {out}", highlight=False, soft_wrap=True)


def _train_with_progress(console: Any, recipe: Recipe, config: Setup, text: Text, metrics: Path) -> tuple[Run, Run]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        tasks: dict[str, Any] = {}

        def on_step(name: str, step: int, loss: float | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=config.steps, loss="-")
            progress.update(tasks[name], completed=step, loss="-" if loss is None else f"{loss:.3f}")

        return compare(recipe, config, text, on_step, metrics)


def table(recipe: Recipe, config: Setup, baseline: Run, quantised: Run) -> Any:
    """The result as a `rich.table.Table`."""
    from rich.table import Table

    m = config.gpt
    title = f"{m.arch.name}, {m.layers} layers, width {m.width}, {m.parameters / 1e6:.1f}M parameters, {config.steps} steps of {config.batch * m.seq} bytes"
    caption = "high precision: fp32 on CPU, bf16 on CUDA. Losses in nats per byte, training loss over the last "
    caption += f"{config.window} steps. Flushes, scales and saturations counted in {quantised.observed_steps} steps."
    result = Table(title=title, title_style="bold", caption=caption)
    result.add_column("")
    result.add_column(f"{baseline.name}", justify="right")
    result.add_column(quantised.name, justify="right", style="bold")
    result.add_column("deviation", justify="right")

    def loss_row(name: str, a: float, b: float) -> None:
        result.add_row(name, f"{a:.4f}", f"{b:.4f}", f"{deviation(b, a):+.2f} %")

    loss_row("training loss", baseline.final_loss(config.window), quantised.final_loss(config.window))
    loss_row("validation loss (held-out text)", baseline.validation, quantised.validation)
    speed = f"{baseline.ms_per_step / quantised.ms_per_step:.2f}x speed"
    result.add_row("ms per step (median)", f"{baseline.ms_per_step:.1f}", f"{quantised.ms_per_step:.1f}", speed)
    result.add_row("training time (s)", f"{baseline.seconds:.1f}", f"{quantised.seconds:.1f}", "", end_section=True)
    for role, counts in quantised.counts.items():
        result.add_row(f"flushes, {role}", "", as_percent(counts.flush_share), "")
    for role, counts in quantised.counts.items():
        result.add_row(f"scales, {role}", "", describe_range(counts), "")
    if quantised.counts:
        every = total(quantised.counts)
        result.add_row(f"saturations, of {every.nonzero / 1e6:.0f}M values", "", str(every.saturations), "")
    return result


def write_log(path: Path, config: Setup, runs: list[Run]) -> None:
    """One JSON object per line, run and step: run, step (from 1), loss, grad_norm, lr, tokens."""
    with path.open("w") as stream:
        for run in runs:
            for i, (loss, norm, lr) in enumerate(zip(run.losses, run.grad_norms, run.lrs, strict=True), start=1):
                line = {"run": run.name, "step": i, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": i * config.batch * config.gpt.seq}
                stream.write(json.dumps(line) + "\n")


def write_summary(path: Path, recipe: Recipe, config: Setup, text: Text, baseline: Run, quantised: Run) -> None:
    """Setup, versions and results, so that a table elsewhere can be made from this file alone."""

    def results(run: Run) -> dict[str, Any]:
        final = {"final_loss": run.final_loss(config.window), "validation_loss": run.validation}
        return {"name": run.name, **final, "ms_per_step": run.ms_per_step, "seconds": run.seconds}

    device = torch.cuda.get_device_name() if config.device == "cuda" else platform.processor() or platform.machine()
    a, b = results(baseline), results(quantised)
    summary = {
        "recipe": asdict(recipe),
        "setup": asdict(config),
        "window": config.window,
        "text": {"source": text.source, "files": text.files, "bytes": len(text.train) + len(text.held_out), "sha256": text.sha256},
        "versions": {"fp8_recipes": __version__, "torch": torch.__version__, "python": platform.python_version(), "device": device},
        "baseline": a,
        "quantised": b,
        "deviation_percent": {k: deviation(b[k], a[k]) for k in ("final_loss", "validation_loss")},
        "observed_steps": quantised.observed_steps,
        "counts": {role: {**asdict(c), "flush_share": c.flush_share} for role, c in quantised.counts.items()},
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def plot(path: Path, config: Setup, baseline: Run, quantised: Run) -> None:
    """Both loss curves, and below them the relative deviation of the smoothed ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    steps = range(1, config.steps + 1)
    lower.set_xlim(0, max(2, config.steps))
    smooth = {}
    for run, colour, style in ((baseline, _BASELINE_COLOUR, "-"), (quantised, _RECIPE_COLOUR, (0, (4, 2)))):
        smooth[run.name] = trailing_mean(run.losses, config.window)
        upper.plot(steps, run.losses, color=colour, alpha=0.18, linewidth=0.8)
        label = f"{run.name}   final {run.final_loss(config.window):.4f}   validation {run.validation:.4f}"
        upper.plot(steps, smooth[run.name], color=colour, linewidth=1.8, linestyle=style, label=label)
    upper.set_ylabel("loss, nats per byte")
    upper.legend(frameon=False, loc="upper right")
    title = f"{quantised.name} against {baseline.name}: {config.gpt.arch.name}, {config.gpt.layers} layers, width {config.gpt.width}, {config.device}"
    upper.set_title(title, loc="left", fontsize=11)

    relative = [deviation(b, a) for a, b in zip(smooth[baseline.name], smooth[quantised.name], strict=True)]
    lower.axhline(0, color=_BASELINE_COLOUR, linewidth=0.8)
    lower.plot(steps, relative, color=_RECIPE_COLOUR, linewidth=1.4)
    at_end = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points", "annotation_clip": False}
    lower.annotate(f"{relative[-1]:+.2f} %", (1.0, relative[-1]), va="center", color=_RECIPE_COLOUR, **at_end)
    reach = max(0.5, 1.25 * max(abs(r) for r in relative))
    lower.set_ylim(-reach, reach)
    lower.set_ylabel("deviation, %")
    lower.set_xlabel(f"step   (smooth lines: mean of the last {config.window} steps)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (upper, lower):
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
