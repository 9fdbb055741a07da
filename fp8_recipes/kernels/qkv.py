"""`fp8_recipes.reference.qkv_tanh_rotary` and its backward: one pass each between the joint projection and attention.

Bytes moved per value of the projection in bf16: forward 2 in, 2 out; backward 4 in, 2 out, less the values, which backward need not read again. The angles are
read once per group from the caches.

The projection is a matrix of (token, group) pairs: each row is the group's query heads, its key and its value, and rows of q, k and v follow in the same order.
A program takes some of these rows; the halves of a head are tiles of one layout, in which a thread has 8 neighbours, so a rotation moves nothing between
threads and a pair's cosines serve all its heads.

The gradients of alpha: each program in one order, the programs in fp64 in one order; no atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference.qkv import HEAD_SIZES, check_gradients, check_qkv
from . import common
from .common import INTERPRETED, cdiv, check_device, to_fp32
from .launch import launch
from .tanh import store_as, tanh_of, tanh_slope

TILE = 1024
"""Values of half a head that a program takes from as many pairs: 8 for each of 128 threads."""
FORWARD, BACKWARD = 4, 2
"""Query heads, at most, that a program loads before it computes the first of them; backward has a gradient beside each."""

# pi / 2 in two parts: a fused product with the first leaves an exact difference.
_PIO2 = tl.constexpr(1.57079637050628662109375)
_PIO2_LOW = tl.constexpr(-4.37113900018624283e-8)
_TWO_OVER_PI = tl.constexpr(0.63661977236758134)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it leaves a whole number in the lowest bits."""


@triton.jit
def _fma(a, b, c):
    """a * b + c rounded once; the interpreter rounds twice."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def cos_sin(angle):
    """(cos, sin) of fp32 radians up to `reference.qkv.LARGEST_ANGLE` in size, to 2e-7. By series on [-0.9, 0.9] around the nearest multiple of pi / 2: the
    hardware's own functions lose a digit for every factor of ten."""
    shifted = _fma(angle, _TWO_OVER_PI, _ROUND)
    quadrant = shifted.to(tl.int32, bitcast=True)
    turns = shifted - _ROUND
    r = _fma(turns, -_PIO2_LOW, _fma(turns, -_PIO2, angle))
    square = r * r
    sine = r + r * square * (-0.16666667 + square * (0.008333334 + square * (-0.00019841270 + square * 2.7557319e-6)))
    cosine = 1.0 - square * (0.5 - square * (0.041666668 - square * (0.0013888889 - square * 2.4801587e-5)))
    odd = (quadrant & 1) != 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, 0.0 - c, c), tl.where((quadrant & 2) != 0, 0.0 - s, s)


@triton.jit
def _halves(ptr, offset, mask, HALF: tl.constexpr, COUNT: tl.constexpr, INDEX: tl.constexpr = 0):
    """The halves of the heads from INDEX to COUNT, one head behind the other in memory, in the type of the memory: (first, second, first, second, ...)."""
    at = ptr + offset + INDEX * 2 * HALF
    pair = (tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0))
    if INDEX == COUNT - 1:
        return pair
    else:
        return pair + _halves(ptr, offset, mask, HALF, COUNT, INDEX + 1)


