"""Moments and FP8 counts of a tensor in one read, added into rows of a table on the device.

One launch, no atomics: every program walks over rows of its own and adds what it finds to a row of its own of the table, so the same tensors in the same order
give the same bits. (Where fold flushes are counted, a launch before it finds the targets of the fold from the tile exponents, 1/128 of the data.)

A row's x^4 must not leave fp32, so a row is taken relative to a power of two: that of its scale, or 1 where it has none. Nothing else is done for what hardly
ever happens. A row whose largest value then lies far from 1, or that holds NaN, Inf or a value above what its scale can hold, is read again with more care.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import reference
from ..formats import E4M3, Format
from ..reference.moments import FIELDS, NO_EXPONENT, SUMS, WIDTH, check_moments, joined, neutral
from ..tensor import ScaledTensor
from .common import cdiv, check_device, check_payload, is_e5m2, next_power_of_2, pow2
from .launch import launch
from .moment_rows import bits_exponent, exponent_of, is_plain, read_rows

ROWS = 8
"""Rows that a program reads at a time, one for each of its warps."""
REGISTERS = 80
"""Three programs of 256 threads fit on a multiprocessor. What this limit puts into memory is used once in a group of rows."""
MOMENT_PARTS = 3 * 132
"""Programs, if they all have rows. scripts/bench_metrics.py sweeps the three."""
_NO_EXPONENT = tl.constexpr(NO_EXPONENT)
_WIDTH = tl.constexpr(WIDTH)
_FIELDS, _NONZERO, _SUMS = tl.constexpr(len(FIELDS)), tl.constexpr(FIELDS.index("nonzero")), tl.constexpr(SUMS)
TARGET_ROWS, TARGET_TILES = 64, 128
"""Tile exponents that a program of the launch before takes."""


class _Sums(NamedTuple):
    """What a program has found so far, one number for each row that it reads at a time. In the order of `FIELDS`."""

    tokens: Any
    kurtosis: Any
    elements: Any
    sum2: Any
    sum4: Any
    nonfinite: Any
    nonzero: Any
    flushed: Any
    saturated: Any
    fold_flushed: Any
    amax: Any
    high: Any
    low: Any


@triton.jit
def _add_rows(sums, r, row2, row4, valid, cols, exponent, X: tl.constexpr, PAYLOAD: tl.constexpr, SCALE: tl.constexpr, ROW_SUMS: tl.constexpr):
    """``sums`` and what was read in ``r``. row2, row4: sums of a row in fp64; exponent: of its scale."""
    alive = valid & (r.codes > r.nonfinite if PAYLOAD else r.nonzero > 0)
    counts = valid & (r.s2 > 0.0)
    s2 = tl.where(counts, r.s2, 1.0)
    kurtosis = tl.where(counts, cols * (r.s4 / s2 / s2), 0.0).to(tl.float64)
    if X:
        nonzero = tl.where(valid, r.nonzero, 0)
        flushed = tl.where(valid, r.nonzero + r.nonfinite - r.codes if PAYLOAD else r.lost, 0)
    else:  # without x, a row of zero payloads says nothing about flushes
        nonzero = tl.where(alive, cols - r.nonfinite, 0)
        flushed = tl.where(alive, cols - r.codes, 0)
    return _Sums(
        sums.tokens if ROW_SUMS else sums.tokens + counts.to(tl.int32),
        sums.kurtosis if ROW_SUMS else sums.kurtosis + kurtosis,
        sums.elements + tl.where(valid, cols, 0),
        sums.sum2 + tl.where(valid, row2, 0.0),
        sums.sum4 + tl.where(valid, row4, 0.0),
        sums.nonfinite + tl.where(valid, r.nonfinite, 0),
        sums.nonzero + nonzero if SCALE else sums.nonzero,
        sums.flushed + flushed if SCALE else sums.flushed,
        sums.saturated + tl.where(valid, r.above, 0),
        sums.fold_flushed + tl.where(valid, r.codes - r.kept, 0),
        tl.maximum(sums.amax, tl.where(valid, r.largest, 0.0)),
        tl.maximum(sums.high, tl.where(alive, exponent, _NO_EXPONENT)) if SCALE else sums.high,
        tl.maximum(sums.low, tl.where(alive, -exponent, _NO_EXPONENT)) if SCALE else sums.low,
    )


@triton.jit
def _add(ptr, numbers):
    tl.store(ptr, tl.load(ptr) + tl.sum(numbers, axis=0).to(tl.float64))


@triton.jit
def _raise(ptr, numbers):
    tl.store(ptr, tl.maximum(tl.load(ptr), tl.max(numbers, axis=0).to(tl.float64)))


@triton.jit
def _add_to_table(out_ptr, sums, SCALE: tl.constexpr):
    """Into a row of the table, whose fields (`FIELDS`) are in the order of `_Sums`; those about FP8 where there is a scale."""
    for field in tl.static_range(_FIELDS):
        if SCALE or field < _NONZERO or field == _SUMS:
            if field < _SUMS:
                _add(out_ptr + field, sums[field])
            else:
                _raise(out_ptr + field, sums[field])


@triton.jit
def _moments_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    target_ptr,
    source_ptr,
    out_ptr,
    row_sum_ptr,
    rows,
    cols,
    scale_stride,
    X: tl.constexpr,
    PAYLOAD: tl.constexpr,
    SCALE: tl.constexpr,
    FOLD: tl.constexpr,
    SOURCE: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    E5M2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program takes every num_programs-th group of ROWS rows. X: there is an x. PAYLOAD: there is a payload (int32 words). SCALE: there is a scale (always
    with a payload). FOLD: target_ptr holds the E8M0 byte of every 128 columns (int32). SOURCE: rows with a negative source do not count. ROW_SUMS: write the
    rows' sums and no kurtosis."""
    number = tl.zeros((ROWS,), tl.float64)
    none = tl.zeros((ROWS,), tl.int32)
    lowest = none + _NO_EXPONENT
    sums = _Sums(none, number, none, number, number, none, none, none, none, none, tl.zeros((ROWS,), tl.float32), lowest, lowest)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        index = first + tl.arange(0, ROWS)
        row = tl.minimum(index, rows - 1).to(tl.int64)  # the last row again, which then does not count
        valid = index < rows
        if SOURCE:
            valid = valid & (tl.load(source_ptr + row) >= 0)
        scale = tl.load(scale_ptr + row * scale_stride) if SCALE else tl.full((ROWS,), 1.0, tl.float32)
        exponent = exponent_of(scale)
        r = read_rows(x_ptr, payload_ptr, target_ptr, row, cols, exponent, scale, X, PAYLOAD, SCALE, FOLD, E5M2, False)
        again = tl.max((valid & ~is_plain(r, exponent, scale, X, SCALE, E5M2)).to(tl.int32), axis=0)
        for second in range(2 * again):  # the first time for the largest finite value, the second relative to it
            if X:
                exponent = tl.where(second > 0, exponent_of(r.largest), exponent)
            r = read_rows(x_ptr, payload_ptr, target_ptr, row, cols, exponent, scale, X, PAYLOAD, SCALE, FOLD, E5M2, True)
        unit = (pow2(exponent) if X else scale).to(tl.float64)
        square = unit * unit
        row2, row4 = r.s2.to(tl.float64) * square, r.s4.to(tl.float64) * (square * square)
        sums = _add_rows(sums, r, row2, row4, valid, cols, bits_exponent(scale), X, PAYLOAD, SCALE, ROW_SUMS)
        if ROW_SUMS:
            tl.store(row_sum_ptr + row * 2, row2, mask=valid)
            tl.store(row_sum_ptr + row * 2 + 1, row4, mask=valid)
    _add_to_table(out_ptr + tl.program_id(0) * _WIDTH, sums, SCALE)


