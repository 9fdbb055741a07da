"""Grouped wgrad promoted in registers and shared memory, with the wide tile: into results that are new or overwritten, fp32 or bf16, and written by TMA.

The sum of a tile is added to an FP32 total every `promote` rows, because Hopper's FP8 matrix unit keeps about 14 bits of its accumulator. Total and accumulator
of a 128 x 256 tile are 256 registers per thread where 255 exist, and the 128 x 128 tile asks L2 for a third more bytes per product than it delivers. So half of
the total, the right 128 columns, lies in shared memory, beside three stages of operands. Every thread keeps there what it would have kept in registers: it
reads and writes only its own 16-byte words, in an order in which the 32 threads of a warp never meet in a bank. Triton cannot say where a value is kept, hence
Gluon, Triton's language one level below: layouts, shared memory, copies and waits are written out.

One loop over the tiles of a program, inside it one over the K blocks of a tile. Operands come by TMA into a ring of stages, and a barrier per stage says when
both have arrived. The loads run STAGES - 1 blocks ahead and know their own tile, so the next tile's are in flight during the epilogue. In each round a block's
product is started, the one before it is waited for, and when every warp has done so, the stage that it read is filled again. One product is in flight always,
except at a promotion and in the epilogue, which read the accumulator; the first product after either overwrites it. No warp has a task of its own.

The result leaves as two halves through the shared memory in which the total was, as boxes of a tensor [experts, N, K]: TMA cuts off what reaches beyond N or K,
so no box touches the next expert. Until they are read by TMA, while the next tile is computed, that memory is not written.

Every sum is made of the same products and promotions in the same order as in the Triton kernel of `grouped_gemm`, which computes what this one does not take:
results that are added to, scattered matrices, rows of the result that TMA cannot write, other devices and versions of Triton.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..reference.grouped import GroupedTensor
from .common import cdiv
from .gemm import _tile_origin
from .grouped_configs import SHARED, WIDE, GroupedConfig
from .launch import launch

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(128)
HALF = gl.constexpr(128)
"""Columns of half a tile."""
_SWIZZLE = 128
"""Bytes of a row of shared memory whose 16-byte pieces TMA and the matrix unit shuffle in the same way."""
_OPERAND = gl.NVMMASharedLayout(_SWIZZLE, 8, 2)
# Which thread has what: warp w rows 16 w to 16 w + 15 of the tile, in each thread two rows and pairs of columns.
WHOLE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 256, 32]))
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32]))
# The total in shared memory: what each bit of a word's number adds to (row, column). 2 x 2 values of one thread, the 32 threads, a thread's columns, the warps.
_WORDS = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [0, 8], [0, 16], [0, 32], [0, 64], [16, 0], [32, 0], [64, 0]]
OWN = gl.constexpr(gl.SharedLinearLayout(_WORDS, alignment=1024))  # which TMA asks for, as the result leaves from there
LINES = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@gluon.jit
def _halves(x):
    """Left and right half of a tile, which are different registers: nothing moves."""
    left, right = gl.split(gl.permute(gl.reshape(x, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    return gl.convert_layout(left, PART, assert_trivial=True), gl.convert_layout(right, PART, assert_trivial=True)


@gluon.jit
def _joined(left, right):
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N)), WHOLE, assert_trivial=True)


@gluon.jit
def _rows_of(tile, offsets_ptr, experts, rows, per_expert):
    """(first row, number of blocks) of a tile's expert. Without rows: one block, read beyond the end of the buffer, where TMA reads zeros."""
    expert = gl.minimum(tile // per_expert, experts - 1)  # a tile beyond the last one has some rows too; nothing is read for it
    start = gl.load(offsets_ptr + expert)
    stop = gl.load(offsets_ptr + expert + 1)
    return gl.where(start == stop, rows, start), gl.maximum((stop - start) // BLOCK_K, 1)


@gluon.jit
def _fetch(ptr, count, COUNT: gl.constexpr):
    """`common.fetch` in Gluon: the first ``count`` of COUNT fp32 values on their way into L1."""
    first = gl.arange(0, COUNT // 32, layout=LINES) * 32
    lines = ptr + gl.where(first < count, first, 0)
    gl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_next(
    stage, tile, left, row, m0, n0,
    a_desc, b_desc, a_memory, b_memory, arrived, offsets_ptr, experts, rows, tiles_m, tiles_n, GROUP: gl.constexpr,
):  # fmt: skip
    """The next block of both operands into ``stage``. State of the loads, returned as it is after this one: tile, its blocks that are left, row, origin."""
    per_expert = tiles_m * tiles_n
    if left == 0:
        tile += gl.num_programs(0)
        row, left = _rows_of(tile, offsets_ptr, experts, rows, per_expert)
        m0, n0 = _tile_origin(tile % per_expert, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
    more = tile < experts * per_expert
    barrier = arrived.index(stage)
    mbarrier.expect(barrier, (BLOCK_M + BLOCK_N) * BLOCK_K, pred=more)  # bytes of the whole boxes: TMA counts those outside the tensor too
    tma.async_copy_global_to_shared(a_desc, [m0, row], barrier, a_memory.index(stage), pred=more)
    tma.async_copy_global_to_shared(b_desc, [n0, row], barrier, b_memory.index(stage), pred=more)
    return tile, left - 1, row + BLOCK_K, m0, n0


@gluon.jit
def _column_scales(scale_b_ptr, n0, K):
    col = n0 + gl.arange(0, HALF, layout=gl.SliceLayout(0, PART))
    return gl.load(scale_b_ptr + col, mask=col < K, other=0.0)


@gluon.jit
def _send(y, scale_a, scale_b, out_desc, memory, place, m0, n0):
    """Half a tile, scaled, through ``memory`` to its place in the result."""
    y = y * gl.expand_dims(scale_a, 1) * gl.expand_dims(scale_b, 0)
    memory.store(gl.reshape(y.to(out_desc.dtype), (1, BLOCK_M, HALF)))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_desc, [place, m0, n0], memory)


@gluon.jit
def _wait_until_sent():
    """Until TMA has read what was sent, for all threads: the memory may be written again."""
    tma.store_wait(0)
    gl.thread_barrier()


@gluon.jit(do_not_specialize=["experts", "N"])
def _promoted_wgrad_kernel(
    a_desc,  # [N, rows] FP8
    b_desc,  # [K, rows] FP8
    out_desc,  # [experts, N, K] fp32 or bf16
    scale_a_ptr,  # [experts, N] fp32
    scale_b_ptr,  # [experts, K] fp32
    offsets_ptr,  # [experts + 1] int32
    experts,
    rows,
    N,
    K,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTE: gl.constexpr,  # K blocks between promotions, at least 2
    ORDER: gl.constexpr,  # of the experts in out: 1 ascending, -1 descending
):
    a_memory = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_memory = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    own = gl.allocate_shared_memory(gl.float32, [BLOCK_M, HALF], OWN)
    SLOTS: gl.constexpr = 2 if out_desc.dtype == gl.bfloat16 else 1  # halves of the result that fit in its place
    outgoing = own._reinterpret(out_desc.dtype, [SLOTS, 1, BLOCK_M, HALF], out_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()

    tiles_m = gl.cdiv(N, BLOCK_M)
    tiles_n = gl.cdiv(K, BLOCK_N)
    per_expert = tiles_m * tiles_n
    ahead = gl.program_id(0) - gl.num_programs(0)
    left = 0
    row = 0
    m0 = 0
    n0 = 0
    for i in gl.static_range(STAGES - 1):
        ahead, left, row, m0, n0 = _load_next(i, ahead, left, row, m0, n0, a_desc, b_desc, a_memory, b_memory, arrived,
                                              offsets_ptr, experts, rows, tiles_m, tiles_n, GROUP)  # fmt: skip
    stage = 0
    phase = 0  # parity of how often the ring has been gone round
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=WHOLE)
    for tile in range(gl.program_id(0), experts * per_expert, gl.num_programs(0)):
        expert = tile // per_expert
        y0, x0 = _tile_origin(tile % per_expert, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
        _, blocks = _rows_of(tile, offsets_ptr, experts, rows, per_expert)
        _fetch(scale_a_ptr + expert * N + y0, N - y0, BLOCK_M)
        _fetch(scale_b_ptr + expert * K + x0, K - x0, BLOCK_N)
        total = gl.zeros((BLOCK_M, HALF), gl.float32, layout=PART)
        for k in range(blocks):
            mbarrier.wait(arrived.index(stage), phase)
            b = b_memory.index(stage).permute((1, 0))
            acc = warpgroup_mma(a_memory.index(stage), b, acc, use_acc=k % PROMOTE != 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the product of the block before, in this warp; after the barrier, in all
            gl.thread_barrier()
            free = gl.where(stage == 0, STAGES, stage) - 1
            ahead, left, row, m0, n0 = _load_next(free, ahead, left, row, m0, n0, a_desc, b_desc, a_memory, b_memory, arrived,
                                                  offsets_ptr, experts, rows, tiles_m, tiles_n, GROUP)  # fmt: skip
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            if ((k + 1) % PROMOTE == 0) & (k + 1 < blocks):
                acc = warpgroup_mma_wait(0, deps=(acc,))
                here, there = _halves(acc)
                total += here
                if k + 1 == PROMOTE:
                    _wait_until_sent()  # the last tile's result, for whose memory this is the first use since
                else:
                    there += own.load(PART)
                own.store(there)
                acc = _joined(here, there)  # not used again, but in the same registers: the sums take no others
        acc = warpgroup_mma_wait(0, deps=(acc,))
        here, there = _halves(acc)
        if blocks > PROMOTE:
            here += total
            there += own.load(PART)
        acc = _joined(here, there)
        feature = y0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, PART))
        scale_a = gl.load(scale_a_ptr + expert * N + feature, mask=feature < N, other=0.0)
        scale_here = _column_scales(scale_b_ptr + expert * K, x0, K)
        scale_there = _column_scales(scale_b_ptr + expert * K, x0 + HALF, K)
        place = expert if ORDER == 1 else experts - 1 - expert
        _wait_until_sent()
        _send(here, scale_a, scale_here, out_desc, outgoing.index(0), place, y0, x0)
        if SLOTS == 1:
            _wait_until_sent()
        _send(there, scale_a, scale_there, out_desc, outgoing.index(SLOTS - 1), place, y0, x0 + HALF)
    tma.store_wait(0)


def _descriptor(base: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """TMA descriptor of the contiguous tensor of ``shape`` that starts where ``base`` does."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size * strides[0])
    return TensorDescriptor(base, list(shape), strides, list(block), layout)


def promoted_wgrad(
    a_t: GroupedTensor, b_t: GroupedTensor, offsets: torch.Tensor, first: torch.Tensor, order: int, promote: int, config: GroupedConfig | None, programs: int
) -> None:
    """`grouped_gemm.grouped_wgrad`, which checks the arguments and says when it comes here, for ``programs`` multiprocessors.

    first: the result of the expert that comes first in memory, the others behind it; order: 1 if that is expert 0, -1 if it is the last one.
    promote: more than 128, less than all rows. config: stages and group, the rest is fixed.
    """
    (n, rows), k, experts = a_t.payload.shape, b_t.payload.shape[0], a_t.scale.shape[0]
    config = WIDE if config is None else config
    needed = config.stages * BLOCK_K.value * (BLOCK_M.value + BLOCK_N.value) + 4 * BLOCK_M.value * HALF.value
    if config.stages < 2 or needed > SHARED:
        raise ValueError(f"stages={config.stages} of the promoted wgrad must be 2 or 3: shared memory holds half of the total too")
    bits = 8 * first.element_size()
    programs = min(programs, experts * cdiv(n, BLOCK_M.value) * cdiv(k, BLOCK_N.value))
    launch(
        _promoted_wgrad_kernel,
        (programs,),
        _descriptor(a_t.payload, (n, rows), (BLOCK_M.value, BLOCK_K.value), _OPERAND),
        _descriptor(b_t.payload, (k, rows), (BLOCK_N.value, BLOCK_K.value), _OPERAND),
        _descriptor(first, (experts, n, k), (1, BLOCK_M.value, HALF.value), gl.NVMMASharedLayout(_SWIZZLE, bits, 3)),
        a_t.scale,
        b_t.scale,
        offsets,
        experts,
        rows,
        n,
        k,
        GROUP=config.group,
        STAGES=config.stages,
        PROMOTE=promote // BLOCK_K.value,
        ORDER=order,
        num_warps=config.warps,
    )