@triton.jit
def _place(pairs, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """(pair int32, the same int64, column, mask) of this program's tile."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    return pair, pair.to(tl.int64), column, pair < pairs


@triton.jit
def _bound_rotate_store(ptr, offset, first, second, alpha, cos, sin, mask, HALF: tl.constexpr):
    first, second = tanh_of(alpha * to_fp32(first)), tanh_of(alpha * to_fp32(second))
    store_as(ptr + offset, first * cos - second * sin, mask)
    store_as(ptr + offset + HALF, second * cos + first * sin, mask)


@triton.jit
def _qkv_kernel(
    mixed_ptr, q_ptr, k_ptr, v_ptr, alpha_q_ptr, alpha_k_ptr, angle_ptr, pairs, pairs_of_position, angle_stride,
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    pair, row, column, mask = _place(pairs, PAIRS, HALF)
    angle = tl.load(angle_ptr + (pair // pairs_of_position).to(tl.int64) * angle_stride + column, mask=mask, other=0.0)
    source = row * ((HEADS + 2) * 2 * HALF) + column
    kv = _halves(mixed_ptr, source + HEADS * 2 * HALF, mask, HALF, 2)
    alpha_q, alpha_k = tl.load(alpha_q_ptr).to(tl.float32), tl.load(alpha_k_ptr).to(tl.float32)
    cos, sin = cos_sin(angle)
    for head in range(0, HEADS, AT_ONCE):
        x = _halves(mixed_ptr, source + head * 2 * HALF, mask, HALF, AT_ONCE)
        target = row * (HEADS * 2 * HALF) + column + head * 2 * HALF
        for i in tl.static_range(AT_ONCE):
            _bound_rotate_store(q_ptr, target + i * 2 * HALF, x[2 * i], x[2 * i + 1], alpha_q, cos, sin, mask, HALF)
    target = row * (2 * HALF) + column
    _bound_rotate_store(k_ptr, target, kv[0], kv[1], alpha_k, cos, sin, mask, HALF)
    tl.store(v_ptr + target, kv[2], mask=mask)
    tl.store(v_ptr + target + HALF, kv[3], mask=mask)


@triton.jit
def _gradient_store(total, ptr, offset, first, second, x_first, x_second, alpha, cos, sin, mask, HALF: tl.constexpr):
    """Gradient of one head's input; returns ``total`` plus its terms of alpha's gradient."""
    dy_first, dy_second = to_fp32(first), to_fp32(second)
    x_first, x_second = to_fp32(x_first), to_fp32(x_second)
    dz_first = (dy_first * cos + dy_second * sin) * tanh_slope(alpha * x_first)
    dz_second = (dy_second * cos - dy_first * sin) * tanh_slope(alpha * x_second)
    store_as(ptr + offset, dz_first * alpha, mask)
    store_as(ptr + offset + HALF, dz_second * alpha, mask)
    return total + (dz_first * x_first + dz_second * x_second)


@triton.jit
def _qkv_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, mixed_ptr, out_ptr, alpha_q_ptr, alpha_k_ptr, angle_ptr, alpha_gradient_ptr, pairs, pairs_of_position, angle_stride,
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """alpha_gradient_ptr: fp32 [2, programs], each program's sum for queries and for keys."""
    pair, row, column, mask = _place(pairs, PAIRS, HALF)
    angle = tl.load(angle_ptr + (pair // pairs_of_position).to(tl.int64) * angle_stride + column, mask=mask, other=0.0)
    joint = row * ((HEADS + 2) * 2 * HALF) + column
    single = row * (2 * HALF) + column
    k_at = joint + HEADS * 2 * HALF
    dk, k = _halves(dk_ptr, single, mask, HALF, 1), _halves(mixed_ptr, k_at, mask, HALF, 1)
    dv = _halves(dv_ptr, single, mask, HALF, 1)
    alpha_q, alpha_k = tl.load(alpha_q_ptr).to(tl.float32), tl.load(alpha_k_ptr).to(tl.float32)
    cos, sin = cos_sin(angle)
    total = tl.zeros([PAIRS, HALF], tl.float32)
    for head in range(0, HEADS, AT_ONCE):
        dy = _halves(dq_ptr, row * (HEADS * 2 * HALF) + column + head * 2 * HALF, mask, HALF, AT_ONCE)
        x = _halves(mixed_ptr, joint + head * 2 * HALF, mask, HALF, AT_ONCE)
        for i in tl.static_range(AT_ONCE):
            at = joint + (head + i) * 2 * HALF
            total = _gradient_store(total, out_ptr, at, dy[2 * i], dy[2 * i + 1], x[2 * i], x[2 * i + 1], alpha_q, cos, sin, mask, HALF)
    of_keys = _gradient_store(tl.zeros([PAIRS, HALF], tl.float32), out_ptr, k_at, dk[0], dk[1], k[0], k[1], alpha_k, cos, sin, mask, HALF)
    tl.store(out_ptr + k_at + 2 * HALF, dv[0], mask=mask)
    tl.store(out_ptr + k_at + 3 * HALF, dv[1], mask=mask)
    place = alpha_gradient_ptr + tl.program_id(0)
    tl.store(place, tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(place + tl.num_programs(0), tl.sum(tl.sum(of_keys, axis=1), axis=0))


@functools.cache
def options(heads_per_group: int, head: int, at_once: int) -> dict[str, int]:
    """Constants of the kernels. at_once: query heads in flight, at most (scripts/bench_fog.py sweeps it). Shared, not to be changed."""
    fitting = max(n for n in range(1, at_once + 1) if heads_per_group % n == 0)
    return {"HEADS": heads_per_group, "AT_ONCE": fitting, "HALF": head // 2, "PAIRS": TILE // (head // 2), "num_warps": 4}


def _check(mixed: torch.Tensor, alphas: tuple[torch.Tensor, torch.Tensor], angles: torch.Tensor, heads_per_group: int) -> tuple[int, int]:
    groups, head = check_qkv(mixed, alphas, angles, heads_per_group)
    check_device(mixed, "mixed")
    if head not in HEAD_SIZES:
        raise ValueError(f"heads of size {head}: the kernels take {', '.join(map(str, HEAD_SIZES))}. Use fp8_recipes.reference, which takes any")
    if mixed.shape[0] * groups >= 2**31:
        raise ValueError(f"mixed has {mixed.shape[0]} rows of {groups} groups; the kernels count less than 2**31 of them. Use smaller microbatches")
    return groups, head


def qkv_tanh_rotary(
    mixed: torch.Tensor, alpha_q: torch.Tensor, alpha_k: torch.Tensor, angles: torch.Tensor, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.qkv_tanh_rotary`, for heads of a size in `HEAD_SIZES` and angles up to `LARGEST_ANGLE`."""
    groups, head = _check(mixed, (alpha_q, alpha_k), angles, heads_per_group)
    rows = mixed.shape[0]
    q, k, v = (common.empty((rows, groups * heads * head), mixed.dtype, mixed.device) for heads in (heads_per_group, 1, 1))
    if rows:
        constants: dict[str, Any] = options(heads_per_group, head, FORWARD)
        pairs = rows * groups
        numbers = pairs, pairs // angles.shape[0], angles.stride(0)
        launch(_qkv_kernel, (cdiv(pairs, constants["PAIRS"]),), mixed, q, k, v, alpha_q, alpha_k, angles, *numbers, **constants)
    return q, k, v


def qkv_tanh_rotary_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    mixed: torch.Tensor,
    alpha_q: torch.Tensor,
    alpha_k: torch.Tensor,
    angles: torch.Tensor,
    heads_per_group: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel twin of `fp8_recipes.reference.qkv_tanh_rotary_backward`: (dmixed, dalpha_q, dalpha_k)."""
    groups, head = _check(mixed, (alpha_q, alpha_k), angles, heads_per_group)
    check_gradients((dq, dk, dv), mixed, groups, head, heads_per_group)
    out = common.empty(tuple(mixed.shape), mixed.dtype, mixed.device)
    if not mixed.shape[0]:
        return out, torch.zeros_like(alpha_q), torch.zeros_like(alpha_k)
    constants: dict[str, Any] = options(heads_per_group, head, BACKWARD)
    pairs = mixed.shape[0] * groups
    programs = cdiv(pairs, constants["PAIRS"])
    partial = common.empty((2, programs), torch.float32, mixed.device)
    numbers = pairs, pairs // angles.shape[0], angles.stride(0)
    launch(_qkv_backward_kernel, (programs,), dq, dk, dv, mixed, out, alpha_q, alpha_k, angles, partial, *numbers, **constants)
    sums = partial.sum(dim=1, dtype=torch.float64)
    return out, sums[0].to(alpha_q.dtype), sums[1].to(alpha_k.dtype)
