"""What FP8 itself shows about a run: flushes, saturations, non-finite values, the range of scales. Counted where the tensor is, read once at the end.

    monitor = Monitor()
    layer.observer = monitor.add            # fp8_recipes.nn.Linear hands over every tensor beside its quantised form
    ...
    for role, counts in monitor.read().items():
        print(role, counts.flush_share, counts.saturations)

For a whole run, per layer, over ranks, with kurtosis and alarms: `fp8_recipes.metrics`. Both count with `ops.moments`.

Definitions, for an element x of a group with scale s, quantised to the payload p:

* flush: x is finite and not zero, p is zero. Its information is lost (|x| <= half of the smallest subnormal times s).
* saturation: x is finite and ``|x| > max(format) * s``. It was clipped. Impossible under a measured scale, which is rounded up from the group's maximum;
  under a predicted scale it means that the prediction's bound was broken.
* non-finite: x is NaN or Inf; p is NaN.
* scale range: smallest and largest exponent of the scales of groups that hold any non-zero payload. An FP32 global scale counts with its floor(log2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import ops
from .metrics.table import MomentTable, Reading
from .reference.moments import FIELDS
from .tensor import ScaledTensor

_FIELDS = ("elements", "nonzero", "flushed", "saturated", "nonfinite")


@dataclass(frozen=True)
class Counts:
    """Totals over all tensors added under one name; see the module's definitions. The exponents are None while every payload was zero."""

    elements: int
    nonzero: int
    flushes: int
    saturations: int
    nonfinite: int
    scale_exponent_min: int | None
    scale_exponent_max: int | None

    @property
    def flush_share(self) -> float:
        """Flushes per non-zero finite element, 0.0 .. 1.0."""
        return self.flushes / self.nonzero if self.nonzero else 0.0

    @property
    def saturation_share(self) -> float:
        """Saturations per non-zero finite element, 0.0 .. 1.0."""
        return self.saturations / self.nonzero if self.nonzero else 0.0


@torch.no_grad()
def count(x: torch.Tensor, q: ScaledTensor) -> torch.Tensor:
    """The seven numbers of `Counts` for ``x`` [rows, cols] and its quantised form, as one int64 tensor [7] on x's device. No host synchronisation."""
    m = ops.moments(x, q, fold=False).long()
    return torch.stack((*(m[FIELDS.index(name)] for name in _FIELDS), -m[FIELDS.index("minus_scale_exponent_min")], m[FIELDS.index("scale_exponent_max")]))


class Monitor:
    """Adds up counts per name, on this process. All state is on the device until `read`."""

    def __init__(self) -> None:
        self._table = MomentTable()

    def add(self, name: str, x: torch.Tensor, q: ScaledTensor) -> None:
        """Count ``x`` and its quantised form under ``name``. An `Observer` of `fp8_recipes.nn.Linear`."""
        self._table.add(name, x, q, fold=False)

    def read(self) -> dict[str, Counts]:
        """Totals so far by name, in one transfer to the host."""
        return {name: counts_of(reading) for name, reading in self._table.reduce(local=True).items() if reading.elements}

    def reset(self) -> None:
        self._table.reset()


def counts_of(r: Reading) -> Counts:
    """The part of a `metrics.Reading` that is about FP8."""
    return Counts(r.elements, r.nonzero, r.flushed, r.saturated, r.nonfinite, r.scale_exponent_min, r.scale_exponent_max)


def total(counts: Mapping[str, Counts]) -> Counts:
    """Sum over names; the scale range is the union."""
    lows = [c.scale_exponent_min for c in counts.values() if c.scale_exponent_min is not None]
    highs = [c.scale_exponent_max for c in counts.values() if c.scale_exponent_max is not None]
    sums = {name: sum(getattr(c, name) for c in counts.values()) for name in ("elements", "nonzero", "flushes", "saturations", "nonfinite")}
    return Counts(**sums, scale_exponent_min=min(lows, default=None), scale_exponent_max=max(highs, default=None))


def describe_range(counts: Counts) -> str:
    """``"2^-13 .. 2^4"``, or ``"-"`` where nothing but zeros was seen."""
    if counts.scale_exponent_min is None or counts.scale_exponent_max is None:
        return "-"
    return f"2^{counts.scale_exponent_min} .. 2^{counts.scale_exponent_max}"


def as_percent(share: float) -> str:
    """A share as text: exact zero is "0", otherwise three significant digits in percent."""
    return "0" if share == 0 else f"{share * 100:.{max(0, 2 - math.floor(math.log10(share * 100)))}f} %"
