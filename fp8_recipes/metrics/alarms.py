"""When the metrics warn.

Kurtosis (FOG, arXiv 2505.20524, section 3 and figure of the failing run): in healthy runs it grows slower than linearly with the steps, roughly like a
logarithm; in the run that diverged at 15B tokens, QKV left that regime at 3B, long before gradient norm or loss said anything. So the alarm is about growth,
not level. With r = max(t / 2, warmup), the local exponent of growth is

    p = log(k(t) / k(r)) / log(t / r)            k ~ t^p; p < 1 is sub-linear, a logarithm tends to 0, an exponential runs away

with k the mean over layers, as the paper's, and of that the median of five readings around each step. The alarm is raised when p >= ``growth_exponent`` while
k(t) >= ``kurtosis_floor``, in ``patience`` observed steps in a row; for QKV, the tensor that shows it first there, in ``qkv_patience``. It names the layer with
the largest kurtosis. The down projection's input has a floor of its own, ``down_kurtosis_floor``: behind an activation it starts at 7 (GeLU) to 18 (SwiGLU).
Judged layer by layer, with a floor of 10 for all, healthy runs of Llama3 and FOG were warned of (docs/metrics.md).

The other thresholds are shares of the finite non-zero elements of a tensor in one observed step:

* non-finite elements: any, at once.
* saturation: 1e-5, the 0.001 % above which FP8-LM (arXiv 2310.18313) halves its scale, at once. A measured scale never saturates; under a predicted one
  any saturation means that the bound was broken; under delayed scaling some is normal.
* flush share: 1 % of an activation or weight, half of a gradient. A gradient's rows hold values of many sizes (the parts of Q and K beside that of V): a
  healthy run lost up to 21 % of one, and 25 % of another in the fold (docs/metrics.md).
* fold flushes (what the fold for wgrad turns into zero): the same two. Flushes of either kind count after ``patience`` observed steps in a row.

An alarm is raised once and again only after its value has fallen below half of the threshold, so that one that hovers does not fill the log.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .table import Reading

KINDS = ("nonfinite", "kurtosis", "saturation", "flush", "fold_flush")
FATAL = ("nonfinite", "kurtosis")
"""Kinds that foresee a divergence, and may end a run; the others only warn."""
_MEDIAN = 5


@dataclass(frozen=True)
class Thresholds:
    """See the module. warmup: steps in which kurtosis is not judged (at least the learning rate's warm-up)."""

    growth_exponent: float = 1.0
    kurtosis_floor: float = 10.0
    down_kurtosis_floor: float = 100.0
    patience: int = 3
    qkv_patience: int = 2
    warmup: int = 100
    saturation_share: float = 1e-5
    flush_share: float = 0.01
    grad_flush_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"threshold {name}={value} must be positive")


@dataclass(frozen=True)
class Alarm:
    """kind: one of `KINDS`. layer: its number, or None outside layers. value and threshold in the kind's unit (kurtosis: the growth exponent)."""

    step: int
    kind: str
    name: str
    value: float
    threshold: float
    message: str

    @property
    def layer(self) -> int | None:
        return split_name(self.name)[0]

    @property
    def tensor(self) -> str:
        return split_name(self.name)[1]


_TEXTS = {
    "nonfinite": (".2%", "{} of its elements are NaN or Inf"),
    "kurtosis": (".1f", "kurtosis grows like step to the power of {}, no longer slower than linearly"),
    "saturation": (".4%", "{} of its values are above what its scale can hold"),
    "flush": (".2%", "{} of its values become zero in FP8"),
    "fold_flush": (".2%", "{} of its FP8 values become zero in the fold for wgrad"),
}
"""How a value of each kind is written, and in which sentence it stands, or the least and the worst of several."""


def lines(alarms: Sequence[Alarm]) -> list[str]:
    """What to print of one step's alarms: those of one kind for one tensor of several layers in one line, with the least and the worst of them."""
    groups: dict[tuple[str, str], list[Alarm]] = {}
    for alarm in alarms:
        groups.setdefault((alarm.kind, alarm.tensor), []).append(alarm)
    return [group[0].message if len(group) == 1 else _of_several(group) for group in groups.values()]


def _of_several(group: list[Alarm]) -> str:
    least, worst = min(group, key=lambda a: a.value), max(group, key=lambda a: a.value)
    digits, text = _TEXTS[worst.kind]
    what = text.format(" to ".join(f"{alarm.value:{digits}} (layer {alarm.layer})" for alarm in (least, worst)))
    return f"step {worst.step}, layers {layer_ranges(a.layer for a in group if a.layer)}, {worst.tensor}: {what} (threshold {worst.threshold:g})"


def layer_ranges(numbers: Iterable[int]) -> str:
    """[3, 1, 2, 7] -> "1-3,7"; none -> "-"."""
    found: list[list[int]] = []
    for n in sorted(set(numbers)):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "-"


def split_name(name: str) -> tuple[int | None, str]:
    """ "layers.3.qkv" -> (3, "qkv"); "head.input" -> (None, "head.input")."""
    head, _, rest = name.partition(".")
    number, _, tensor = rest.partition(".")
    return (int(number), tensor) if head == "layers" and number.isdigit() and tensor else (None, name)