@triton.jit
def _target_kernel(exponent_ptr, source_ptr, target_ptr, rows, tiles, SOURCE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """target [tiles] (int32, zeros before) becomes the maximum over the rows of exponent [rows, tiles] uint8. A maximum does not depend on the order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)[None, :]
    mask = (row < rows) & (tile < tiles)
    if SOURCE:
        mask = mask & (tl.load(source_ptr + row, mask=row < rows, other=-1) >= 0)
    best = tl.max(tl.load(exponent_ptr + row * tiles + tile, mask=mask, other=0).to(tl.int32), axis=0)
    column = tl.program_id(1) * TILES + tl.arange(0, TILES)
    tl.atomic_max(target_ptr + column, best, mask=column < tiles)


class _Zeros:
    """int32 zeros for one use each, many from one launch, on the stream of their use. Each part begins at a multiple of 16 bytes, so that a kernel compiles
    once for all."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, int], tuple[torch.Tensor | None, int]] = {}

    def take(self, count: int, device: torch.device) -> torch.Tensor:
        key = device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        block, at = self._blocks.get(key, (None, 0))
        if block is None or at + count > block.shape[0]:
            block, at = torch.zeros(max(self.SIZE, count), dtype=torch.int32, device=device), 0
        self._blocks[key] = block, at + (count + 3) // 4 * 4
        return block[at : at + count]


_zeros = _Zeros()


def _fold_targets(exponents: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
    """Maxima over the rows of uint8 [rows, tiles]: int32 [tiles]."""
    rows, tiles = exponents.shape
    target = _zeros.take(tiles, exponents.device)
    width = min(TARGET_TILES, next_power_of_2(tiles))
    grid = (cdiv(rows, TARGET_ROWS), cdiv(tiles, width))
    given = target if source is None else source
    launch(_target_kernel, grid, exponents, given, target, rows, tiles, SOURCE=source is not None, ROWS=TARGET_ROWS, TILES=width, num_warps=4)
    return target


def moments(
    x: torch.Tensor | None,
    q: ScaledTensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    fmt: Format = E4M3,
    fold: bool = True,
    out: torch.Tensor | None = None,
    row_sums: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.moments`: same arguments; counts equal, sums to fp32 accuracy within a row. As many programs as ``out`` has parts.

    q must be what x was quantised to: a value that was flushed is one that is not zero in x and zero in q, and the two are counted apart.
    Payloads with scales finer than a row (recipes without a fold, which exist for checking) or of a width that is no multiple of 4 (no product takes those) go
    through the reference's torch operations.
    """
    rows, cols = check_moments(x, q, scale, out, row_sums, source)
    if q is not None and (q.granularity not in ("row", "tensor") or cols % 4):
        return reference.moments(x, q, scale=scale, fmt=fmt, fold=fold, out=out, row_sums=row_sums, source=source)
    given = x if x is not None else q.payload  # type: ignore[union-attr]
    check_device(given, "x")
    if q is not None:
        check_payload(q)
        scale = q.scale
    table = neutral(MOMENT_PARTS, device=given.device) if out is None else out
    payload = given if q is None else q.payload.view(torch.int32)
    folds = fold and q is not None and q.tile_exponent is not None
    launch(
        _moments_kernel,
        (min(cdiv(rows, ROWS), 1 if table.dim() == 1 else table.shape[0]),),
        given if x is not None else payload,
        payload,
        table if scale is None else scale,
        _fold_targets(q.tile_exponent, source) if folds else table,  # type: ignore[union-attr, arg-type]
        table if source is None else source,
        table,
        table if row_sums is None else row_sums,
        rows,
        cols,
        scale.stride(0) if scale is not None and scale.dim() else 0,
        X=x is not None,
        PAYLOAD=q is not None,
        SCALE=scale is not None,
        FOLD=folds,
        SOURCE=source is not None,
        ROW_SUMS=row_sums is not None,
        E5M2=is_e5m2(fmt if q is None else q.format),
        ROWS=ROWS,
        num_warps=ROWS,
        maxnreg=REGISTERS,
    )
    return joined(table) if out is None else out


__all__ = ["MOMENT_PARTS", "ROWS", "moments"]
