"""Moments and FP8 counts of a tensor in one read, added into a row of a table on the device.

Two launches, no atomics: every program walks over rows of its own and writes its sums; one small program adds those in a fixed order to what the table
holds. So the same tensors in the same order give the same bits.

A row's x^4 must not leave fp32: the sums of a row are kept relative to the power of two of the largest element so far and moved when a larger one comes,
as an online softmax does with its maximum. Sums over rows are fp64, one addition per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import reference
from ..formats import E4M3, Format
from ..reference.moments import FIELDS, NO_EXPONENT, SUMS, WIDTH, check_moments, neutral
from ..tensor import ScaledTensor
from . import common
from .common import check_device, check_payload, decode, finite_or_nan, is_e5m2, pow2, to_fp32
from .launch import launch

PROGRAMS = 16 * 132
"""Sixteen for each multiprocessor: few registers, no barriers, many loads in flight."""
BLOCK = 1024
"""Columns read at a time; the packed counts allow up to 16384."""
WARPS = 1
"""One warp reduces by shuffles alone. scripts/bench_metrics.py sweeps all three."""
_USED = tl.constexpr(len(FIELDS))
_SUMS = tl.constexpr(SUMS)
_WIDTH = tl.constexpr(WIDTH)
_NO_EXPONENT = tl.constexpr(NO_EXPONENT)


@triton.jit
def _exponent_of(v):
    """Exponent field of a non-negative fp32 number, at least -126 and at most 126 so that its inverse is normal too."""
    return tl.minimum(tl.maximum((v.to(tl.int32, bitcast=True) >> 23) - 127, -126), 126)


@triton.jit
def _row_sums(s2, s4, exponent, v):
    """Add the finite values ``v`` to sums held relative to 2**exponent; returns (s2, s4, exponent, largest |v|)."""
    largest = tl.max(tl.abs(v), axis=0)
    new = tl.maximum(exponent, _exponent_of(largest))
    factor = pow2(tl.maximum(exponent - new, -126))
    square = v * pow2(-new)
    square = square * square
    s2 = s2 * (factor * factor) + tl.sum(square, axis=0)
    s4 = s4 * (factor * factor) * (factor * factor) + tl.sum(square * square, axis=0)
    return s2, s4, new, largest


@triton.jit
def _moments_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    target_ptr,
    partial_ptr,
    row_sum_ptr,
    rows,
    cols,
    scale_stride,
    X: tl.constexpr,
    PAYLOAD: tl.constexpr,
    SCALE: tl.constexpr,
    FOLD: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    E5M2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes every num_programs-th row. X: there is a source. PAYLOAD: there is a payload. SCALE: there is a scale (always with a payload).
    FOLD: target_ptr holds the E8M0 byte of every 128 columns. ROW_SUMS: write the rows' sums and no kurtosis."""
    format_max: tl.constexpr = 57344.0 if E5M2 else 448.0
    half_subnormal: tl.constexpr = 2.0**-17 if E5M2 else 2.0**-10
    zero = tl.full((), 0.0, tl.float64)
    tokens, kurtosis, sum2, sum4 = zero, zero, zero, zero
    none = tl.full((), 0, tl.int64)
    nonfinite, nonzero, flushed, saturated, fold_flushed = none, none, none, none, none
    amax = tl.full((), 0.0, tl.float32)
    high = tl.full((), _NO_EXPONENT, tl.int32)
    low = high
    for row_index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = none + row_index
        if SCALE:
            scale = tl.load(scale_ptr + row * scale_stride)
            row_exponent = (scale.to(tl.int32, bitcast=True) >> 23) - 127
        s2, s4, row_amax = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        exponent = tl.full((), -126, tl.int32)
        row_nonzero, row_flushed = none, none
        for first in range(0, cols, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = column < cols
            if PAYLOAD:
                code = tl.load(payload_ptr + row * cols + column, mask=mask, other=0)
                p = decode(code, E5M2)
            v = finite_or_nan(to_fp32(tl.load(x_ptr + row * cols + column, mask=mask, other=0.0))) if X else p
            finite = v == v
            v = tl.where(finite, v, 0.0)
            s2, s4, exponent, largest = _row_sums(s2, s4, exponent, v)
            row_amax = tl.maximum(row_amax, largest)
            counted = finite & mask & (v != 0.0) if X else finite & mask
            counts = tl.sum((~finite & mask).to(tl.int32) | (counted.to(tl.int32) << 16), axis=0)  # two counts of at most BLOCK in one sum
            nonfinite += counts & 0xFFFF
            row_nonzero += counts >> 16
            if PAYLOAD:
                lost = counted & (p == 0.0)
            elif SCALE:
                lost = counted & (tl.abs(v) <= half_subnormal * scale)
            if SCALE:
                above = tl.abs(v) > format_max * scale if X else lost & False
                counts = tl.sum(lost.to(tl.int32) | (above.to(tl.int32) << 16), axis=0)
                row_flushed += counts & 0xFFFF
                saturated += counts >> 16
            if FOLD:
                target = tl.load(target_ptr + column // 128, mask=mask, other=127).to(tl.int32) - 127
                shift = tl.minimum(tl.maximum(row_exponent - target, -126), 127)
                gone = (tl.abs(p) > 0.0) & (tl.abs(p) * pow2(shift) <= half_subnormal)
                fold_flushed += tl.sum(gone.to(tl.int32), axis=0)
        alive = row_nonzero > row_flushed if PAYLOAD else row_nonzero > 0
        if X or alive:  # without a source, a row of zero payloads says nothing about flushes
            nonzero += row_nonzero
            flushed += row_flushed
        unit = pow2(exponent).to(tl.float64)
        if PAYLOAD and not X:  # the sums so far are of payloads
            unit *= scale.to(tl.float64)
            row_amax *= scale
        unit *= unit
        amax = tl.maximum(amax, row_amax)
        row2, row4 = s2.to(tl.float64) * unit, s4.to(tl.float64) * unit * unit
        sum2 += row2
        sum4 += row4
        if ROW_SUMS:
            tl.store(row_sum_ptr + row * 2, row2)
            tl.store(row_sum_ptr + row * 2 + 1, row4)
        elif s2 > 0.0:
            tokens += 1.0
            kurtosis += cols * (s4.to(tl.float64) / (s2.to(tl.float64) * s2.to(tl.float64)))
        if SCALE and alive:
            high = tl.maximum(high, row_exponent)
            low = tl.maximum(low, -row_exponent)
    partial_ptr += tl.program_id(0) * _WIDTH
    tl.store(partial_ptr + 0, tokens)
    tl.store(partial_ptr + 1, kurtosis)
    tl.store(partial_ptr + 3, sum2)
    tl.store(partial_ptr + 4, sum4)
    tl.store(partial_ptr + 5, nonfinite.to(tl.float64))
    tl.store(partial_ptr + 6, nonzero.to(tl.float64))
    tl.store(partial_ptr + 7, flushed.to(tl.float64))
    tl.store(partial_ptr + 8, saturated.to(tl.float64))
    tl.store(partial_ptr + 9, fold_flushed.to(tl.float64))
    tl.store(partial_ptr + 10, amax.to(tl.float64))
    tl.store(partial_ptr + 11, high.to(tl.float64))
    tl.store(partial_ptr + 12, low.to(tl.float64))


@triton.jit
def _add_partials_kernel(partial_ptr, out_ptr, programs, elements, BLOCK: tl.constexpr):
    """One program: out += the partial results of all programs, BLOCK at a time, in order. ``elements`` is the one field that the host knows."""
    field = tl.arange(0, _WIDTH)
    used = (field < _USED) & (field != 2)
    total = tl.zeros((_WIDTH,), tl.float64)
    largest = tl.full((_WIDTH,), -float("inf"), tl.float64)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        valid = (program < programs)[:, None] & used[None, :]
        value = tl.load(partial_ptr + program[:, None] * _WIDTH + field[None, :], mask=valid, other=0.0)
        total += tl.sum(value, axis=0)
        largest = tl.maximum(largest, tl.max(tl.where(valid, value, -float("inf")), axis=0))
    old = tl.load(out_ptr + field)
    total = tl.where(field == 2, elements.to(tl.float64), total)
    new = tl.where(field < _SUMS, old + total, tl.maximum(old, largest))
    tl.store(out_ptr + field, new, mask=field < _USED)


def moments(
    x: torch.Tensor | None,
    q: ScaledTensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    fmt: Format = E4M3,
    fold: bool = True,
    out: torch.Tensor | None = None,
    row_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.moments`: same arguments; counts equal, sums to fp32 accuracy within a row.

    Payloads with scales finer than a row (recipes without a fold, which exist for checking) go through the reference's torch operations.
    """
    rows, cols = check_moments(x, q, scale, out, row_sums)
    if q is not None and q.granularity not in ("row", "tensor"):
        return reference.moments(x, q, scale=scale, fmt=fmt, fold=fold, out=out, row_sums=row_sums)
    source = x if x is not None else q.payload  # type: ignore[union-attr]
    check_device(source, "x")
    if q is not None:
        check_payload(q)
    result = neutral(device=source.device) if out is None else out
    programs = min(rows, PROGRAMS)
    partial = common.empty((programs, WIDTH), torch.float64, source.device)
    payload = source if q is None else q.payload.view(torch.uint8)
    scale = q.scale if q is not None else scale
    folds = fold and q is not None and q.tile_exponent is not None
    target = q.tile_exponent.amax(dim=0) if folds else partial  # type: ignore[union-attr]
    launch(
        _moments_kernel,
        (programs,),
        source if x is not None else payload,
        payload,
        partial if scale is None else scale,
        target,
        partial,
        partial if row_sums is None else row_sums,
        rows,
        cols,
        scale.stride(0) if scale is not None and scale.dim() else 0,
        X=x is not None,
        PAYLOAD=q is not None,
        SCALE=scale is not None,
        FOLD=folds,
        ROW_SUMS=row_sums is not None,
        E5M2=is_e5m2(fmt if q is None else q.format),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    launch(_add_partials_kernel, (1,), partial, result, programs, rows * cols, BLOCK=64, num_warps=4)
    return result


__all__ = ["moments"]
