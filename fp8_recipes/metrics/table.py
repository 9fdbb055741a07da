"""Sums on the device, one row per watched tensor; readings on the host after one transfer.

Sums of microbatches and of ranks are added before any ratio is taken, so the numbers do not depend on how the batch was cut:

* gradient accumulation, data and context parallelism, experts: other tokens of the same tensor, added.
* pipeline parallelism: a rank has only its own layers; the others' rows are neutral there.
* tensor parallelism, features split over ranks (QKV, the down projection's input): pooled sums add like the rest. The kurtosis of a *token* needs the
  whole token, so each rank keeps its rows' two sums, which are added over the group first.
* tensor parallelism without sequence parallelism, a tensor that every rank holds whole: ``copies`` says how often it will be counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import ops
from ..formats import E4M3, Format
from ..reference.moments import FIELDS, NO_EXPONENT, SUMS, joined, neutral, token_kurtosis
from ..tensor import ScaledTensor

_BLOCK = 64
"""Names that the table grows by."""
_VALUES, _AMAX = FIELDS.index("nonzero"), FIELDS.index("amax")
"""What a tensor's values say is before "nonzero", and "amax"; the other fields are about its FP8 form."""
_NEUTRAL = neutral().tolist()


@dataclass(frozen=True)
class Reading:
    """One tensor over one observed step, all ranks and microbatches. Definitions: `fp8_recipes.reference.moments`.

    kurtosis: mean over tokens, pooled_kurtosis: over everything; None for a tensor of zeros. Non-finite elements count as zeros in these, in rms and in amax.
    nonzero, flushed, saturated and fold_flushed are 0 where the tensor was not quantised, the scale exponents None (also where it was all zeros).
    """

    kurtosis: float | None
    pooled_kurtosis: float | None
    rms: float
    amax: float
    elements: int
    nonfinite: int
    nonzero: int
    flushed: int
    saturated: int
    fold_flushed: int
    scale_exponent_min: int | None
    scale_exponent_max: int | None

    @property
    def flush_share(self) -> float:
        """Flushes per finite non-zero element."""
        return self.flushed / self.nonzero if self.nonzero else 0.0

    @property
    def saturation_share(self) -> float:
        """Saturated elements per finite non-zero element."""
        return self.saturated / self.nonzero if self.nonzero else 0.0

    @property
    def fold_flush_share(self) -> float:
        """Payloads that the fold for wgrad turns into zero, per non-zero payload."""
        payloads = self.nonzero - self.flushed
        return self.fold_flushed / payloads if payloads else 0.0

    def as_json(self) -> dict[str, Any]:
        """The fields that say something: those about FP8 only where the tensor was quantised."""
        line: dict[str, Any] = {k: getattr(self, k) for k in ("kurtosis", "pooled_kurtosis", "rms", "amax", "elements")}
        if self.nonfinite:
            line["nonfinite"] = self.nonfinite
        if self.scale_exponent_max is not None:
            line |= {k: getattr(self, k) for k in ("flush_share", "saturation_share", "fold_flush_share", "scale_exponent_min", "scale_exponent_max")}
        return line


def to_reading(row: list[float], copies: int = 1) -> Reading:
    """From the numbers of one result (`FIELDS`). ``copies``: how many ranks counted the same elements."""
    v = dict(zip(FIELDS, row, strict=False))
    sum2, sum4 = v["sum2"], v["sum4"]
    counts = {name: round(v[name] / copies) for name in ("elements", "nonfinite", "nonzero", "flushed", "saturated", "fold_flushed")}
    return Reading(
        kurtosis=v["kurtosis"] / v["tokens"] if v["tokens"] else None,
        pooled_kurtosis=v["elements"] * sum4 / sum2**2 if sum2 else None,
        rms=(sum2 / v["elements"]) ** 0.5 if v["elements"] else 0.0,
        amax=v["amax"],
        **counts,
        scale_exponent_min=None if v["minus_scale_exponent_min"] == NO_EXPONENT else -round(v["minus_scale_exponent_min"]),
        scale_exponent_max=None if v["scale_exponent_max"] == NO_EXPONENT else round(v["scale_exponent_max"]),
    )


@dataclass
class _Parts:
    """Row sums of a tensor whose features are split over ``group``."""

    name: str
    row_sums: torch.Tensor
    cols: int
    group: Any


class _Name(NamedTuple):
    """copies: on how many ranks the same tensor is added. values_of: the name whose values this one has too, or None."""

    copies: int
    values_of: str | None


