"""Grouped FP8 products: the rows of all experts in one buffer, one launch for all of them, sizes read on the device.

Every expert's group starts on a multiple of 128 rows, so a tile of 128 rows belongs to one expert, and so does a block of 128 along wgrad's contraction.
fprop and dgrad: the tile looks its expert up in ``block_expert`` and reads that expert's part of B through one descriptor over all experts [E * N, K]. wgrad:
the tiles of an expert walk over that expert's rows, ``offsets[e] .. offsets[e + 1]``. No copies to the host, no launch per expert; a table
of addresses only where wgrad's results are scattered in memory.

The kernels are the persistent GEMM of `kernels.gemm` (same tile order within a group, same promotion, same epilogue): one flat loop over the K blocks of all
tiles of a program, in which only the branch that starts a tile differs. Which tile a program computes is fixed by its number, and every element of the result
is written, or added to, by one program in a fixed order: two runs give the same bits.

Promotion in wgrad: a group is a dozen K blocks long, so the epilogue is not rare, and a second accumulator for promotion, which a 128 x 256 tile has no
registers for, is spilled at every tile. Where the result is added into fp32 (main_grad) the total is therefore kept there: after `promote` rows of a long group
the tile is added to main_grad and starts again from zero. Short groups, the common case, run as if there were no promotion. Where nothing is added and TMA
writes the result, half of the total is in shared memory (`grouped_promoted`). What is left (added into bf16, scattered, unaligned) takes the 128 x 128 tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..reference.grouped import GroupedTensor, Matrices, check_grouped_gemm, check_outs, check_wgrad_operands
from ..tensor import TILE, ScaledTensor
from . import common
from .common import INTERPRETED, cdiv, check_device, fetch, next_power_of_2
from .experts import known_set, table_pointer
from .gemm import _ALIGNMENT, _multiply, _multiprocessors, _tile_origin, _write
from .gemm_configs import BLOCK_K
from .grouped_configs import SMALL, GroupedConfig, adding, has_gluon, is_wide, promoting, select_config, storing
from .launch import launch, matrix_descriptor


@triton.jit
def _used_blocks(block_expert_ptr, blocks, CHUNK: tl.constexpr):
    """Number of used blocks: used ones come first, so it is also where the unused ones begin."""
    used = 0
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        used += tl.sum((tl.load(block_expert_ptr + block, mask=block < blocks, other=-1) >= 0).to(tl.int32))
    return used


@triton.jit(do_not_specialize=["K"])
def _grouped_gemm_kernel(
    a_desc,  # [rows, K] FP8
    b_desc,  # [E * N, K] FP8
    out_desc,  # [rows, N] bf16 or fp32; None when its alignment rules TMA out
    out_ptr,
    scale_a_ptr,  # [rows] fp32
    scale_b_ptr,  # [E] or [E, N] fp32
    block_expert_ptr,  # [rows / 128] int32
    rows,
    N,
    K,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # divides 128
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SUBTILES: tl.constexpr,
    PROMOTE: tl.constexpr,  # K blocks between promotions, 0 = never
    STRIDE_B: tl.constexpr,  # 1: one scale per output feature; 0: one per expert
    STORE: tl.constexpr,
):
    EARLY: tl.constexpr = PROMOTE <= 1 and STRIDE_B == 0  # a second accumulator, or a scale for every column, leaves no registers for the others to wait in
    tiles_m = _used_blocks(block_expert_ptr, rows // 128, 1024) * (128 // BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    mine = tl.cdiv(tiles_m * tiles_n - tl.program_id(0), PROGRAMS)
    tile = tl.program_id(0) - PROGRAMS
    m0 = 0
    row_b = 0
    k = -1
    scale_a = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PROMOTE > 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over the K blocks of all tiles: the loads of the next tile are issued before the epilogue of this one.
    for _ in range(mine * blocks_k):
        k = tl.where(k == blocks_k - 1, 0, k + 1)
        if k == 0:
            tile += PROGRAMS
            m0, n0 = _tile_origin(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
            e = tl.load(block_expert_ptr + m0 // 128)
            row_b = e * N + n0
            # Asked for while the tile is computed: its epilogue, in which no product runs, does not wait for them.
            if EARLY:
                scale_a = tl.load(scale_a_ptr + m0 + tl.arange(0, BLOCK_M)) * tl.load(scale_b_ptr + e)
            else:
                fetch(scale_a_ptr + m0, BLOCK_M, BLOCK_M)
                fetch(scale_b_ptr + (row_b if STRIDE_B else e), N - n0, BLOCK_N if STRIDE_B else 32)
        a = a_desc.load([m0, k * BLOCK_K])
        # Where BLOCK_N does not divide N this reads some rows of the next expert; their columns of the result lie beyond N and are not written.
        b = b_desc.load([row_b, k * BLOCK_K])
        acc = _multiply(a, b, acc, BLOCK_K, PROMOTE)
        if k == blocks_k - 1:
            if PROMOTE > 1:
                acc += total
            expert = row_b // N  # computed again: one register less across the loop
            if not EARLY:
                scale_a = tl.load(scale_a_ptr + m0 + tl.arange(0, BLOCK_M))
                if STRIDE_B == 0:
                    scale_a *= tl.load(scale_b_ptr + expert)
            first = expert * N
            _write(acc, out_desc, out_ptr, scale_a, scale_b_ptr + first if STRIDE_B else None, None, m0, row_b - first, rows, N,
                   BLOCK_M, BLOCK_N, SUBTILES, STORE, False)  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if PROMOTE > 1:
                total = acc
        elif PROMOTE > 1 and (k + 1) % PROMOTE == 0:
            total += acc
            acc -= acc  # zero, at half the instructions that the compiler spends on a constant one


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
            if ORDER == 0:
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


def _check_operand(payload: torch.Tensor, scale: torch.Tensor, name: str, device: torch.device) -> None:
    """What TMA and the kernels ask of an operand whose shape has been checked."""
    check_device(payload, name)
    if not payload.is_contiguous():
        raise ValueError(f"{name} of strides {payload.stride()} is not contiguous; call .contiguous()")
    if payload.shape[-1] % _ALIGNMENT or payload.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(payload.shape)} must end in a positive multiple of {_ALIGNMENT}, which TMA needs; pad K with zeros")
    if payload.data_ptr() % _ALIGNMENT:
        raise ValueError(f"{name} starts at address {payload.data_ptr():#x}, not a multiple of {_ALIGNMENT}; use .clone() of the view")
    if scale.dtype != torch.float32:
        raise TypeError(f"the scale of {name} must be float32, got {scale.dtype}")
    if not scale.is_contiguous():
        raise ValueError(f"the scale of {name} of strides {scale.stride()} is not contiguous; call .contiguous()")
    if payload.device != device or scale.device != device:
        found = sorted({str(t.device) for t in (payload, scale)} | {str(device)})
        raise ValueError(f"operands, scales and out must be on one device, got {found}")


def _check_result(dtype: torch.dtype, promote: int) -> None:
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"the result must be bfloat16 or float32, got {dtype}")
    if promote < 0 or promote % BLOCK_K:
        raise ValueError(f"promote={promote} must be 0 (never) or a multiple of {BLOCK_K}")


def _takes_tma(out: torch.Tensor, cols: int) -> bool:
    return out.data_ptr() % _ALIGNMENT == 0 and cols * out.element_size() % _ALIGNMENT == 0


def grouped_gemm(
    a: ScaledTensor,
    b: GroupedTensor,
    block_expert: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    promote: int = 0,
    config: GroupedConfig | None = None,
) -> torch.Tensor:
    """``y[m, n] = scale_a[m] * scale_b[e, n] * sum_k a[m, k] b[e, n, k]``, e = block_expert[m // 128]. Kernel twin of `reference.grouped.grouped_gemm`.

    a: [rows, K], row scales. b: [E, N, K], scale [E] or [E, N]. E4M3 or E5M2 (also mixed); K a multiple of 16, any N. block_expert: int32 [rows / 128] on
    the device; unused blocks (-1) come last. out: [rows, N] bf16 or fp32, new (of ``out_dtype``) unless given.
    Rows of unused blocks are left unwritten (a new result holds whatever was in memory there); padding rows of used blocks come out zero.
    promote: longest distance along K, a multiple of 128, between promotions of the accumulator to FP32; 0 = no limit. config: for benchmarks.
    """
    check_grouped_gemm(a, b, block_expert, out)
    device = a.device
    _check_operand(a.payload, a.scale, "a", device)
    _check_operand(b.payload, b.scale, "b", device)
    _check_result(out_dtype if out is None else out.dtype, promote)
    rows, k = a.payload.shape
    experts, n, _ = b.payload.shape
    out = common.empty((rows, n), out_dtype, device) if out is None else out
    programs = _multiprocessors(device)
    promote = promote if promote < k else 0
    if config is None:
        config = select_config(rows, n, programs)
        config = promoting(config) if promote > BLOCK_K else storing(config, out.element_size(), False)
    if TILE % config.block_m:
        raise ValueError(f"block_m={config.block_m} must divide {TILE}, the alignment of the experts' groups")
    by_tma = _takes_tma(out, n)
    programs = min(programs * config.resident, cdiv(rows, config.block_m) * cdiv(n, config.block_n))
    launch(
        _grouped_gemm_kernel,
        (programs,),
        matrix_descriptor(a.payload, rows, k, (config.block_m, BLOCK_K)),
        matrix_descriptor(b.payload, experts * n, k, (config.block_n, BLOCK_K)),
        matrix_descriptor(out, rows, n, (config.block_m, config.block_n // config.subtiles)) if by_tma else None,
        out,
        a.scale,
        b.scale,
        block_expert,
        rows,
        n,
        k,
        PROGRAMS=programs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=BLOCK_K,
        GROUP=config.group,
        SUBTILES=config.subtiles,
        PROMOTE=promote // BLOCK_K,
        STRIDE_B=int(b.scale.dim() == 2),
        STORE="tma" if by_tma else "pointer",
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


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
    promote > 128 without accumulate, into what TMA writes: `grouped_promoted` on Hopper with Triton 3.6, if config is None or 128 x 256 (at most 3 stages).
    """
    check_wgrad_operands(a_t, b_t, offsets)
    (n, rows), k, experts, device = a_t.payload.shape, b_t.payload.shape[0], a_t.scale.shape[0], a_t.device
    first, order, table, aligned = _placed(out, experts, (n, k))
    _check_operand(a_t.payload, a_t.scale, "a_t", device)
    _check_operand(b_t.payload, b_t.scale, "b_t", device)
    _check_result(first.dtype, promote)
    if first.device != device:
        raise ValueError(f"out is on {first.device}, the operands are on {device}; keep them together")
    programs = _multiprocessors(device)
    promote = promote if promote < rows else 0
    in_out = accumulate and first.dtype == torch.float32 and promote > BLOCK_K
    aligned_run = order != 0 and _takes_tma(first, k)
    if promote > BLOCK_K and not accumulate and aligned_run and is_wide(config) and has_gluon(device):
        from .grouped_promoted import promoted_wgrad  # Gluon is no part of older Tritons

        promoted_wgrad(a_t, b_t, offsets, first, order, promote, config, programs)
        return out
    if config is None:  # a total in registers beside the accumulator fits the small tile only
        config = SMALL if promote > BLOCK_K and not in_out else select_config(experts * n, k, programs)
        config = adding(config) if accumulate and first.dtype == torch.float32 else storing(config, first.element_size(), accumulate)
    # A TMA box that crosses an expert's last output row would write into the next expert.
    by_tma = aligned_run and n % config.block_m == 0
    store = "tma" if by_tma else "pointer"
    if accumulate and first.dtype == torch.float32 and config.store != "add":
        store = config.store if by_tma else "atomic"
    programs = min(programs * config.resident, experts * cdiv(n, config.block_m) * cdiv(k, config.block_n))
    launch(
        _grouped_wgrad_kernel,
        (programs,),
        matrix_descriptor(a_t.payload, n, rows, (config.block_m, BLOCK_K)),
        matrix_descriptor(b_t.payload, k, rows, (config.block_n, BLOCK_K)),
        matrix_descriptor(first, experts * n, k, (config.block_m, config.block_n // config.subtiles)) if store in ("tma", "reduce") else None,
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=BLOCK_K,
        GROUP=config.group,
        SUBTILES=config.subtiles,
        PROMOTE=promote // BLOCK_K,
        IN_OUT=in_out,
        STORE=store,
        ACCUMULATE=accumulate,
        ORDER=order,
        ALIGNED=aligned,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
