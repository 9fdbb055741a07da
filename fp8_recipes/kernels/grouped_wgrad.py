"""Grouped FP8 wgrad: the tiles of an expert walk over that expert's rows, ``offsets[e] .. offsets[e + 1]``; otherwise as `grouped_gemm`.

Results lie one after the other in memory, in either direction, or anywhere: then a table of their addresses is made. Where fewer tiles cover the transpose of a
new bf16 result, the transpose is computed, and turned round as it goes to shared memory.

Promotion: a group is a dozen K blocks long, so the epilogue is not rare, and a second accumulator for promotion, which a 128 x 256 tile has no registers for,
is spilled at every tile. `grouped_promoted` has room for one, on Hopper with Triton 3.6, where TMA writes the result or adds to it. Otherwise, where the result
is added into fp32 (main_grad), the total is kept there: after `promote` rows of a long group the tile is added to main_grad and starts again from zero; groups
that are short on average take that way too, as promotion is rare in them. What is left (added into bf16, scattered, unaligned) takes the 128 x 128 tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference.gemm import check_result
from ..reference.grouped import GroupedTensor, Matrices, check_outs, check_wgrad_operands
from .common import INTERPRETED, cdiv, fetch, next_power_of_2
from .experts import known_set, table_pointer
from .gemm import _multiply, _multiprocessors, _tile_origin, _write
from .gemm_configs import BLOCK_K
from .grouped_configs import SMALL, GroupedConfig, adding, better_swapped, in_gluon, select_config, storing
from .grouped_gemm import check_operand, takes_tma
from .launch import launch, matrix_descriptor


@triton.jit
def _wait_for_stores():
    """Until what this thread handed to TMA has been written (Triton itself waits only until the buffer has been read)."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("cp.async.bulk.wait_group 0; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _tiles_below(bound, PROGRAMS: tl.constexpr):
    """How many of this program's tiles have a number below ``bound``."""
    return (bound - tl.program_id(0) + PROGRAMS - 1) // PROGRAMS


