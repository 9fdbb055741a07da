"""wgrad of experts whose sums are promoted in registers: a total beside the accumulator, for a result that is no fp32 main_grad.

(Where the result is added into fp32, `grouped_gemm` keeps the total there.) Accumulator and total of a 128 x 128 tile fit the registers, but eight warps that
compute it in step wait at the barriers of every K block about as long as the block takes. Here Triton specialises the warps of the loop over tiles
(``warp_specialize``): one group of them loads, by TMA and as far ahead as there are stages, also across tiles; two others multiply, 64 rows each, and wait for
nothing but their operands, one while the other writes. Written as plain nested loops, which is what that pass understands.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..reference.grouped import GroupedTensor
from .common import cdiv
from .experts import table_pointer
from .gemm import _tile_origin
from .gemm_configs import BLOCK_K
from .grouped_configs import GroupedConfig
from .launch import launch, matrix_descriptor

PROMOTED = GroupedConfig(128, 128, stages=6, subtiles=1, warps=4)
"""warps: of one group that multiplies; Triton adds the others."""


@triton.jit(do_not_specialize=["N"])
def _promoted_wgrad_kernel(
    a_desc,  # [N, rows] FP8
    b_desc,  # [K, rows] FP8
    out_ptr,  # fp32 or bf16
    table_ptr,  # [E] addresses of the experts' results, used where ORDER is 0
    scale_a_ptr,  # [E, N] fp32
    scale_b_ptr,  # [E, K] fp32
    offsets_ptr,  # [E + 1] int32
    experts,
    N,
    K,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTE: tl.constexpr,  # rows between promotions
    ACCUMULATE: tl.constexpr,
    ORDER: tl.constexpr,  # of the experts in out: 1 ascending, -1 descending, 0 each somewhere
    ALIGNED: tl.constexpr,  # do all addresses of the table allow vectors?
    SPECIALISE: tl.constexpr,
):
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    per_expert = tiles_m * tiles_n
    for tile in tl.range(tl.program_id(0), experts * per_expert, PROGRAMS, warp_specialize=SPECIALISE):
        expert = tile // per_expert
        m0, n0 = _tile_origin(tile % per_expert, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
        start = tl.load(offsets_ptr + expert)
        stop = tl.load(offsets_ptr + expert + 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(start, stop, PROMOTE):
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for row in range(first, min(first + PROMOTE, stop), BLOCK_K):
                a = a_desc.load([m0, row])
                b = b_desc.load([n0, row])
                acc = tl.dot(a, b.T, acc)
            total += acc
        feature = m0 + tl.arange(0, BLOCK_M)
        column = n0 + tl.arange(0, BLOCK_N)
        scale_a = tl.load(scale_a_ptr + expert * N + feature, mask=feature < N, other=0.0)
        scale_b = tl.load(scale_b_ptr + expert * K + column, mask=column < K, other=0.0)
        y = total * scale_a[:, None] * scale_b[None, :]
        if ORDER == 0:
            matrix = table_pointer(table_ptr, expert, out_ptr, ALIGNED)
        else:
            place = expert if ORDER == 1 else experts - 1 - expert
            matrix = out_ptr + place.to(tl.int64) * N * K
        pointer = matrix + feature.to(tl.int64)[:, None] * K + column[None, :]
        inside = (feature < N)[:, None] & (column < K)[None, :]
        if ACCUMULATE:
            y += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointer, y.to(out_ptr.dtype.element_ty), mask=inside)


def promoted_wgrad(
    a_t: GroupedTensor,
    b_t: GroupedTensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    order: int,
    table: torch.Tensor | None,
    aligned: bool,
    accumulate: bool,
    promote: int,
    config: GroupedConfig,
    programs: int,
) -> None:
    """`grouped_wgrad` after its checks. out: the matrix that comes first in memory; order, table, aligned: where the others are. programs: multiprocessors."""
    (n, rows), k, experts = a_t.payload.shape, b_t.payload.shape[0], a_t.scale.shape[0]
    if out.element_size() > 2 and config is PROMOTED:
        config = replace(config, stages=4)  # the wider tile passes through shared memory
    programs = min(programs, experts * cdiv(n, config.block_m) * cdiv(k, config.block_n))
    launch(
        _promoted_wgrad_kernel,
        (programs,),
        matrix_descriptor(a_t.payload, n, rows, (config.block_m, BLOCK_K)),
        matrix_descriptor(b_t.payload, k, rows, (config.block_n, BLOCK_K)),
        out,
        table,
        a_t.scale,
        b_t.scale,
        offsets,
        experts,
        n,
        k,
        PROGRAMS=programs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=BLOCK_K,
        GROUP=config.group,
        PROMOTE=promote,
        ACCUMULATE=accumulate,
        ORDER=order,
        ALIGNED=aligned,
        SPECIALISE=config.block_m == PROMOTED.block_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
