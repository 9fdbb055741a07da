"""The experts' weights in one launch: `fp8_recipes.reference.quantize_experts` and `measure_experts`, bit for bit.

The weights are separate parameters, so the kernels find them through a table of their addresses on the device, made once for a set of addresses and kept:
later calls copy nothing and wait for nothing. Bytes moved per weight: 2 in, 1 out (measuring: 2 in).

Row-major, an expert is one run of values. Transposed, a program takes 128 x 64 values and rounds four rows of a column straight into one word of the result,
so that only words travel through shared memory (as `kernels.fold_transpose` does for a single weight).
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..formats import E4M3, Format
from ..reference.experts import check_expert_amax, check_experts
from ..reference.grouped import GroupedTensor
from . import common
from .common import cdiv, check_device, encode, finite_or_nan, is_e5m2, pow2, to_fp32
from .launch import launch
from .quantize import given_exponent
from .words import pack_4

ALIGNMENT = 16
"""Bytes of the widest load. Weights that start elsewhere are read in smaller pieces."""


@dataclass(frozen=True)
class ExpertPlan:
    """Sizes of a program; scripts/bench_grouped.py --experts sweeps them. block: values of a row-major program. rows, cols: tile of a transposing one."""

    block: int = 8192
    rows: int = 128
    cols: int = 64
    warps: int = 4


PLAN = ExpertPlan()
MEASURE_BLOCK = 4096
MEASURE_PROGRAMS = 1056
"""Of a measurement, over all experts: eight for each of 132 multiprocessors."""


@functools.lru_cache(maxsize=4096)
def _table(device: torch.device, addresses: tuple[int, ...]) -> tuple[torch.Tensor, bool]:
    """(the addresses on the device, int64 [L]; do all allow 16-byte loads?). The content is the key, so an entry is never out of date."""
    return torch.tensor(addresses, dtype=torch.int64, device=device), all(a % ALIGNMENT == 0 for a in addresses)


@dataclass(frozen=True)
class ExpertSet:
    """One tensor per expert that was checked, and where the tensors lay then. ``references`` are weak: the first tensor carries this."""

    references: tuple[weakref.ref[torch.Tensor], ...]
    kind: tuple[Any, ...]
    addresses: tuple[int, ...]

    @functools.cached_property
    def table(self) -> tuple[torch.Tensor, bool]:
        """(the addresses on the device, int64 [L]; do all allow 16-byte loads?). The first use of a set of addresses copies it and waits for the copy."""
        return _table(self.kind[2], self.addresses)

    @functools.cached_property
    def order(self) -> int:
        """Do tensors of one size make one run of memory? 1: in their order, -1: in reverse (as Megatron lays out gradients), 0: no."""
        nbytes = math.prod(self.kind[0]) * self.kind[1].itemsize
        steps = {b - a for a, b in itertools.pairwise(self.addresses)}
        return 1 if steps <= {nbytes} else -1 if steps == {-nbytes} else 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the tensor that carries this, or a checkpoint of it, knows nothing."""
        return type(None), ()


def known_set(tensors: Sequence[torch.Tensor], check: Callable[[], object], name: str) -> ExpertSet:
    """What is known of one tensor per expert; ``check()``, which raises unless they fit, runs when anything about them is new.

    New is: another tensor object, another address, another shape, dtype, device or strides of the first. Asking every one of 64 tensors for all of that takes
    longer than a kernel; 64 addresses take 3 us. name: attribute of the first tensor that carries the answer, one per kind of check.
    """
    first = tensors[0]
    addresses = tuple(map(torch.Tensor.data_ptr, tensors))
    kind = (first.shape, first.dtype, first.device, first.stride())
    known: ExpertSet | None = first.__dict__.get(name)
    if known is not None and known.addresses == addresses and known.kind == kind and all([r() is t for r, t in zip(known.references, tensors, strict=True)]):
        return known
    check()
    known = ExpertSet(tuple(map(weakref.ref, tensors)), kind, addresses)
    setattr(first, name, known)
    return known


def _known_weights(weights: Sequence[torch.Tensor]) -> ExpertSet:
    """`known_set` of L experts' weights, `check_experts` being the check."""
    if isinstance(weights, torch.Tensor) or len(weights) == 0:
        check_experts(weights)  # raises
    return known_set(weights, lambda: check_experts(weights), "fp8_experts_weights")