@triton.jit(do_not_specialize=["N"])
def _grouped_wgrad_kernel(
    a_desc,  # [N, rows] FP8
    b_desc,  # [K, rows] FP8
    out_desc,  # [E * N, K] fp32 or bf16; None when TMA does not write it
    out_ptr,
    table_ptr,  # [E] addresses of the experts' results, used where ORDER is 0
    scale_a_ptr,  # [E, N] fp32
    scale_b_ptr,  # [E, K] fp32
    offsets_ptr,  # [E + 1] int32
    experts,
    rows,
    N,
    K,
    EXPERTS: tl.constexpr,  # power of two >= experts
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SUBTILES: tl.constexpr,
    PROMOTE: tl.constexpr,
    IN_OUT: tl.constexpr,  # does promotion add to out (then ACCUMULATE), or to a total in registers?
    STORE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ORDER: tl.constexpr,  # of the experts in out: 1 ascending, -1 descending, 0 each somewhere
    ALIGNED: tl.constexpr,  # do all addresses of the table allow vectors?
    SWAPPED: tl.constexpr,  # is what is computed the transpose of out?
):
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    per_expert = tiles_m * tiles_n
    # An expert without rows counts as one block, read beyond the end of the buffer, where TMA reads zeros.
    e = tl.arange(0, EXPERTS)
    first = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    beyond = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    blocks = tl.where(e < experts, tl.maximum((beyond - first) // BLOCK_K, 1), 0)
    steps = tl.sum(blocks * (_tiles_below((e + 1) * per_expert, PROGRAMS) - _tiles_below(e * per_expert, PROGRAMS)))
    tile = tl.program_id(0) - PROGRAMS
    m0, n0, expert, row, k, last = 0, 0, 0, 0, 0, 0
    finish = 0  # the block after which the tile is written: the last one, or none
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PROMOTE > 1 and not IN_OUT:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(steps):
        k = tl.where(k == last, 0, k + 1)
        if k == 0:
            tile += PROGRAMS
            expert = tile // per_expert
            m0, n0 = _tile_origin(tile % per_expert, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
            start = tl.load(offsets_ptr + expert)
            stop = tl.load(offsets_ptr + expert + 1)
            empty = start == stop
            row = tl.where(empty, rows, start)
            last = tl.maximum((stop - start) // BLOCK_K, 1) - 1
            # Nothing to add: the product of zeros leaves the accumulator at zero for the next tile. (A branch around the epilogue would stall the products.)
            finish = tl.where(empty, -1, last) if ACCUMULATE else last
            if not ACCUMULATE:  # (whose epilogue waits for its additions)
                fetch(scale_a_ptr + expert * N + m0, N - m0, BLOCK_M)
                fetch(scale_b_ptr + expert * K + n0, K - n0, BLOCK_N)
        a = a_desc.load([m0, row + k * BLOCK_K])
        b = b_desc.load([n0, row + k * BLOCK_K])
        acc = _multiply(a, b, acc, BLOCK_K, PROMOTE)
        write = k == finish
        if IN_OUT:
            write = write | ((k + 1) % PROMOTE == 0)
        if write:
            if IN_OUT:
                if STORE == "reduce" and k >= PROMOTE:
                    _wait_for_stores()  # of the last promotion of this tile: additions to an element stay in order, as a thread's own do by themselves
            elif PROMOTE > 1:
                acc += total
            feature = m0 + tl.arange(0, BLOCK_M)
            scale_a = tl.load(scale_a_ptr + expert * N + feature, mask=feature < N, other=0.0)
            if SWAPPED:
                place = expert if ORDER == 1 else experts - 1 - expert
                y = acc * scale_a[:, None]
                column = n0 + tl.arange(0, BLOCK_N)
                y *= tl.load(scale_b_ptr + expert * K + column, mask=column < K, other=0.0)[None, :]
                out_desc.store([place * K + n0, m0], y.to(out_desc.dtype).T)
            elif ORDER == 0:
                matrix = table_pointer(table_ptr, expert, out_ptr, ALIGNED)
                _write(acc, None, matrix, scale_a, scale_b_ptr + expert * K, None, m0, n0, N, K,
                       BLOCK_M, BLOCK_N, SUBTILES, STORE, ACCUMULATE)  # fmt: skip
            else:
                place = expert if ORDER == 1 else experts - 1 - expert
                _write(acc, out_desc, out_ptr, scale_a, scale_b_ptr + expert * K, None, place * N + m0, n0, (place + 1) * N, K,
                       BLOCK_M, BLOCK_N, SUBTILES, STORE, ACCUMULATE)  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if PROMOTE > 1 and not IN_OUT:
                total = acc
        elif PROMOTE > 1 and not IN_OUT and (k + 1) % PROMOTE == 0:
            total += acc
            acc -= acc


def _placed(out: torch.Tensor | Sequence[torch.Tensor], experts: int, shape: tuple[int, int]) -> tuple[torch.Tensor, int, torch.Tensor | None, bool]:
    """(the matrix that comes first in memory, order of the experts in memory, table of addresses where that is 0, may it be written in vectors?), checked."""
    if isinstance(out, torch.Tensor) or len(out) != experts or out[0].shape != shape:
        check_outs(out, experts, shape)
    if isinstance(out, torch.Tensor):
        return out, 1, None, True
    known = known_set(out, lambda: check_outs(out, experts, shape), "fp8_experts_results")
    if known.order == 0:
        return out[0], 0, *known.table
    return out[0 if known.order == 1 else -1], known.order, None, True


def _result_descriptor(first: torch.Tensor, experts: int, n: int, k: int, config: GroupedConfig, swapped: bool) -> Any:
    """Of the experts' results of [n, k], or of their transposes, which leave as whole tiles."""
    if swapped:
        return matrix_descriptor(first, experts * k, n, (config.block_n, config.block_m))
    return matrix_descriptor(first, experts * n, k, (config.block_m, config.block_n // config.subtiles))


def grouped_wgrad(
    a_t: GroupedTensor,
    b_t: GroupedTensor,
    offsets: torch.Tensor,
    *,
    out: Matrices,
    accumulate: bool = False,
    promote: int = 0,
    config: GroupedConfig | None = None,
) -> Matrices:
    """``out[e] (+)= scale_a[e, :, None] * scale_b[e] * (a_t[:, rows of e] @ b_t[:, rows of e]^T)``. Kernel twin of `reference.grouped.grouped_wgrad`.

    a_t: [N, rows], b_t: [K, rows], scales [E, N] and [E, K] (`grouped_fold_transpose`), E4M3 or E5M2 (also mixed). offsets: int32 [E + 1] on the device,
    multiples of 128. out: [E, N, K] fp32 or bf16, or E contiguous [N, K] tensors anywhere in memory (main_grad), overwritten or, with accumulate=True, added
    to (in fp32, rounded once). Tensors that lie one after the other, in either direction, are written like one (by TMA); others through a table of addresses.
    Experts without rows: zeros, or with accumulate=True left alone. Rows beyond offsets[E] are not read. promote, config: as in `grouped_gemm`, along the rows.
    Which kernel adds promoted sums depends on the average group, rows / E: main_grads of the same groups can differ in the last bit between buffers of
    different length. The same call gives the same bits.
    """
    check_wgrad_operands(a_t, b_t, offsets)
    (n, rows), k, experts, device = a_t.payload.shape, b_t.payload.shape[0], a_t.scale.shape[0], a_t.device
    first, order, table, aligned = _placed(out, experts, (n, k))
    check_operand(a_t.payload, a_t.scale, "a_t", device)
    check_operand(b_t.payload, b_t.scale, "b_t", device)
    check_result(first.dtype, promote)
    if first.device != device:
        raise ValueError(f"out is on {first.device}, the operands are on {device}; keep them together")
    programs = _multiprocessors(device)
    promote = promote if promote < rows else 0
    adds = accumulate and first.dtype == torch.float32
    in_out = adds and promote > BLOCK_K
    aligned_run = order != 0 and takes_tma(first, k)
    swapped = config is None and aligned_run and not accumulate and first.dtype == torch.bfloat16 and better_swapped(n, k)
    if swapped:
        a_t, b_t, n, k = b_t, a_t, k, n
    tile = config or select_config(experts * n, k, programs)
    long_groups = rows > promote * experts  # in short ones nothing is promoted, and Triton's epilogue is the faster one
    if aligned_run and (adds and long_groups or not accumulate) and in_gluon(tile, promote, device):
        from .grouped_promoted import promoted_wgrad

        promoted_wgrad(a_t, b_t, offsets, first, order, accumulate, swapped, promote, tile, programs)
        return out
    if config is None:  # a total in registers beside the accumulator fits the small tile only
        config = SMALL if promote > BLOCK_K and not in_out else tile
        config = adding(config) if adds else storing(config, first.element_size(), accumulate)
    # A TMA box that crosses an expert's last output row would write into the next expert.
    by_tma = aligned_run and (swapped or n % config.block_m == 0)
    store = "tma" if by_tma else "pointer"
    if adds and config.store != "add":
        store = config.store if by_tma else "atomic"
    programs = min(programs * config.resident, experts * cdiv(n, config.block_m) * cdiv(k, config.block_n))
    launch(
        _grouped_wgrad_kernel,
        (programs,),
        matrix_descriptor(a_t.payload, n, rows, (config.block_m, BLOCK_K)),
        matrix_descriptor(b_t.payload, k, rows, (config.block_n, BLOCK_K)),
        _result_descriptor(first, experts, n, k, config, swapped) if store in ("tma", "reduce") else None,
        first,
        table,
        a_t.scale,
        b_t.scale,
        offsets,
        experts,
        rows,
        n,
        k,
        EXPERTS=next_power_of_2(experts),
        PROGRAMS=programs,
        PROMOTE=promote // BLOCK_K,
        IN_OUT=in_out,
        STORE=store,
        ACCUMULATE=accumulate,
        ORDER=order,
        ALIGNED=aligned,
        SWAPPED=swapped,
        **config.constants,
    )
    return out