class Alarms:
    """Judges readings step by step."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = Thresholds() if thresholds is None else thresholds
        self._history: dict[str, tuple[list[int], list[float]]] = {}
        self._lasting: dict[tuple[str, str], int] = {}
        """Observed steps in a row above the threshold; kept while the value is between half of it and all of it, once the alarm is on."""

    def remember(self, step: int, kurtosis: Mapping[str, float | None]) -> None:
        """Take in kurtosis by name without judging: `judge` does it, and a resumed run with what it finds in its log. A step seen before is replaced."""
        for tensor, layers in _by_tensor(kurtosis).items():
            steps, values = self._history.setdefault(tensor, ([], []))
            keep = bisect_left(steps, step)
            del steps[keep:], values[keep:]
            steps.append(step)
            values.append(statistics.fmean(layers.values()))

    def judge(self, step: int, readings: Mapping[str, Reading]) -> list[Alarm]:
        """New alarms of this step, QKV's kurtosis first."""
        alarms = self.judge_kurtosis(step, {name: r.kurtosis for name, r in readings.items()})
        alarms += [a for name, reading in readings.items() for a in self._of(step, name, reading)]
        return sorted(alarms, key=lambda a: (KINDS.index(a.kind), a.tensor != "qkv", a.name))

    def judge_kurtosis(self, step: int, kurtosis: Mapping[str, float | None]) -> list[Alarm]:
        """New alarms of kurtosis alone, by name; only those of activations count."""
        watched = {name: value for name, value in kurtosis.items() if is_activation(name)}
        self.remember(step, watched)
        return [a for tensor, layers in _by_tensor(watched).items() for a in self._of_tensor(step, tensor, layers)]

    def _of_tensor(self, step: int, tensor: str, layers: Mapping[str, float]) -> list[Alarm]:
        """Kurtosis of one tensor of all layers."""
        t, p, mean = self.thresholds, self.growth(step, tensor), statistics.fmean(layers.values())
        floor = t.down_kurtosis_floor if tensor.endswith("down_input") else t.kurtosis_floor
        grown = p is not None and p >= t.growth_exponent and mean >= floor
        patience = t.qkv_patience if tensor == "qkv" else t.patience
        if not self._begins("kurtosis", tensor, grown, p is not None and p >= 0.5 * t.growth_exponent, patience):
            return []
        assert p is not None
        worst = max(layers, key=layers.__getitem__)
        of_all = f" ({mean:.1f} on average over layers)" if len(layers) > 1 else ""
        text = f"kurtosis {layers[worst]:.1f}{of_all} grows like step^{p:.1f}, no longer slower than linearly"
        return [self._alarm(step, "kurtosis", worst, p, t.growth_exponent, text)]

    def _of(self, step: int, name: str, r: Reading) -> list[Alarm]:
        """What is judged tensor by tensor and layer by layer."""
        t, grad = self.thresholds, name.endswith(".grad")
        flush = t.grad_flush_share if grad else t.flush_share
        found = []
        shares = (
            ("nonfinite", r.nonfinite / r.elements if r.elements else 0.0, 0.0, 1),
            ("saturation", r.saturation_share, t.saturation_share, 1),
            ("flush", r.flush_share, flush, t.patience),
            ("fold_flush", r.fold_flush_share, flush, t.patience),
        )
        for kind, value, limit, wait in shares:
            if self._begins(kind, name, value > limit, value > 0.5 * limit, wait):
                digits, sentence = _TEXTS[kind]
                text = f"{r.nonfinite} elements are NaN or Inf" if kind == "nonfinite" else sentence.format(f"{value:{digits}}")
                found.append(self._alarm(step, kind, name, value, limit, text))
        return found

    def _begins(self, kind: str, name: str, above: bool, near: bool, patience: int) -> bool:
        """Is the alarm to be raised now? above: beyond the threshold; near: beyond half of it."""
        lasted = self._lasting.get((kind, name), 0)
        raised = lasted >= patience
        lasted = lasted + 1 if above else lasted if raised and near else 0
        self._lasting[kind, name] = lasted
        return not raised and lasted == patience

    def _alarm(self, step: int, kind: str, name: str, value: float, threshold: float, text: str) -> Alarm:
        layer, tensor = split_name(name)
        where = tensor if layer is None else f"layer {layer}, {tensor}"
        return Alarm(step, kind, name, value, threshold, f"step {step}, {where}: {text} (threshold {threshold:g})")

    def growth(self, step: int, tensor: str) -> float | None:
        """Local exponent p of ``tensor``'s kurtosis (mean over layers) at ``step``, or None while there is too little to judge by."""
        steps, values = self._history.get(tensor, ([], []))
        if len(steps) < 2 * _MEDIAN:
            return None
        then = max(step / 2, self.thresholds.warmup)
        at = bisect_left(steps, then)
        first = max(0, min(at - _MEDIAN // 2, len(steps) - _MEDIAN))
        if step < 1.5 * then or at == 0 or first + _MEDIAN > len(steps) - _MEDIAN:
            return None
        now, before = statistics.median(values[-_MEDIAN:]), statistics.median(values[first : first + _MEDIAN])
        reference = statistics.median(steps[first : first + _MEDIAN])
        current = statistics.median(steps[-_MEDIAN:])
        return math.log(now / before) / math.log(current / reference)


def _by_tensor(kurtosis: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """{"layers.1.qkv": 3.0, "layers.2.qkv": 4.0} -> {"qkv": the same}; what is None or not finite is left out."""
    found: dict[str, dict[str, float]] = {}
    for name, value in kurtosis.items():
        if value is not None and math.isfinite(value):
            found.setdefault(split_name(name)[1], {})[name] = value
    return found


def is_activation(name: str) -> bool:
    """Is this one of the tensors whose kurtosis is watched (and not the FP8 form of a layer's input, weight or gradient)?"""
    return not name.endswith((".input", ".weight", ".grad"))
