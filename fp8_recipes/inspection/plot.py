"""Three figures: loss and gradient norm; kurtosis per layer; scales and what they lose. matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .read import ROLES, SHARES, RunLog, Series, mean_over
from .turn import running_mean, turned

COLOURS = ("#1f5fa8", "#c2410c", "#2f855a", "#7b3fa0", "#8a6d1a", "#475569", "#be3a7c", "#0e7c86")
ALARM = "#b91c1c"
_ROLE_COLOURS = {"input": "#1f5fa8", "weight": "#2f855a", "grad": "#c2410c"}
TITLES = {
    "qkv": "QKV",
    "q": "Q",
    "kv": "K and V",
    "down_input": "down projection's input",
    "shared_down_input": "shared experts: down projection's input",
    "block_output": "block output",
}
_SHARE_TITLES = {"flush_share": "flushed, %", "saturation_share": "saturated, %", "fold_flush_share": "flushed by the fold, %"}


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _draw(axis: Any, series: Series, **style: Any) -> Any:
    """One line; a single point gets a marker, because a line of one point is invisible."""
    if len(series) == 1:
        style["marker"] = "o"
    return axis.plot(list(series), list(series.values()), **style)[0]


def _limits(values: list[float]) -> tuple[float, float] | None:
    """Vertical limits that a few exploding values at the end do not own: from the smallest to four times the median of the rest, if that cuts anything."""
    finite = sorted(v for v in values if math.isfinite(v))
    if len(finite) < 2 or finite[0] == finite[-1]:
        return None
    low, high = finite[0], finite[min(len(finite) - 1, int(0.995 * len(finite)))]
    margin = 0.05 * (high - low)
    return (low - margin, high + margin) if high > low else None


def plot_loss(path: Path, runs: Sequence[RunLog]) -> bool:
    """Loss and its running mean above gradient norm, every run in its colour, its first alarm dashed, its turn dotted. False if no run has a loss."""
    if not any(r.scalars.get("loss") for r in runs):
        return False
    with_norm = any(r.scalars.get("grad_norm") for r in runs)
    figure = _figure(9, (5.8 if with_norm else 4.4) + 0.2 * (len(runs) // 2))
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1)) if with_norm else [figure.subplots()]
    for run, colour in zip(runs, _colours(runs), strict=True):
        loss = run.scalars.get("loss", {})
        if not loss:
            continue
        mean = running_mean(loss)
        marks = (("alarm", next((a["step"] for a in run.foreseeing), None), (0, (3, 2))), ("turned", turned(loss), ":"))
        label = f"{run.name}   last {list((mean or loss).values())[-1]:.4f}" + "".join(f", {text} at {step}" for text, step, _ in marks if step is not None)
        if mean:
            _draw(axes[0], loss, color=colour, linewidth=0.8, alpha=0.25)
        _draw(axes[0], mean or loss, color=colour, linewidth=1.4, label=label)
        if run.scalars.get("grad_norm"):
            _draw(axes[1], run.scalars["grad_norm"], color=colour, linewidth=0.9)
        for axis in axes:
            for _, step, style in marks:
                if step is not None:
                    axis.axvline(step, color=colour, linestyle=style, linewidth=1.1)
    limits = _limits([v for r in runs for v in r.scalars.get("loss", {}).values()])
    if limits:
        axes[0].set_ylim(*limits)
    axes[0].set_ylabel("loss, nats")
    figure.legend(frameon=False, loc="outside lower center", ncols=min(2, len(runs)), fontsize=9)
    if with_norm:
        axes[1].set_ylabel("gradient norm")
        axes[1].set_yscale("log")
    axes[-1].set_xlabel("step")
    for axis in axes:
        _tidy(axis)
    figure.savefig(path, bbox_inches="tight")  # a legend of long names is wider than the figure
    return True


def _colours(runs: Sequence[RunLog]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def plot_kurtosis(path: Path, runs: Sequence[RunLog]) -> bool:
    """A row per run, a column per tensor, a line per layer (dark: first, light: last), their mean in black, alarms as red rings. Logarithmic."""
    runs = [r for r in runs if r.watched()]
    tensors = [t for t in TITLES if any(t in r.watched() for r in runs)]
    if not tensors:
        return False
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter

    figure = _figure(3.4 * len(tensors) + 0.8, 2.9 * len(runs) + 0.4)
    grid = figure.subplots(len(runs), len(tensors), sharex="col", sharey=True, squeeze=False)
    for row, run in zip(grid, runs, strict=True):
        for axis, tensor in zip(row, tensors, strict=True):
            layers = run.layers(tensor, "kurtosis")
            for layer, series in layers.items():
                _draw(axis, series, color=colormaps["viridis"](0.9 * (layer - 1) / max(1, max(layers) - 1)), linewidth=0.9, alpha=0.85)
            if layers:
                _draw(axis, mean_over(layers), color="black", linewidth=1.6)
            for alarm in run.alarms:
                if alarm["alarm"] == "kurtosis" and alarm["tensor"] == tensor and alarm["step"] in layers.get(alarm["layer"], {}):
                    y = layers[alarm["layer"]][alarm["step"]]
                    axis.plot(alarm["step"], y, "o", markersize=8, markerfacecolor="none", markeredgecolor=ALARM, markeredgewidth=1.6)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())  # 10 and 100 rather than powers
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
            _tidy(axis)
        row[0].set_ylabel(f"{run.name}\nkurtosis" if len(runs) > 1 else "kurtosis")
    for axis, tensor in zip(grid[0], tensors, strict=True):
        axis.set_title(TITLES[tensor], loc="left", fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("step")
    figure.savefig(path)
    return True


def plot_scales(path: Path, runs: Sequence[RunLog]) -> bool:
    """A row per run: range of the scales' exponents over all layers by role, and the largest share lost in any layer. False if nothing was quantised."""
    runs = [r for r in runs if any(r.of_role(role, "scale_exponent_max") for role in ROLES)]
    if not runs:
        return False
    figure = _figure(3.4 * 4, 2.9 * len(runs) + 0.4)
    grid = figure.subplots(len(runs), 4, sharex=True, sharey="col", squeeze=False)
    for row, run in zip(grid, runs, strict=True):
        for role in ROLES:
            low, high = _extreme(run.of_role(role, "scale_exponent_min"), min), _extreme(run.of_role(role, "scale_exponent_max"), max)
            colour = _ROLE_COLOURS[role]
            if low:
                row[0].fill_between(list(low), list(low.values()), [high[s] for s in low], color=colour, alpha=0.22, linewidth=0)
                _draw(row[0], low, color=colour, linewidth=1.0)
                _draw(row[0], high, color=colour, linewidth=1.0, label=role)
            for axis, share in zip(row[1:], SHARES, strict=True):
                largest = _extreme(run.of_role(role, share), max)
                if largest and not (role == "weight" and share == "fold_flush_share"):
                    _draw(axis, {s: 100 * v for s, v in largest.items()}, color=colour, linewidth=1.2)
        row[0].set_ylabel(f"{run.name}\nexponent of the scale" if len(runs) > 1 else "exponent of the scale")
        row[0].legend(frameon=False, fontsize=8)
        for axis in row:
            _tidy(axis)
    for column in range(1, 4):  # the axes of a column are shared
        top = max((line.get_ydata().max() for axis in grid[:, column] for line in axis.get_lines()), default=0.0)
        grid[0][column].set_ylim(0, 1.08 * top if top > 1e-3 else 1e-3)
    grid[0][0].set_title("scales, 2^e, all layers", loc="left", fontsize=10)
    for axis, share in zip(grid[0][1:], SHARES, strict=True):
        axis.set_title(f"{_SHARE_TITLES[share]} (worst layer)", loc="left", fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("step")
    figure.savefig(path)
    return True


def _extreme(series: dict[str, Series], choose: Any) -> Series:
    steps = sorted({s for one in series.values() for s in one})
    return {step: choose(one[step] for one in series.values() if step in one) for step in steps}
