"""FP8 GEMM on Hopper, scales in the epilogue. Three backends, chosen by the arguments alone, in this order:

1. **cuBLASLt** called directly (`cublaslt`): the library kernels at the speed of the hardware, with the algorithm searched once per kind of product.
   ``torch._scaled_mm`` searches at every call, a tenth of a millisecond on the host, and does not hand out fp32 results, accumulation or E5M2 x E5M2.
   `sums_fast` picks the accumulator.
2. **torch._scaled_mm** for what has a bf16 bias or two per-tensor scales.
3. **A persistent Triton kernel** for the rest: a bias in another dtype, shapes for which cuBLASLt has no algorithm. It promotes the accumulator at a chosen
   distance. One program per multiprocessor walks over output tiles; TMA loads of the next tile are in flight while the last one is written.

Measured on one H200, accumulating into fp32 (one early job): the library does 1155 to 1340 TFLOP/s with its split accumulator on the wgrad shapes of a 7B, the
Triton kernel 1055 to 1300 with promotion every 2048. At 1024x2816x65536 the order is reversed (969 against 1096); the choice does not know that yet.

Hopper's FP8 matrix unit keeps about 14 bits of its accumulator. Promotion adds it to an FP32 total in registers every `promote` elements of K and clears it.
Total and accumulator of a 128 x 256 tile take 256 registers per thread where 255 exist, so promotion sits under an ``if`` in one flat loop: the compiler then
spills a few values inside that rare branch only, and loads and products keep streaming across it. (A nested loop per promotion drains the pipeline every time.)

Accumulating into fp32 leaves the addition to L2: the tile is sent once, by TMA's reduction or by vector reductions. Every element is added to exactly once
per call, so the result does not depend on the order of the programs: two runs give the same bits. (That adder flushes subnormal fp32 numbers to zero.)
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formats import E4M3, format_of
from ..reference.gemm import check_product, check_result
from ..tensor import ScaledTensor
from . import cublaslt
from .gemm_configs import BLOCK_K, GemmConfig, select_config
from .launch import launch

_ALIGNMENT = 16
"""Bytes: TMA's alignment of base addresses and row strides."""