@triton.jit
def table_pointer(table_ptr, expert, like_ptr, ALIGNED: tl.constexpr):
    """Start of an expert's matrix, a pointer of the type of ``like_ptr``."""
    pointer = tl.load(table_ptr + expert).to(like_ptr.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _quantize_experts_kernel(
    like_ptr,  # any of the weights, for its type
    table_ptr,  # [L] int64
    payload_ptr,  # [L, numel] uint8
    scale_ptr,  # [L]
    amax_ptr,  # [L]
    increment,
    numel,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    E5M2: tl.constexpr,
):
    expert = tl.program_id(1)
    source = table_pointer(table_ptr, expert, like_ptr, ALIGNED)
    exponent = given_exponent(amax_ptr + expert, increment, E5M2)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    x = to_fp32(tl.load(source + offset, mask=mask, other=0.0))
    payload_ptr += expert.to(tl.int64) * numel
    tl.store(payload_ptr + offset, encode(finite_or_nan(x * pow2(-exponent)), E5M2), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + expert, pow2(exponent))


@triton.jit
def _quantize_experts_transposed_kernel(
    like_ptr,
    table_ptr,
    out_ptr,  # [L, cols, rows / 4] int32
    scale_ptr,
    amax_ptr,
    increment,
    rows,
    cols,
    TR: tl.constexpr,
    TC: tl.constexpr,
    ALIGNED: tl.constexpr,
    E5M2: tl.constexpr,
):
    """Every weight [rows, cols] -> payload words [cols, rows / 4]; rows is a multiple of 4."""
    col_blocks = (cols + TC - 1) // TC
    expert = tl.program_id(1)
    row_block, col_block = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    source = table_pointer(table_ptr, expert, like_ptr, ALIGNED)
    exponent = given_exponent(amax_ptr + expert, increment, E5M2)
    inverse = pow2(-exponent)
    quad = row_block * (TR // 4) + tl.arange(0, TR // 4)[:, None]  # four rows, one word of the result
    column = col_block * TC + tl.arange(0, TC)[None, :]
    mask = (quad < rows // 4) & (column < cols)
    source += quad.to(tl.int64) * 4 * cols + column
    x0 = finite_or_nan(to_fp32(tl.load(source, mask=mask, other=0.0)) * inverse)
    x1 = finite_or_nan(to_fp32(tl.load(source + cols, mask=mask, other=0.0)) * inverse)
    x2 = finite_or_nan(to_fp32(tl.load(source + 2 * cols, mask=mask, other=0.0)) * inverse)
    x3 = finite_or_nan(to_fp32(tl.load(source + 3 * cols, mask=mask, other=0.0)) * inverse)
    out_quad = row_block * (TR // 4) + tl.arange(0, TR // 4)[None, :]
    out_column = col_block * TC + tl.arange(0, TC)[:, None]
    out = out_ptr + (expert.to(tl.int64) * cols + out_column) * (rows // 4) + out_quad
    tl.store(out, tl.trans(pack_4(x0, x1, x2, x3, E5M2)), mask=(out_quad < rows // 4) & (out_column < cols))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + expert, pow2(exponent))


@triton.jit
def _measure_experts_kernel(like_ptr, table_ptr, partial_ptr, numel, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Largest finite |w| of every num_programs-th block of one expert: partial [L, programs] fp32."""
    expert = tl.program_id(1)
    source = table_pointer(table_ptr, expert, like_ptr, ALIGNED)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    best = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, stride):
        offset = start + tl.arange(0, BLOCK)
        x = tl.abs(finite_or_nan(to_fp32(tl.load(source + offset, mask=offset < numel, other=0.0))))
        best = tl.maximum(best, tl.where(x == x, x, 0.0))
    tl.store(partial_ptr + expert * tl.num_programs(0) + tl.program_id(0), tl.max(best, axis=0))


def measure_experts(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.measure_experts`: largest finite |w| of every expert, [L] fp32, one read."""
    known = _known_weights(weights)
    check_device(weights[0], "weights[0]")
    table, aligned = known.table
    experts, (n, k) = len(weights), weights[0].shape
    programs = min(cdiv(n * k, MEASURE_BLOCK), cdiv(MEASURE_PROGRAMS, experts))
    partial = common.empty((experts, programs), torch.float32, weights[0].device)
    launch(_measure_experts_kernel, (programs, experts), weights[0].detach(), table, partial, n * k, BLOCK=MEASURE_BLOCK, ALIGNED=aligned)
    return partial.amax(dim=1)


def quantize_experts(
    weights: Sequence[torch.Tensor],
    amax: torch.Tensor,
    increment: float = 0.0,
    fmt: Format = E4M3,
    *,
    transpose: bool = False,
    plan: ExpertPlan = PLAN,
) -> GroupedTensor:
    """Kernel twin of `fp8_recipes.reference.quantize_experts`: payload [L, N, K] (transposed [L, K, N]), scale [L]. plan: for benchmarks."""
    known = _known_weights(weights)
    first = weights[0]
    experts, (n, k) = len(weights), first.shape
    check_device(first, "weights[0]")
    check_expert_amax(amax, experts, first.device)
    table, aligned = known.table
    scale = common.empty((experts,), torch.float32, first.device)
    options = {"ALIGNED": aligned, "E5M2": is_e5m2(fmt), "num_warps": plan.warps}
    if transpose and n % 4 == 0:
        words = common.empty((experts, k, n // 4), torch.int32, first.device)
        grid = (cdiv(n, plan.rows) * cdiv(k, plan.cols), experts)
        tile = {"TR": plan.rows, "TC": plan.cols}
        launch(_quantize_experts_transposed_kernel, grid, first, table, words, scale, amax, float(increment), n, k, **tile, **options)
        return GroupedTensor(words.view(fmt.dtype), scale)
    payload = common.empty((experts, n, k), torch.uint8, first.device)
    grid = (cdiv(n * k, plan.block), experts)
    launch(_quantize_experts_kernel, grid, first, table, payload, scale, amax, float(increment), n * k, BLOCK=plan.block, **options)
    if transpose:  # the transposing kernel writes 4 bytes at a time; no product takes such a weight anyway
        payload = payload.transpose(1, 2).contiguous()
    return GroupedTensor(payload.view(fmt.dtype), scale)
