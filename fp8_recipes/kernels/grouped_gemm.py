"""Grouped FP8 products: the rows of all experts in one buffer, one launch for all of them, sizes read on the device.

Every expert's group starts on a multiple of 128 rows, so a tile of 128 rows belongs to one expert, and so does a block of 128 along wgrad's contraction
(`grouped_wgrad`). fprop and dgrad, here: the tile looks its expert up in ``block_expert`` and reads that expert's part of B through one descriptor over all
experts [E * N, K]. No copies to the host, no launch per expert.

On Hopper with Triton 3.6 `grouped_promoted` computes promoted sums that TMA writes. The kernel here computes the rest. It is the persistent GEMM of
`kernels.gemm` (same tile order within a group, same promotion, same epilogue): one flat loop over the K blocks of all tiles of a program, in which only the
branch that starts a tile differs. Which tile a program computes is fixed by its number, and every element of the result is written, or added to, by one program
in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.gemm import check_result
from ..reference.grouped import GroupedTensor, check_grouped_gemm
from ..tensor import TILE, ScaledTensor
from . import common
from .common import cdiv, check_device, fetch
from .gemm import _ALIGNMENT, _multiply, _multiprocessors, _tile_origin, _write
from .gemm_configs import BLOCK_K
from .grouped_configs import GroupedConfig, in_gluon, promoting, select_config, storing
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


def check_operand(payload: torch.Tensor, scale: torch.Tensor, name: str, device: torch.device) -> None:
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


def takes_tma(out: torch.Tensor, cols: int) -> bool:
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
    check_operand(a.payload, a.scale, "a", device)
    check_operand(b.payload, b.scale, "b", device)
    check_result(out_dtype if out is None else out.dtype, promote)
    rows, k = a.payload.shape
    experts, n, _ = b.payload.shape
    out = common.empty((rows, n), out_dtype, device) if out is None else out
    programs = _multiprocessors(device)
    promote = promote if promote < k else 0
    by_tma = takes_tma(out, n)
    tile = config or select_config(rows, n, programs)
    if by_tma and in_gluon(tile, promote, device):
        from .grouped_promoted import promoted_gemm  # Gluon is no part of older Tritons

        promoted_gemm(a, b, block_expert, out, promote, tile, programs)
        return out
    if config is None:
        config = promoting(tile) if promote > BLOCK_K else storing(tile, out.element_size(), False)
    if TILE % config.block_m:
        raise ValueError(f"block_m={config.block_m} must divide {TILE}, the alignment of the experts' groups")
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
        PROMOTE=promote // BLOCK_K,
        STRIDE_B=int(b.scale.dim() == 2),
        STORE="tma" if by_tma else "pointer",
        **config.constants,
    )
    return out