class MomentTable:
    """Adds up `ops.moments` per name. Everything stays on the device until `reduce`.

    A name's sums are [parts, WIDTH], one part for each program of the kernel (`ops.moment_parts`), and joined when the table is read: to add a tensor takes one
    launch and no memory of its own.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._rows: dict[str, torch.Tensor] = {}
        self._names: dict[str, _Name] = {}
        self._parts: list[_Parts] = []
        self._agreed: dict[str, _Name] | None = None
        """Names over all ranks, as of the last `reduce`."""
        self._news = False

    def row(self, name: str, device: torch.device, copies: int = 1) -> torch.Tensor:
        """The fp64 sums of ``name`` (`reference.moments.FIELDS`), in parts: a view [parts, WIDTH]."""
        row = self._rows.get(name)
        if row is None:
            at = len(self._rows)
            if at % _BLOCK == 0:
                self._blocks.append(neutral(_BLOCK, ops.moment_parts(device), device=device))
            row = self._rows[name] = self._blocks[-1][at % _BLOCK]
            self._known(name, _Name(copies, None))
        return row

    def _known(self, name: str, of: _Name) -> None:
        self._names[name] = of
        self._news = True

    def add(
        self,
        name: str,
        x: torch.Tensor | None,
        q: ScaledTensor | None = None,
        *,
        scale: torch.Tensor | None = None,
        fmt: Format = E4M3,
        fold: bool = True,
        shard: Any = None,
        copies: int = 1,
        source: torch.Tensor | None = None,
    ) -> None:
        """Add a tensor x [..., features] and / or its quantised form under ``name``. No tokens: nothing happens.

        scale, fmt: the scale under which x is about to be cast, without q. fold: count fold flushes. shard: process group over which the features are split.
        copies: on how many ranks this very tensor is added. source: int32 [rows], negative where a row holds no token.
        """
        if x is not None:
            x = x.detach()
            if x.dim() != 2 or not x.is_contiguous():
                x = x.reshape(-1, x.shape[-1]).contiguous()
        some = x if x is not None else q.payload if q is not None else None
        if some is None:
            raise ValueError(f"nothing to add under {name!r}: pass x, its quantised form q, or both")
        if some.numel() == 0:
            return
        row_sums = None
        if shard is not None and dist.get_world_size(shard) > 1:
            row_sums = torch.empty(some.shape[0], 2, dtype=torch.float64, device=some.device)
            self._parts.append(_Parts(name, row_sums, some.shape[1], shard))
        ops.moments(x, q, scale=scale, fmt=fmt, fold=fold, out=self.row(name, some.device, copies), row_sums=row_sums, source=source)

    def same_values(self, name: str, as_name: str) -> None:
        """``name`` is read as the values of ``as_name``, without what is about FP8: a fused kernel made the quantised form of a tensor that is watched."""
        if name not in self._names:
            self._known(name, _Name(1, as_name))

    def reset(self) -> None:
        """Forget the sums, keep the names."""
        for block in self._blocks:
            block[..., : SUMS + 1].zero_()
            block[..., SUMS + 1 :].fill_(NO_EXPONENT)
        self._parts.clear()

    @torch.no_grad()
    def reduce(self, *, local: bool = False) -> dict[str, Reading]:
        """Readings by name over all ranks, in one transfer to the host. Every rank must call it; all get the same. Does not reset.

        local: this rank's own only, no communication (tensors added with ``shard`` then have no token kurtosis).
        """
        if not local:
            self._join_parts()
        world = not local and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        names = self._agree() if world else self._names
        measured = [name for name, of in names.items() if of.values_of is None]
        if not measured:
            return {}
        table = self._collected(measured)
        if world:
            sums, maxima = table[:, :SUMS].contiguous(), table[:, SUMS:].contiguous()
            dist.all_reduce(sums)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
            table = torch.cat((sums, maxima), dim=1)
        rows = dict(zip(measured, table.tolist(), strict=True))
        return {name: self._reading(rows, name, of, names) for name, of in names.items() if (of.values_of or name) in rows}

    @staticmethod
    def _reading(rows: dict[str, list[float]], name: str, of: _Name, names: dict[str, _Name]) -> Reading:
        if of.values_of is None:
            return to_reading(rows[name], of.copies)
        row = rows[of.values_of]
        values = [*row[:_VALUES], *_NEUTRAL[_VALUES:_AMAX], row[_AMAX], *_NEUTRAL[_AMAX + 1 :]]
        return to_reading(values, names[of.values_of].copies)

    def _collected(self, names: list[str]) -> torch.Tensor:
        """fp64 [names, WIDTH] on the device, neutral where this rank has no sums."""
        if not self._blocks:
            return neutral(len(names), device=_collective_device())
        own = torch.cat([joined(block) for block in self._blocks])
        if names == list(self._rows):
            return own[: len(names)]
        at = {name: i for i, name in enumerate(self._rows)}
        table = neutral(len(names), device=own.device)
        mine = [i for i, name in enumerate(names) if name in at]
        table[torch.tensor(mine, device=own.device)] = own[torch.tensor([at[names[i]] for i in mine], device=own.device)]
        return table

    def _join_parts(self) -> None:
        """Token kurtosis of split tensors: one collective per group, in the order in which its ranks added them."""
        groups: dict[int, list[_Parts]] = {}
        for part in self._parts:
            groups.setdefault(id(part.group), []).append(part)
        for parts in groups.values():
            group, size = parts[0].group, dist.get_world_size(parts[0].group)
            together = torch.cat([p.row_sums for p in parts])
            dist.all_reduce(together, group=group)
            for p, sums in zip(parts, together.split([p.row_sums.shape[0] for p in parts]), strict=True):
                tokens, kurtosis = token_kurtosis(sums[:, 0], sums[:, 1], p.cols * size)
                self._rows[p.name][0, :2] += torch.stack((tokens, kurtosis)) / size  # every rank of the group adds the same
        self._parts.clear()

    def _agree(self) -> dict[str, _Name]:
        """Names of all ranks, in one order. Exchanged only when some rank has a new one."""
        news = torch.tensor(int(self._news or self._agreed is None), device=self._blocks[0].device if self._blocks else _collective_device())
        dist.all_reduce(news, op=dist.ReduceOp.MAX)
        if news.item():
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self._names)
            merged: dict[str, _Name] = {}
            for names in everyone:
                for name, of in names.items():
                    merged[name] = _Name(max(of.copies, merged[name].copies), of.values_of) if name in merged else of
            self._agreed = merged
            self._news = False
        assert self._agreed is not None
        return self._agreed


def _collective_device() -> torch.device:
    """Where a rank that has no tensor of its own puts its part of a collective."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


__all__ = ["MomentTable", "Reading", "to_reading"]
