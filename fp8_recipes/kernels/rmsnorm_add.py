"""`fp8_recipes.reference.rmsnorm_add` and its backward: one pass each.

Bytes moved per value in bf16: forward 4 in, 2 out; backward 4 in, 2 out. A row is cut into equal pieces in which a thread has 8 neighbours, 16 bytes of bf16.

Forward: one program takes a row. Backward: as many programs as a GPU holds take the rows in turn, and each keeps its sum for the gain in registers, so that
what is written for the gain is little next to the rows. The programs' sums are added in one order by a second kernel: no atomics, the same input gives the
same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference.rmsnorm_add import check_rmsnorm_add, check_rstd
from . import common
from .common import INTERPRETED, cdiv, check_device, next_power_of_2, to_fp32
from .launch import launch
from .permute import _to_bf16
from .rmsnorm import _added
from .rows import MAX_ROW

PER_THREAD = 32
"""Values of a row that a thread takes, at least."""
MULTIPROCESSORS = 132
"""Of a Hopper GPU. A constant, so that the gain's gradient has the same bits on each of them."""
ADD = {"ROWS": 256, "COLS": 32, "num_warps": 8}
"""What of the programs' sums one program of the second kernel adds at a time: 128 bytes of each row, as many rows as need few rounds."""
_BF16_PAIR_BYTES = tl.constexpr("{ prmt.b32 $0, $2, 0, 0x1044; prmt.b32 $1, $2, 0, 0x3244; }")


@triton.jit
def _columns(INDEX: tl.constexpr, WIDTH: tl.constexpr):
    return INDEX * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _load(ptr, cols, INDEX: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """Piece INDEX of a row; MASK: 0 beyond ``cols``."""
    column = _columns(INDEX, WIDTH)
    return tl.load(ptr + column, mask=column < cols, other=0.0) if MASK else tl.load(ptr + column)


@triton.jit
def _load_row(ptr, cols, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, INDEX: tl.constexpr = 0):
    """The pieces of a row, from INDEX on, in the type of the memory."""
    piece = _load(ptr, cols, INDEX, WIDTH, INDEX == PIECES - 1 and not WHOLE)
    if INDEX == PIECES - 1:
        return (piece,)
    else:
        return (piece,) + _load_row(ptr, cols, WIDTH, PIECES, WHOLE, INDEX + 1)  # noqa: RUF005


@triton.jit
def _rounded(value, ptr):
    """fp32 as the memory at ptr takes it: what `_to_bf16` mends, or as it is."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return _to_bf16(value)
    else:
        return value


@triton.jit
def _store_piece(ptr, value, cols, INDEX: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    column = _columns(INDEX, WIDTH)
    value = _rounded(value, ptr)
    if MASK:
        tl.store(ptr + column, value, mask=column < cols)
    else:
        tl.store(ptr + column, value)


@triton.jit
def _again(x):
    """`to_fp32` by other instructions, so that the assembler does not keep the fp32 values of a first conversion over the sum in between: ``AGAIN`` persuades
    the compiler, but the assembler finds the equal instructions, and spills."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return to_fp32(x)
    else:
        return tl.inline_asm_elementwise(_BF16_PAIR_BYTES, "=r,=r,r", [x], dtype=tl.float32, is_pure=False, pack=2)


@triton.jit
def _square(x):
    x = to_fp32(x)
    return x * x


@triton.jit
def _rmsnorm_add_kernel(x_ptr, residual_ptr, gain_ptr, y_ptr, rstd_ptr, cols, eps, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = _load_row(x_ptr + row * cols, cols, WIDTH, PIECES, WHOLE)
    residual = _load_row(residual_ptr + row * cols, cols, WIDTH, PIECES, WHOLE)  # asked for before the sum over x waits
    square = tl.sum(_added([_square(piece) for piece in x]), axis=0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, tl.cast(cols, tl.float32)) + eps))
    tl.store(rstd_ptr + row, rstd)
    for i in tl.static_range(PIECES):
        mask = i == PIECES - 1 and not WHOLE
        gain = to_fp32(_load(gain_ptr, cols, i, WIDTH, mask))  # from L1: every row reads it
        _store_piece(y_ptr + row * cols, to_fp32(residual[i]) + _again(x[i]) * rstd * gain, cols, i, WIDTH, mask)


@triton.jit
def _zeros(WIDTH: tl.constexpr, PIECES: tl.constexpr):
    if PIECES == 1:
        return (tl.zeros([WIDTH], tl.float32),)
    else:
        return (tl.zeros([WIDTH], tl.float32),) + _zeros(WIDTH, PIECES - 1)  # noqa: RUF005


@triton.jit
def _products(sums, dy, x, rstd, projection, gain_ptr, cols, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, INDEX: tl.constexpr = 0):
    """Of a row's pieces from INDEX on: (``projection`` + dy gain x, ``sums`` of these pieces + dy n)."""
    product = to_fp32(dy[INDEX]) * to_fp32(x[INDEX])
    projection += product * to_fp32(_load(gain_ptr, cols, INDEX, WIDTH, INDEX == PIECES - 1 and not WHOLE))
    if INDEX == PIECES - 1:
        return projection, (sums[INDEX] + product * rstd,)
    else:
        projection, rest = _products(sums, dy, x, rstd, projection, gain_ptr, cols, WIDTH, PIECES, WHOLE, INDEX + 1)
        return projection, (sums[INDEX] + product * rstd,) + rest  # noqa: RUF005