@triton.jit
def _tile_origin(tile, tiles_m, tiles_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of output tile number `tile`: columns of tiles GROUP high, so that neighbours in time share operands in L2."""
    band = GROUP * tiles_n
    first = tile // band * GROUP
    height = min(tiles_m - first, GROUP)
    inside = tile % band
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _multiply(a, b, acc, BLOCK_K: tl.constexpr, PROMOTE: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] + a [BLOCK_M, BLOCK_K] @ b^T. At every block the compiler's own promotion serves (a branch for it would have no other side)."""
    if PROMOTE == 1:
        return tl.dot(a, b.T, acc, max_num_imprecise_acc=BLOCK_K)
    else:
        return tl.dot(a, b.T, acc)


@triton.jit
def _write(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    out_desc,
    out_ptr,
    scale_a,  # [BLOCK_M] fp32
    scale_b_ptr,  # one scale per column; None where it is in scale_a already
    bias_ptr,
    m0,
    n0,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
    STORE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Epilogue: scales, bias, then into ``out`` at (m0, n0) in SUBTILES column slices."""
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _write(left, out_desc, out_ptr, scale_a, scale_b_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, HALF, SUBTILES // 2, STORE, ACCUMULATE)
        _write(right, out_desc, out_ptr, scale_a, scale_b_ptr, bias_ptr, m0, n0 + HALF, M, N, BLOCK_M, HALF, SUBTILES // 2, STORE, ACCUMULATE)
    else:
        row = m0 + tl.arange(0, BLOCK_M)
        col = n0 + tl.arange(0, BLOCK_N)
        y = acc * scale_a[:, None]
        if scale_b_ptr is not None:
            y *= tl.load(scale_b_ptr + col, mask=col < N, other=0.0)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        if STORE == "reduce":
            out_desc.atomic_add([m0, n0], y)
        elif STORE == "tma":
            if ACCUMULATE:
                y += out_desc.load([m0, n0]).to(tl.float32)
            out_desc.store([m0, n0], y.to(out_desc.dtype))
        else:
            pointer = out_ptr + row.to(tl.int64)[:, None] * N + col[None, :]
            inside = (row < M)[:, None] & (col < N)[None, :]
            if STORE == "atomic":
                tl.atomic_add(pointer, y, mask=inside, sem="relaxed")
            else:
                if ACCUMULATE:
                    y += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
                tl.store(pointer, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "K"])
def _gemm_kernel(
    a_desc,  # [M, K] FP8
    b_desc,  # [N, K] FP8
    out_desc,  # [M, N] bf16 or fp32; None when its alignment rules TMA out
    out_ptr,
    scale_a_ptr,  # [M] or [] fp32
    scale_b_ptr,  # [N] or [] fp32
    bias_ptr,  # [N] or None
    M,
    N,
    K,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SUBTILES: tl.constexpr,
    PROMOTE: tl.constexpr,  # K blocks between promotions, 0 = never
    STRIDE_A: tl.constexpr,  # 1: one scale per row; 0: one for the tensor
    STRIDE_B: tl.constexpr,
    STORE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    mine = tl.cdiv(tiles_m * tiles_n - tl.program_id(0), PROGRAMS)
    tile = tl.program_id(0) - PROGRAMS
    m0 = 0
    n0 = 0
    k = -1
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PROMOTE > 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over the K blocks of all tiles: the loads of the next tile are issued before the epilogue of this one.
    for _ in range(mine * blocks_k):
        k = tl.where(k == blocks_k - 1, 0, k + 1)
        if k == 0:
            tile += PROGRAMS
            m0, n0 = _tile_origin(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
        a = a_desc.load([m0, k * BLOCK_K])
        b = b_desc.load([n0, k * BLOCK_K])
        acc = _multiply(a, b, acc, BLOCK_K, PROMOTE)
        if k == blocks_k - 1:
            if PROMOTE > 1:
                acc += total
            row = m0 + tl.arange(0, BLOCK_M)
            scale_a = tl.load(scale_a_ptr + row * STRIDE_A, mask=row < M, other=0.0)
            if STRIDE_B == 0:
                scale_a *= tl.load(scale_b_ptr)
            _write(acc, out_desc, out_ptr, scale_a, scale_b_ptr if STRIDE_B else None, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SUBTILES, STORE, ACCUMULATE)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if PROMOTE > 1:
                total = acc
        elif PROMOTE > 1 and (k + 1) % PROMOTE == 0:
            total += acc
            acc -= acc  # zero, at half the instructions that the compiler spends on a constant one


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter on the CPU: any number shows that the persistent loop covers every tile once
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_operands(a: ScaledTensor, b: ScaledTensor, bias: torch.Tensor | None, out: torch.Tensor | None, out_dtype: torch.dtype, promote: int) -> None:
    for name, q in (("a", a), ("b", b)):
        format_of(q.payload.dtype)
        if q.granularity not in ("row", "tensor"):
            raise ValueError(f"{name} has {q.granularity} scales, which change along K; fold it first or use gemm_exact")
        if q.global_scale is not None:
            raise ValueError(f"{name} has a global scale; multiply it into its {q.granularity} scale first")
        if not q.payload.is_contiguous():
            raise ValueError(f"{name} of strides {q.payload.stride()} is not contiguous; call .contiguous()")
        if q.shape[1] % _ALIGNMENT:
            raise ValueError(f"K={q.shape[1]} must be a multiple of {_ALIGNMENT}, which TMA needs; pad K of both operands with zeros")
        if q.payload.data_ptr() % _ALIGNMENT:
            raise ValueError(f"{name} starts at address {q.payload.data_ptr():#x}, not a multiple of {_ALIGNMENT}; use .clone() of the view")
        if q.scale.dtype != torch.float32:
            raise TypeError(f"the scale of {name} must be float32, got {q.scale.dtype}")
    check_result(out_dtype if out is None else out.dtype, promote)
    devices = {t.device for t in (a.payload, b.payload, a.scale, b.scale, out, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"operands, scales, bias and out must be on one device, got {sorted(map(str, devices))}")


def sums_fast(k: int, promote: int) -> bool:
    """May a product over ``k`` stay in the library's fast (unpromoted) accumulator? Yes if nobody asked for promotion within that length."""
    return promote == 0 or k <= promote


def uses_torch(a: ScaledTensor, b: ScaledTensor, bias: torch.Tensor | None, out: torch.Tensor | None, out_dtype: torch.dtype) -> bool:
    """Does this product go to ``torch._scaled_mm``? True for a new bf16 result of two E4M3 payloads on a GPU, N a multiple of 16, bias absent or bf16."""
    return (
        out is None
        and out_dtype == torch.bfloat16
        and a.payload.is_cuda
        and a.format == b.format == E4M3
        and b.shape[0] % _ALIGNMENT == 0
        and (bias is None or bias.dtype == torch.bfloat16)
    )


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    promote: int = 0,
) -> torch.Tensor:
    """``y[m, n] = scale_a[m] * scale_b[n] * sum_k a[m, k] b[n, k] + bias[n]``. Same signature and meaning as `reference.gemm`.

    a: [M, K], b: [N, K], payload E4M3 or E5M2 (also mixed), granularity row or tensor; K a multiple of 16 (any M and N).
    out_dtype: bf16 or fp32, of a new result. bias: [N] bf16, fp16 or fp32.
    out: [M, N] bf16 or fp32, overwritten, or with accumulate=True added to (in fp32, rounded once).
    promote: longest distance along K, a multiple of 128, between promotions of the accumulator to FP32; 0 = no limit. The library backends stay in their fast
    accumulator up to that length and use the split one, which promotes far more often, beyond it.
    """
    check_product(a, b, out, accumulate, bias)
    _check_operands(a, b, bias, out, out_dtype, promote)
    m, n = a.shape[0], b.shape[0]
    if m * n * a.shape[1] == 0:
        raise ValueError(f"cannot multiply [{m}, {a.shape[1]}] by [{n}, {b.shape[1]}]^T: empty; skip the product when there are no tokens")
    by_torch = uses_torch(a, b, bias, out, out_dtype)
    if by_torch and (bias is not None or a.granularity == b.granularity == "tensor"):
        return _gemm_torch(a, b, bias, promote)
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if bias is None and out.is_cuda and (a.granularity, b.granularity) != ("tensor", "tensor"):
        plan = cublaslt.plan_for(a, b, out, fast=sums_fast(a.shape[1], promote))
        if plan is not None:
            return cublaslt.product(plan, (a.payload, row_scale(a)), (b.payload, row_scale(b)), out, accumulate)
    if by_torch:
        return _gemm_torch(a, b, bias, promote)
    programs = _multiprocessors(a.device)
    return gemm_persistent(a, b, out, bias=bias, accumulate=accumulate, promote=promote, config=select_config(m, n, programs), programs=programs)


def _gemm_torch(a: ScaledTensor, b: ScaledTensor, bias: torch.Tensor | None, promote: int) -> torch.Tensor:
    if a.granularity == b.granularity == "tensor":
        scale_a, scale_b = a.scale, b.scale
    else:  # torch takes one scale per row and column or two scalars, nothing between
        scale_a, scale_b = row_scale(a)[:, None], row_scale(b)[None, :]
    return torch._scaled_mm(
        a.payload, b.payload.t(), scale_a, scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=sums_fast(a.shape[1], promote)
    )


def row_scale(q: ScaledTensor) -> torch.Tensor:
    """One scale per row, [rows] fp32, whichever of the two forms ``q`` has."""
    if q.granularity == "row":
        return q.scale
    return q.scale.expand(q.shape[0]).contiguous() if q.row_scale is None else q.row_scale


def gemm_persistent(
    a: ScaledTensor,
    b: ScaledTensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    accumulate: bool = False,
    promote: int = 0,
    config: GemmConfig,
    programs: int,
) -> torch.Tensor:
    """The Triton kernel with a given config on `programs` multiprocessors; arguments as in `gemm`, which checks them and picks both."""
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    by_tma = out.data_ptr() % _ALIGNMENT == 0 and n * out.element_size() % _ALIGNMENT == 0
    store = "tma" if by_tma else "pointer"
    if accumulate and out.dtype == torch.float32 and config.store != "add":
        store = config.store if by_tma else "atomic"
    width = config.block_n // config.subtiles
    out_desc = TensorDescriptor.from_tensor(out, [config.block_m, width]) if by_tma else None
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    programs = min(programs, tiles)
    launch(
        _gemm_kernel,
        (programs,),
        TensorDescriptor.from_tensor(a.payload, [config.block_m, BLOCK_K]),
        TensorDescriptor.from_tensor(b.payload, [config.block_n, BLOCK_K]),
        out_desc,
        out,
        a.scale,
        b.scale,
        bias,
        m,
        n,
        k,
        PROGRAMS=programs,
        PROMOTE=promote // BLOCK_K if promote < k else 0,
        STRIDE_A=int(a.granularity == "row"),
        STRIDE_B=int(b.granularity == "row"),
        STORE=store,
        ACCUMULATE=accumulate,
        **config.constants,
    )
    return out
