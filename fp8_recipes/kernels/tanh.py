"""`fp8_recipes.reference.tanh_bound` and its backward: one pass each, from rows at any stride (queries or keys inside a joint projection) to contiguous rows.

Bytes moved per value: forward 2 in, 2 out; backward 4 in, 2 out. With e = exp(-2 |z|): |tanh z| = (1 - e) / (1 + e) and 1 - tanh^2 z = 4 e / (1 + e)^2.
Equal to the reference except where the GPU's exp and reciprocal differ in the last places and that crosses a rounding boundary. The gradient of alpha is summed
as xIELU's is: each program in one order, the programs in fp64 in one order; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.tanh import check_tanh
from . import common
from .common import INTERPRETED, cdiv, check_device, next_power_of_2, to_fp32
from .launch import launch
from .permute import _to_bf16

ELEMENTS = 4096
"""Per program."""
WIDEST = 1024
"""Columns per program; wider rows are cut."""


# exp(-2 |z|), and 1 / (1 + e): special-function unit. What is flushed stands beside a 1, or is a slope below 1e-37.
_DECAY = tl.constexpr("{ .reg .f32 t; abs.f32 t, $1; mul.f32 t, t, 0fC038AA3B; ex2.approx.ftz.f32 $0, t; }")
_SHARE = tl.constexpr("{ .reg .f32 t; add.f32 t, $1, 0f3F800000; rcp.approx.ftz.f32 $0, t; }")


@triton.jit
def _decay(z):
    if INTERPRETED:
        return tl.exp(-2.0 * tl.abs(z))
    else:
        return tl.inline_asm_elementwise(_DECAY, "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _share(e):
    if INTERPRETED:
        return 1.0 / (1.0 + e)
    else:
        return tl.inline_asm_elementwise(_SHARE, "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh_of(z):
    """tanh z, fp32."""
    e = _decay(z)
    magnitude = (1.0 - e) * _share(e)
    far = (magnitude.to(tl.int32, bitcast=True) | (z.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)
    # near zero 1 - e is mostly rounding error; two terms of the series are exact to fp32 there
    return tl.where(tl.abs(z) < 0.015625, z - z * z * z * 0.33333334, far)


@triton.jit
def tanh_slope(z):
    """1 - tanh^2 z, fp32."""
    e = _decay(z)
    share = _share(e)
    return 4.0 * e * share * share


@triton.jit
def store_as(ptr, value, mask):
    """fp32 to the type of the memory."""
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr, _to_bf16(value), mask=mask)
    else:
        tl.store(ptr, value, mask=mask)


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, alpha_ptr, rows, cols, stride, R: tl.constexpr, C: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (column < cols)
    z = tl.load(alpha_ptr) * to_fp32(tl.load(x_ptr + row * stride + column, mask=mask, other=0.0))
    store_as(out_ptr + row * cols + column, tanh_of(z), mask)


@triton.jit
def _tanh_backward_kernel(
    dy_ptr, x_ptr, out_ptr, alpha_ptr, alpha_gradient_ptr, rows, cols, dy_stride, stride, R: tl.constexpr, C: tl.constexpr
):
    """alpha_gradient_ptr: fp32, one per program."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (column < cols)
    alpha = tl.load(alpha_ptr)
    x = to_fp32(tl.load(x_ptr + row * stride + column, mask=mask, other=0.0))
    dy = to_fp32(tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0))
    dz = dy * tanh_slope(alpha * x)
    store_as(out_ptr + row * cols + column, dz * alpha, mask)
    tl.store(alpha_gradient_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(dz * x, axis=1), axis=0))


def _plan(rows: int, cols: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, constants)."""
    c = min(next_power_of_2(cols), WIDEST)
    r = ELEMENTS // c
    return (cdiv(rows, r), cdiv(cols, c)), {"R": r, "C": c}


def tanh_bound(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.tanh_bound`. x: [rows, cols] at any row stride, alpha: 0-dim fp32 -> contiguous [rows, cols]."""
    check_tanh(x, alpha)
    check_device(x, "x")
    out = common.empty(tuple(x.shape), x.dtype, x.device)
    if x.numel():
        grid, constants = _plan(*x.shape)
        launch(_tanh_kernel, grid, x, out, alpha, *x.shape, x.stride(0), **constants)
    return out


def tanh_bound_backward(dy: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.tanh_bound_backward`. dy, x: [rows, cols] at any row strides -> (dx contiguous, dalpha 0-dim fp32)."""
    check_tanh(x, alpha)
    check_tanh(dy, alpha)
    check_device(x, "x")
    check_device(dy, "dy")
    if dy.shape != x.shape:
        raise ValueError(f"dy and x must have one shape, got {tuple(dy.shape)} and {tuple(x.shape)}")
    out = common.empty(tuple(x.shape), x.dtype, x.device)
    if not x.numel():
        return out, torch.zeros((), device=x.device)
    grid, constants = _plan(*x.shape)
    partial = common.empty((grid[0] * grid[1],), torch.float32, x.device)
    launch(_tanh_backward_kernel, grid, dy, x, out, alpha, partial, *x.shape, dy.stride(0), x.stride(0), **constants)
    return out, partial.sum(dtype=torch.float64).float()
