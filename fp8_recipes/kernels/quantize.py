"""Quantise in one read of the input: `fp8_recipes.reference.quantize`, bit for bit.

Bytes moved per value: 2 in (bf16), 1 out, plus one byte per 128 (tile exponents) and 4 per row. Rows up to 32768 columns stay in registers between the
maximum and the cast; wider ones are read twice. "tensor" and "measured" need the maximum of everything first and read twice by nature.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format, global_scale_from_amax
from ..reference.fold import block_maximum, check_fold
from ..reference.quantize import _check_options, tile_exponents
from ..tensor import MICRO, TILE, ScaledTensor, check_matrix, scale_shape
from . import common
from .common import (
    cdiv,
    check_device,
    check_not_empty,
    check_payload,
    decode,
    encode,
    finite_or_nan,
    is_e5m2,
    next_power_of_2,
    pow2,
    scale_bytes,
    scale_exponent,
    store_copies,
    to_fp32,
)
from .launch import launch
from .rows import MAX_ROW, empty_rows, hold_known, load_piece, load_row, micro_amax, row_result, store_piece, store_row, store_row_scale

WIDE_TILES = 32
"""Tiles per step when a row is too wide for registers."""
FLAT = 4096
"""Elements per program of the elementwise kernels."""


@triton.jit
def _scaled(x, global_ptr, GLOBAL: tl.constexpr):
    """(x / global scale with NaN for non-finite values, its micro maxima)."""
    x = finite_or_nan(x)
    micro = micro_amax(x)
    if GLOBAL:
        g = tl.load(global_ptr)
        x = finite_or_nan(tl.div_rn(x, g + tl.zeros_like(x)))
        micro = tl.div_rn(micro, g + tl.zeros_like(micro))
    return x, micro


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    global_ptr,
    cols,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pieces = load_row(load_piece, (x_ptr + row * cols,), cols, BLOCK, TAIL)
    held = [hold_known(*_scaled(x, global_ptr, GLOBAL), LOCAL, E5M2) for x in pieces]
    store_row(held, row, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)


@triton.jit
def _quantize_wide_rows_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    tile_exponent_ptr,
    global_ptr,
    cols,
    TILES: tl.constexpr,
    LOCAL: tl.constexpr,
    FOLD: tl.constexpr,
    E5M2: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * cols
    row_exp = tl.full((), -126, tl.int32)
    if FOLD or LOCAL == "row":
        for first in range(0, cols, TILES * 128):
            x, micro = _scaled(load_piece(x_ptr, first, cols, TILES), global_ptr, GLOBAL)
            row_exp = tl.maximum(row_exp, tl.max(tl.max(scale_exponent(micro, E5M2), axis=1), axis=0))
    for first in range(0, cols, TILES * 128):
        x, micro = _scaled(load_piece(x_ptr, first, cols, TILES), global_ptr, GLOBAL)
        store_piece(hold_known(x, micro, LOCAL, E5M2), row_exp, row, first, cols, cols, payload_ptr, scale_ptr, tile_exponent_ptr, LOCAL, FOLD, E5M2)
    store_row_scale(scale_ptr, row, row_exp, LOCAL, FOLD)


@triton.jit
def _quantize_block_kernel(x_ptr, payload_ptr, scale_ptr, rows, cols, E5M2: tl.constexpr):
    row = tl.program_id(0) * 128 + tl.arange(0, 128)[:, None]
    column = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    mask = (row < rows) & (column < cols)
    offset = row.to(tl.int64) * cols + column
    x = finite_or_nan(to_fp32(tl.load(x_ptr + offset, mask=mask, other=0.0)))
    amax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    exponent = scale_exponent(tl.where(amax == amax, amax, 0.0), E5M2)
    tl.store(payload_ptr + offset, encode(x * pow2(-exponent), E5M2), mask=mask)
    tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), pow2(exponent))


@triton.jit
def _partial_amax_kernel(x_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    """Largest finite |x| of every num_programs-th block."""
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    amax = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, stride):
        offset = start + tl.arange(0, BLOCK)
        x = finite_or_nan(to_fp32(tl.load(x_ptr + offset, mask=offset < numel, other=0.0)))
        x = tl.abs(x)
        amax = tl.maximum(amax, tl.where(x == x, x, 0.0))
    tl.store(partial_ptr + tl.program_id(0), tl.max(amax, axis=0))


@triton.jit
def given_exponent(amax_ptr, increment, E5M2: tl.constexpr):
    """Scale exponent of ``amax + increment``, read on the device."""
    return scale_exponent(tl.load(amax_ptr).to(tl.float32) + increment, E5M2)


@triton.jit
def _quantize_given_kernel(x_ptr, payload_ptr, scale_ptr, amax_ptr, increment, numel, copies, BLOCK: tl.constexpr, E5M2: tl.constexpr):
    exponent = given_exponent(amax_ptr, increment, E5M2)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    x = to_fp32(tl.load(x_ptr + offset, mask=mask, other=0.0))
    tl.store(payload_ptr + offset, encode(finite_or_nan(x * pow2(-exponent)), E5M2), mask=mask)
    if tl.program_id(0) == 0:
        store_copies(scale_ptr, pow2(exponent), copies)


@triton.jit
def _fold_kernel(
    payload_ptr,
    out_ptr,
    source_ptr,
    target_ptr,
    cols,
    source_stride,
    target_stride,
    ROWS_PER_SCALE: tl.constexpr,
    COLS_PER_SCALE: tl.constexpr,
    ROWS_PER_TARGET: tl.constexpr,
    COLS_PER_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    E5M2: tl.constexpr,
):
    """One program shifts BLOCK columns of one row. COLS_PER_SCALE, COLS_PER_TARGET 0: one for the whole row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < cols
    source_ptr += (row // ROWS_PER_SCALE) * source_stride
    if COLS_PER_SCALE:
        source = tl.load(source_ptr + column // COLS_PER_SCALE, mask=mask, other=1).to(tl.int32)
    else:
        source = tl.load(source_ptr).to(tl.int32) + tl.zeros_like(column)
    target_ptr += (row // ROWS_PER_TARGET) * target_stride
    if COLS_PER_TARGET:
        target = tl.load(target_ptr + column // COLS_PER_TARGET, mask=mask, other=1).to(tl.int32)
    else:
        target = tl.load(target_ptr).to(tl.int32) + tl.zeros_like(column)
    factor = pow2(tl.minimum(tl.maximum(source - target, -126), 127))
    factor = tl.where(source == 255, float("nan"), factor)
    x = decode(tl.load(payload_ptr + row * cols + column, mask=mask, other=0), E5M2)
    tl.store(out_ptr + row * cols + column, encode(finite_or_nan(x * factor), E5M2), mask=mask)


def amax(x: torch.Tensor) -> torch.Tensor:
    """Largest finite |x|, 0-dim fp32, in one read."""
    programs = min(cdiv(x.numel(), FLAT), 1056)  # eight for each of 132 multiprocessors
    partial = common.empty((programs,), torch.float32, x.device)
    launch(_partial_amax_kernel, (programs,), x, partial, x.numel(), BLOCK=FLAT)
    return partial.amax()


def quantize(
    x: torch.Tensor,
    granularity: str,
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    global_scale: torch.Tensor | str | None = None,
) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.quantize`: same arguments, same bits. x: [rows, cols] bf16, fp16 or fp32 on the GPU."""
    check_matrix(x, "x")
    _check_options(granularity, fold, global_scale)
    check_device(x, "x")
    check_not_empty(x, "x")
    if granularity == "tensor":
        return _quantize_given(x, amax(x), 0.0, fmt)
    if granularity == "block":
        return _quantize_blocks(x, fmt)
    if isinstance(global_scale, str):
        global_scale = global_scale_from_amax(amax(x), fmt)
    elif global_scale is not None:
        global_scale = global_scale.float()
    rows, cols = x.shape
    r = row_result(cols, granularity, fold, fmt)
    q, pointers = empty_rows(rows, cols, r, fmt, x.device)
    q.global_scale = global_scale
    arguments = (x, *pointers, x if global_scale is None else global_scale, cols)
    if cols > MAX_ROW:
        options = {name: r.constants[name] for name in ("LOCAL", "FOLD", "E5M2")}
        launch(_quantize_wide_rows_kernel, (rows,), *arguments, TILES=WIDE_TILES, **options, GLOBAL=global_scale is not None, num_warps=4)
    else:
        launch(_quantize_rows_kernel, (rows,), *arguments, **r.constants, GLOBAL=global_scale is not None)
    return q


def _quantize_blocks(x: torch.Tensor, fmt: Format) -> ScaledTensor:
    rows, cols = x.shape
    payload = common.empty((rows, cols), torch.uint8, x.device)
    scale = common.empty(scale_shape(rows, cols, "block"), torch.float32, x.device)
    launch(_quantize_block_kernel, (scale.shape[0], scale.shape[1]), x, payload, scale, rows, cols, E5M2=is_e5m2(fmt), num_warps=8)
    return ScaledTensor(payload.view(fmt.dtype), scale, "block")


def _quantize_given(x: torch.Tensor, amax: torch.Tensor, increment: float, fmt: Format) -> ScaledTensor:
    """One scale for the whole tensor, from ``amax + increment`` read on the device."""
    payload = common.empty(tuple(x.shape), torch.uint8, x.device)
    scale = common.empty((x.shape[0],), torch.float32, x.device)
    grid = (cdiv(x.numel(), FLAT),)
    launch(_quantize_given_kernel, grid, x, payload, scale, amax, float(increment), x.numel(), x.shape[0], BLOCK=FLAT, E5M2=is_e5m2(fmt))
    return ScaledTensor(payload.view(fmt.dtype), scale[0], "tensor", row_scale=scale)


def quantize_weight(w: torch.Tensor, amax: torch.Tensor, increment: float = 0.0, fmt: Format = E4M3, *, transpose: bool = False) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.quantize_weight`: one streaming pass, no host synchronisation.

    w: [out_features, in_features]; amax: 0-dim fp32 on the device of ``w``; transpose: payload [in_features, out_features].
    """
    check_matrix(w, "w")
    check_device(w, "w")
    check_not_empty(w, "w")
    if amax.numel() != 1 or amax.device != w.device:
        raise ValueError(f"amax must be one number on {w.device}, got shape {tuple(amax.shape)} on {amax.device}; measure it with weight_scaling.measure_amax")
    if transpose and w.shape[0] % 4 == 0:
        from .fold_transpose import quantize_given_transposed

        return quantize_given_transposed(w, amax, increment, fmt)
    q = _quantize_given(w, amax, increment, fmt)
    if transpose:  # the transposing kernel writes 4 bytes at a time; no GEMM takes such a weight anyway
        payload = q.payload.view(torch.uint8).t().contiguous().view(fmt.dtype)
        return ScaledTensor(payload, q.scale, "tensor")
    return q


def fold(q: ScaledTensor, granularity: str) -> ScaledTensor:
    """Kernel twin of `fp8_recipes.reference.fold`. Where a scale is not a power of two the reference raises; here that group becomes NaN (no host sync)."""
    check_fold(q, granularity)
    if granularity == q.granularity:
        return q
    check_payload(q)
    check_not_empty(q.payload, "payload")
    source = scale_bytes(q)
    tiles = None if granularity == "tensor" else (tile_exponents(q) + 127).to(torch.uint8)
    if tiles is None:
        target = torch.where(source == common.BAD_SCALE, 0, source).amax()
    else:
        target = tiles.amax(dim=1) if granularity == "row" else block_maximum(tiles) if granularity == "block" else tiles
    payload = _fold_payload(q, source, target, granularity)
    scale = ((target.to(torch.int32)) << 23).view(torch.float32)
    return ScaledTensor(payload, scale, granularity, tile_exponent=tiles if granularity == "row" else None)


_COLUMNS = {"micro": MICRO, "tile": TILE, "block": TILE, "row": 0, "tensor": 0}
"""Columns that share a scale; 0: all."""


def _fold_payload(q: ScaledTensor, source: torch.Tensor, target: torch.Tensor, granularity: str) -> torch.Tensor:
    """Payload of ``q`` at the exponents ``target`` (E8M0 bytes in the shape of the scales of ``granularity``)."""
    rows, cols = q.shape
    out = common.empty((rows, cols), torch.uint8, q.device)
    block = min(FLAT, next_power_of_2(cols))
    launch(
        _fold_kernel,
        (rows, cdiv(cols, block)),
        q.payload.view(torch.uint8),
        out,
        source,
        target,
        cols,
        source.stride(0) if source.dim() else 0,
        target.stride(0) if target.dim() else 0,
        ROWS_PER_SCALE=TILE if q.granularity == "block" else 1,
        COLS_PER_SCALE=_COLUMNS[q.granularity],
        ROWS_PER_TARGET=TILE if granularity == "block" else 1,
        COLS_PER_TARGET=_COLUMNS[granularity],
        BLOCK=block,
        E5M2=is_e5m2(q.format),
    )
    return out.view(q.payload.dtype)


__all__ = ["amax", "fold", "quantize", "quantize_weight"]
