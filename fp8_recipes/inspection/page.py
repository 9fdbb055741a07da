"""The report: one HTML file with everything in it, figures included."""

from __future__ import annotations

import base64
import csv
import importlib.util
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .. import __version__
from ..metrics.alarms import Alarms
from .plot import TITLES, plot_kurtosis, plot_loss, plot_scales
from .read import ROLES, WATCHED, InspectError, RunLog, judge_again, mean_over, read_run
from .turn import RISE, WINDOW, running_mean, turned

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --muted: #5b6675; --line: #dfe4ea; --bad: #b91c1c; --good: #2f6f4f; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p, figcaption { color: var(--muted); margin: .3rem 0 .8rem; } figure { margin: 0; } img { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--muted); } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-weight: 600; margin: .8rem 0; } .bad { color: var(--bad); } .good { color: var(--good); }
"""
MAX_ALARMS = 50
"""Alarms listed; the rest are counted."""
_KINDS_OF_TENSORS = {"qkv": ("qkv", "q", "kv"), "down_input": ("down_input", "shared_down_input"), "block_output": ("block_output",)}


def inspect(paths: Sequence[Path], out: Path | None = None, judge: bool = False) -> Path:
    """Read runs (folders or .jsonl files), write loss.png, kurtosis.png, scales.png, which_first.csv, readings.csv and report.html into ``out`` (default: the
    first run's folder); returns the page. Figures for which nothing was recorded are left out. judge: alarms of kurtosis by `judge_again`, not the log's.
    Raises InspectError before it writes anything."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InspectError("inspect draws with matplotlib: pip install matplotlib")
    runs = [run for path in paths for run in read_run(path)]
    for run in runs if judge else ():
        judge_again(run)
    folder = out or (paths[0] if paths[0].is_dir() else paths[0].parent)
    if folder.exists() and not folder.is_dir():
        raise InspectError(f"--out {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Path] = {}
    for name, draw in (("kurtosis", plot_kurtosis), ("loss", plot_loss), ("scales", plot_scales)):
        path = folder / f"{name}.png"
        if draw(path, runs):
            figures[name] = path
    for name, rows in (("which_first", which_first(runs)), ("readings", readings(runs))):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]) if rows else ["run", "step"])
            writer.writeheader()
            writer.writerows(rows)
    page = folder / "report.html"
    page.write_text(render(runs, figures), encoding="utf-8")
    return page


