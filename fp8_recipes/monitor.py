"""What FP8 itself shows about a run: flushes, saturations, non-finite values, the range of scales. Counted where the tensor is, read once at the end.

    monitor = Monitor()
    layer.observer = monitor.add            # fp8_recipes.nn.Linear hands over every tensor beside its quantised form
    ...
    for role, counts in monitor.read().items():
        print(role, counts.flush_share, counts.saturations)

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

from .formats import E8M0_BIAS, exponent_of, pow2
from .reference.quantize import expand_scale
from .tensor import ScaledTensor

_FIELDS = ("elements", "nonzero", "flushes", "saturations", "nonfinite")
_NO_LOW, _NO_HIGH = 1 << 20, -(1 << 20)  # neutral elements of minimum and maximum over exponents


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


def _exponents(q: ScaledTensor) -> torch.Tensor:
    """Exponent of every scale (int32), the global scale's included, in the scale's own shape."""
    if q.granularity != "micro":
        return exponent_of(q.scale)
    local = q.scale.to(torch.int32) - E8M0_BIAS
    return local if q.global_scale is None else local + exponent_of(q.global_scale.float())


def _scale_of_elements(q: ScaledTensor) -> torch.Tensor:
    """The factor that decodes each payload element, fp32, broadcastable to [rows, cols]."""
    scale = pow2(q.scale.to(torch.int32) - E8M0_BIAS) if q.granularity == "micro" else q.scale
    scale = expand_scale(scale, q.shape, q.granularity)
    return scale if q.global_scale is None else scale * q.global_scale


@torch.no_grad()
def count(x: torch.Tensor, q: ScaledTensor) -> torch.Tensor:
    """The seven numbers of `Counts` for ``x`` [rows, cols] and its quantised form, as one int64 tensor [7] on x's device. No host synchronisation."""
    if x.shape != q.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and its quantised form {tuple(q.shape)}; pass the 2-D tensor that was quantised")
    xf, payload = x.float(), q.payload.float()
    finite = torch.isfinite(xf)
    nonzero = finite & (xf != 0)
    flushed = nonzero & (payload == 0)
    saturated = finite & (xf.abs() > q.format.max * _scale_of_elements(q))
    exponents = expand_scale(_exponents(q), q.shape, q.granularity).expand(q.shape)
    alive = payload != 0
    low = torch.where(alive, exponents, _NO_LOW).amin()
    high = torch.where(alive, exponents, _NO_HIGH).amax()
    totals = [m.sum() for m in (nonzero, flushed, saturated, ~finite)]
    return torch.stack([torch.full_like(totals[0], x.numel()), *totals, low.long(), high.long()])


class Monitor:
    """Adds up `count` per name. All state is on the device until `read`."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, q: ScaledTensor) -> None:
        """Count ``x`` and its quantised form under ``name``. An `Observer` of `fp8_recipes.nn.Linear`."""
        if x.numel() == 0:
            return
        new = count(x.detach().reshape(q.shape), q)
        old = self._totals.get(name)
        if old is not None:
            sums, low, high = old[:5] + new[:5], torch.minimum(old[5], new[5]), torch.maximum(old[6], new[6])
            new = torch.cat((sums, torch.stack((low, high))))
        self._totals[name] = new

    def read(self) -> dict[str, Counts]:
        """Totals so far by name, in one transfer to the host (one per device that was counted on)."""
        if not self._totals:
            return {}
        rows = torch.stack([t if len(_devices(self._totals)) == 1 else t.cpu() for t in self._totals.values()]).tolist()
        return {name: _to_counts(row) for name, row in zip(self._totals, rows, strict=True)}

    def reset(self) -> None:
        self._totals.clear()


def _devices(totals: Mapping[str, torch.Tensor]) -> set[torch.device]:
    return {t.device for t in totals.values()}


def _to_counts(row: list[int]) -> Counts:
    low, high = row[5], row[6]
    sums = dict(zip(_FIELDS, row[:5], strict=True))
    return Counts(**sums, scale_exponent_min=None if low == _NO_LOW else low, scale_exponent_max=None if high == _NO_HIGH else high)


def total(counts: Mapping[str, Counts]) -> Counts:
    """Sum over names; the scale range is the union."""
    lows = [c.scale_exponent_min for c in counts.values() if c.scale_exponent_min is not None]
    highs = [c.scale_exponent_max for c in counts.values() if c.scale_exponent_max is not None]
    sums = {name: sum(getattr(c, name) for c in counts.values()) for name in _FIELDS}
    return Counts(**sums, scale_exponent_min=min(lows, default=None), scale_exponent_max=max(highs, default=None))


def describe_range(counts: Counts) -> str:
    """``"2^-13 .. 2^4"``, or ``"-"`` where nothing but zeros was seen."""
    if counts.scale_exponent_min is None or counts.scale_exponent_max is None:
        return "-"
    return f"2^{counts.scale_exponent_min} .. 2^{counts.scale_exponent_max}"


def as_percent(share: float) -> str:
    """A share as text: exact zero is "0", otherwise three significant digits in percent."""
    return "0" if share == 0 else f"{share * 100:.{max(0, 2 - math.floor(math.log10(share * 100)))}f} %"