@triton.jit
def _rmsnorm_add_backward_kernel(
    dy_ptr, x_ptr, gain_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, cols, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr
):
    """partial_ptr: fp32 [programs, cols], each program's sum of dy n over its rows."""
    program = tl.program_id(0)
    sums = _zeros(WIDTH, PIECES)
    for row in range(program, rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * cols
        dy, x = _load_row(dy_ptr + offset, cols, WIDTH, PIECES, WHOLE), _load_row(x_ptr + offset, cols, WIDTH, PIECES, WHOLE)
        rstd = tl.load(rstd_ptr + row)
        projection, sums = _products(sums, dy, x, rstd, tl.zeros([WIDTH], tl.float32), gain_ptr, cols, WIDTH, PIECES, WHOLE)
        share = tl.sum(projection, axis=0) * rstd / tl.cast(cols, tl.float32) * rstd * rstd  # rstd^2 mean(g n)
        for i in tl.static_range(PIECES):
            mask = i == PIECES - 1 and not WHOLE
            g = _again(dy[i]) * _again(_load(gain_ptr, cols, i, WIDTH, mask))
            _store_piece(dx_ptr + offset, g * rstd - _again(x[i]) * share, cols, i, WIDTH, mask)
    for i in tl.static_range(PIECES):
        _store_piece(partial_ptr + program.to(tl.int64) * cols, sums[i], cols, i, WIDTH, i == PIECES - 1 and not WHOLE)


@triton.jit
def _add_rows_kernel(partial_ptr, out_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum of the rows of a matrix, COLS columns a program."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, rows, ROWS):
        total += tl.load(partial_ptr + (first + row) * cols + column[None, :], mask=(first + row < rows) & (column < cols)[None, :], other=0.0)
    tl.store(out_ptr + column, _rounded(tl.sum(total, axis=0), out_ptr), mask=column < cols)


@functools.cache
def row_options(cols: int, per_thread: int = PER_THREAD) -> dict[str, Any]:
    """How one program covers a row of ``cols`` columns (scripts/bench_fog.py sweeps per_thread). Shared, not to be changed."""
    warps = max(cols // (32 * per_thread), 1)
    warps = min(1 << (warps.bit_length() - 1), 16)
    width = min(256 * warps, max(next_power_of_2(cols), 64))  # two values a thread at least: bf16 is converted in pairs
    return {"WIDTH": width, "PIECES": cdiv(cols, width), "WHOLE": cols % width == 0, "num_warps": warps}


@functools.cache
def backward_plan(rows: int, cols: int, nbytes: int = 4, per_thread: int = PER_THREAD) -> tuple[int, dict[str, Any]]:
    """(programs, options of the kernel): as many programs as a GPU's registers hold at once, while that leaves each some rows. Shared, not to be changed.

    nbytes: of one value of dy and one of x. A thread has 8 values of each in every piece, their sums and some temporaries: in bf16 24 registers a piece, with
    which nothing is spilled up to 20480 columns. Wider rows do spill.
    """
    options = row_options(cols, per_thread=per_thread)
    threads = 32 * options["num_warps"]
    registers = min((16 + 2 * nbytes) * max(options["PIECES"], 4), 65536 // threads, 255 // 8 * 8)
    programs = MULTIPROCESSORS * (65536 // (registers * threads))
    return min(programs, max(rows // 8, 2 * MULTIPROCESSORS), rows), {**options, "maxnreg": registers}


def _check(x: torch.Tensor) -> None:
    check_device(x, "x")
    if x.shape[1] > MAX_ROW:
        raise ValueError(f"x has {x.shape[1]} columns; the kernels hold a row of at most {MAX_ROW}. Use fp8_recipes.reference, which has no limit")


def rmsnorm_add(x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.rmsnorm_add`, of at most 32768 columns: (y [rows, cols] in the residual's dtype, rstd [rows] fp32)."""
    check_rmsnorm_add(x, residual, gain, "residual")
    _check(x)
    rows, cols = x.shape
    y, rstd = common.empty((rows, cols), residual.dtype, x.device), common.empty((rows,), torch.float32, x.device)
    if x.numel():
        launch(_rmsnorm_add_kernel, (rows,), x, residual, gain.contiguous(), y, rstd, cols, eps, **row_options(cols))
    return y, rstd


def rmsnorm_add_backward(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.rmsnorm_add_backward`: (dx [rows, cols] in x's dtype, dgain [cols] in gain's, summed in fp32 in one order)."""
    check_rmsnorm_add(x, dy, gain, "dy")
    check_rstd(rstd, x)
    _check(x)
    rows, cols = x.shape
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(gain)
    programs, options = backward_plan(rows, cols, dy.element_size() + x.element_size())
    dx, dgain = common.empty((rows, cols), x.dtype, x.device), common.empty((cols,), gain.dtype, x.device)
    partial = common.empty((programs, cols), torch.float32, x.device)
    launch(_rmsnorm_add_backward_kernel, (programs,), dy, x, gain.contiguous(), rstd.contiguous(), dx, partial, rows, cols, **options)
    launch(_add_rows_kernel, (cdiv(cols, ADD["COLS"]),), partial, dgain, programs, cols, **ADD)
    return dx, dgain