def render(runs: Sequence[RunLog], figures: dict[str, Path]) -> str:
    """The page's HTML."""
    title = "fp8_recipes: " + ", ".join(r.name for r in runs)
    body = [f"<h1>{escape(', '.join(r.name for r in runs))}</h1>", f"<p>fp8_recipes {__version__}, fp8-recipes inspect</p>"]
    body += [_verdict(runs), _which_first(runs), _summary(runs)]
    captions = {
        "kurtosis": "Kurtosis, mean(x^4) / mean(x^2)^2 per token, averaged over tokens: 3 for a Gaussian, larger with outliers. One line per layer, from dark "
        "(first) to light (last); black: their mean; red ring: alarm. Healthy growth slows down; what bends upward, QKV first, is a warning.",
        "loss": f"Loss, mean of the last {WINDOW} (pale: every step), and gradient norm, a run in a colour. Dashed: its first alarm of kurtosis or non-finite "
        "values; dotted: its loss turned.",
        "scales": "Exponents of the FP8 scales over all layers, and the largest share of any layer's values that became zero, was clipped, or is turned into "
        "zero by the fold for wgrad. Where a fused kernel made the tensor, exact zeros count as flushed.",
    }
    headings = {"kurtosis": "Kurtosis", "loss": "Loss", "scales": "FP8 scales and losses"}
    for name, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<h2>{headings[name]}</h2><figure><img alt="{headings[name]} over steps" src="data:image/png;base64,{data}">')
        body.append(f"<figcaption>{escape(captions[name])}</figcaption></figure>")
    body += [_alarms(runs), _worst(runs)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(b for b in body if b) + "\n</body></html>\n"


def _verdict(runs: Sequence[RunLog]) -> str:
    lines = []
    for run in runs:
        if not run.tensors:
            text, kind = "no metrics recorded, only the loss", ""
        elif run.alarms:
            first = next(iter(run.foreseeing), run.alarms[0])
            count = "1 alarm" if len(run.alarms) == 1 else f"{len(run.alarms)} alarms"
            text, kind = f"{count}; {first['message']}", "bad"
        else:
            text, kind = f"no alarm in {run.last_step} steps", "good"
        lines.append(f'<div class="verdict {kind}">{escape(run.name)}: {escape(text)}</div>')
    return "".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """The last ``numbers`` columns are numbers."""
    first = len(header) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i >= first else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(runs: Sequence[RunLog]) -> str:
    rows = []
    for run in runs:
        loss = list(run.scalars.get("loss", {}).values())
        for tensor in run.watched() or [""]:
            layers = run.layers(tensor, "kurtosis")
            last = {layer: list(s.values())[-1] for layer, s in layers.items()}
            worst = max(last, key=lambda n: last[n]) if last else None
            first = {layer: next(iter(s.values())) for layer, s in layers.items()}
            rows.append(
                (
                    run.name,
                    TITLES.get(tensor, "-"),
                    str(run.last_step),
                    f"{loss[-1]:.4f}" if loss else "-",
                    _mean(first),
                    _mean(last),
                    "-" if worst is None else f"{last[worst]:.4g} (layer {worst})",
                    "-" if worst is None else _growth(mean_over(layers), run.last_step),
                )
            )
    header = ("run", "tensor", "steps", "last loss", "kurtosis at start", "kurtosis at end", "largest at end", "mean grows like")
    return "<h2>Summary</h2>" + _table(header, rows, 6)


def which_first(runs: Sequence[RunLog]) -> list[dict[str, str]]:
    """Which came first in each run, an alarm or the loss: one row a run, steps and losses (means of `WINDOW`, nats), "" for what is not there."""
    rows = []
    for run in runs:
        mean, turn = running_mean(run.scalars.get("loss", {})), turned(run.scalars.get("loss", {}))
        low = min(mean, key=lambda step: mean[step], default=None)
        rows.append(
            {
                "run": run.name,
                "first_alarm": _first(run.foreseeing),
                **{f"{kind}_alarm": _first(a for a in run.foreseeing if a["tensor"] in tensors) for kind, tensors in _KINDS_OF_TENSORS.items()},
                "lowest_at": "" if low is None else str(low),
                "lowest_loss": "" if low is None else f"{mean[low]:.4f}",
                "turned_at": "" if turn is None else str(turn),
                "last_loss": "" if low is None else f"{list(mean.values())[-1]:.4f}",
            }
        )
    return rows


def readings(runs: Sequence[RunLog]) -> list[dict[str, str]]:
    """What alarms and turns are judged by, a row for every step of a run at which kurtosis was measured: loss (mean of `WINDOW`), gradient norm, and kurtosis
    of every watched tensor (mean over layers); "" for what is not there."""
    rows = []
    for run in runs:
        loss, norm = running_mean(run.scalars.get("loss", {})), run.scalars.get("grad_norm", {})
        kurtosis = {tensor: mean_over(run.layers(tensor, "kurtosis")) for tensor in WATCHED if any(other.layers(tensor, "kurtosis") for other in runs)}
        for step in sorted({step for series in kurtosis.values() for step in series}):
            values = {"loss": loss.get(step), "grad_norm": norm.get(step), **{tensor: series.get(step) for tensor, series in kurtosis.items()}}
            rows.append({"run": run.name, "step": str(step), **{name: "" if v is None else f"{v:.5g}" for name, v in values.items()}})
    return rows


def _first(alarms: Iterable[dict[str, Any]]) -> str:
    return str(next((a["step"] for a in alarms), ""))


def _which_first(runs: Sequence[RunLog]) -> str:
    """`which_first` as a table; nothing if no run had an alarm or a turn."""
    rows = which_first(runs)
    if not any(row["first_alarm"] or row["turned_at"] for row in rows):
        return ""
    text = (
        "Steps of the first alarm of kurtosis or non-finite values, of any tensor and of those watched. Losses: means of the last "
        f"{WINDOW}. One has turned where it stays more than {100 * RISE:.0f} % above its lowest so far, to the end of the run and for {WINDOW} steps at least."
    )
    header = ("run", "first alarm", "QKV's", "down input's", "block output's", "loss lowest at", "lowest", "turned at", "last")
    return "<h2>Alarm or loss first?</h2>" + _table(header, [[value or "-" for value in row.values()] for row in rows], 8) + f"<p>{escape(text)}</p>"


def _mean(values: dict[int, float]) -> str:
    return f"{sum(values.values()) / len(values):.4g}" if values else "-"


def _growth(series: dict[int, float], step: int) -> str:
    """Local exponent as the alarms compute it, of the mean over layers and with their default warm-up."""
    alarms = Alarms()
    for at, value in series.items():
        alarms.remember(at, {"x": value})
    p = alarms.growth(step, "x")
    return "too few readings" if p is None else f"step^{p:.2f}"


def _alarms(runs: Sequence[RunLog]) -> str:
    rows = [(run.name, str(a["step"]), a["alarm"], a["message"]) for run in runs for a in run.alarms]
    if not rows:
        return ""
    more = f"<p>and {len(rows) - MAX_ALARMS} more</p>" if len(rows) > MAX_ALARMS else ""
    return "<h2>Alarms</h2>" + _table(("run", "step", "kind", "what"), rows[:MAX_ALARMS], 0) + more


def _worst(runs: Sequence[RunLog]) -> str:
    """The quantised tensors that lose most, at the last observed step."""
    rows: list[tuple[float, tuple[str, ...]]] = []
    for run in runs:
        for role in ROLES:
            for name in run.of_role(role, "scale_exponent_max"):
                last = {what: list(s.values())[-1] for what, s in run.tensors[name].items()}
                lost = last.get("flush_share", 0.0) + last.get("saturation_share", 0.0) + last.get("fold_flush_share", 0.0)
                shares = tuple(f"{100 * last.get(what, 0.0):.3g}" for what in ("flush_share", "saturation_share", "fold_flush_share"))
                exponents = f"2^{last['scale_exponent_min']:.0f} .. 2^{last['scale_exponent_max']:.0f}"
                rows.append((lost, (run.name, name, exponents, *shares, f"{last.get('amax', 0.0):.4g}")))
    if not rows:
        return ""
    rows.sort(key=lambda r: -r[0])
    header = ("run", "tensor", "scales", "flushed %", "saturated %", "flushed by the fold %", "amax")
    return f"<h2>Quantised tensors that lose most, at the end ({min(len(rows), 12)} of {len(rows)})</h2>" + _table(header, [r for _, r in rows[:12]], 5)
