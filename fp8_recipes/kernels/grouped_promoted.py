"""Grouped products promoted in registers and shared memory, with the wide tile: fprop, dgrad and wgrad into what TMA writes, wgrad also added to fp32.

The sum of a tile is added to an FP32 total every `promote` elements, because Hopper's FP8 matrix unit keeps about 14 bits of its accumulator. Total and
accumulator of a 128 x 256 tile are 256 registers per thread where 255 exist, and the 128 x 128 tile asks L2 for a third more bytes per product than it
delivers. So half of the total, the right 128 columns, lies in shared memory, beside three stages of operands. Every thread keeps there what it would have kept
in registers: it reads and writes only its own 16-byte words, in an order in which the 32 threads of a warp never meet in a bank. Triton cannot say where a
value is kept, hence Gluon, Triton's language one level below: layouts, shared memory, copies and waits are written out.

One loop over the tiles of a program, inside it one over the K blocks of a tile. Operands come by TMA into a ring of stages, and a barrier per stage says when
both have arrived. The loads run STAGES - 1 blocks ahead and know their own tile, so the next tile's are in flight during the epilogue. In each round a block's
product is started, the one before it is waited for, and when every warp has done so, the stage that it read is filled again. One product is in flight always,
except at a promotion and in the epilogue, which read the accumulator; the first product after either overwrites it. No warp has a task of its own.

The result leaves as two halves through the shared memory in which the total was, as boxes of a tensor [results, height, width]: TMA cuts off what reaches
beyond height or width, so no box touches the next expert. Until they are read by TMA, while the next tile is computed, that memory is not written. What is
added to fp32 needs that memory twice, and L2 takes it slowly: the right half waits in registers until the next tile has done LATER blocks, before its total
needs them.

Every sum is made of the same products and promotions in the same order as in the Triton kernels of `grouped_gemm` and `grouped_wgrad`, which compute what this
one does not take: sums that are not promoted (there this kernel, even storing a tile behind the next one's first product, was up to 7 % slower), results that
are scattered or that TMA cannot write, other devices and versions of Triton. Added to fp32, the promoted total is added once here, there at every promotion.
"""

from __future__ import annotations

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin as gl_builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..reference.grouped import GroupedTensor
from ..tensor import ScaledTensor
from .common import cdiv
from .gemm import _tile_origin
from .grouped_configs import GroupedConfig
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
_LATER = 5
"""Blocks of the next tile before the right half of one that is added to fp32 follows. Three was level, two and eight up to 4 % slower."""
CHUNK = gl.constexpr(1024)
"""Entries of block_expert that are read at a time."""
ENTRIES = gl.constexpr(gl.BlockedLayout([4], [32], [8], [0]))
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
def _used_blocks(block_expert_ptr, blocks):
    """`grouped_gemm._used_blocks` in Gluon: how many blocks of 128 rows belong to an expert. They come first."""
    used = gl.to_tensor(0)
    for first in range(0, blocks, CHUNK):
        block = first + gl.arange(0, CHUNK, layout=ENTRIES)
        used += gl.sum((gl.load(block_expert_ptr + block, mask=block < blocks, other=-1) >= 0).to(gl.int32), 0)
    return used


@gluon.jit
def _place(tile, tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP: gl.constexpr, WGRAD: gl.constexpr):
    """(expert, first row and column in its result, where its contraction starts, number of K blocks) of a tile; some place for a tile beyond the last one."""
    known = tile < tiles
    per_result = tiles_m * tiles_n
    y0, x0 = _tile_origin(tile % per_result, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP)
    if WGRAD:
        expert = tile // per_result
        start = gl.load(table_ptr + expert, mask=known, other=0)
        stop = gl.load(table_ptr + expert + 1, mask=known, other=0)
        first = gl.where(start == stop, depth, start)  # without rows: one block, read beyond the end of the buffer, where TMA reads zeros
        blocks = gl.maximum((stop - start) // BLOCK_K, 1)
    else:
        expert = gl.load(table_ptr + y0 // BLOCK_M, mask=known, other=0)
        first = gl.to_tensor(0)
        blocks = gl.cdiv(depth, BLOCK_K)
    return expert, y0, x0, first, blocks


@gluon.jit
def _fetch(ptr, count, COUNT: gl.constexpr):
    """`common.fetch` in Gluon: the first ``count`` of COUNT fp32 values on their way into L1."""
    first = gl.arange(0, COUNT // 32, layout=LINES) * 32
    lines = ptr + gl.where(first < count, first, 0)
    gl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_next(
    stage, tile, left, a_row, b_row, col,
    a_desc, b_desc, a_memory, b_memory, arrived, tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP: gl.constexpr, WGRAD: gl.constexpr,
):  # fmt: skip
    """The next block of both operands into ``stage``. State of the loads, returned as it is after this one: tile, its blocks that are left, rows, column."""
    if left == 0:
        tile += gl.num_programs(0)
        expert, a_row, b_row, col, left = _place(tile, tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP, WGRAD)
        if not WGRAD:
            b_row += expert * width
    more = tile < tiles
    barrier = arrived.index(stage)
    mbarrier.expect(barrier, (BLOCK_M + BLOCK_N) * BLOCK_K, pred=more)  # bytes of the whole boxes: TMA counts those outside the tensor too
    tma.async_copy_global_to_shared(a_desc, [a_row, col], barrier, a_memory.index(stage), pred=more)
    tma.async_copy_global_to_shared(b_desc, [b_row, col], barrier, b_memory.index(stage), pred=more)
    return tile, left - 1, a_row, b_row, col + BLOCK_K


@gluon.jit
def _scales(scale_a_ptr, scale_b_ptr, rows, x0, width, STRIDE_B: gl.constexpr):
    """Of the tile's rows, and of the columns of its halves; one scale for all columns goes into the rows'."""
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, PART))
    scale_a = gl.load(scale_a_ptr + row, mask=row < rows, other=0.0)
    if STRIDE_B:
        col = x0 + gl.arange(0, HALF, layout=gl.SliceLayout(0, PART))
        here = gl.load(scale_b_ptr + col, mask=col < width, other=0.0)
        return scale_a, here, gl.load(scale_b_ptr + HALF + col, mask=col < width - HALF, other=0.0)
    else:
        scale_a *= gl.load(scale_b_ptr)
        return scale_a, scale_a, scale_a


@gluon.jit
def _scaled(y, scale_a, scale_b, STRIDE_B: gl.constexpr):
    y = y * gl.expand_dims(scale_a, 1)
    if STRIDE_B:
        y = y * gl.expand_dims(scale_b, 0)
    return y


@gl_builtin
def _add_to_global(desc, coord, src, _semantic=None):
    """`tma.async_copy_shared_to_global` that adds to what is there, in L2. Triton 3.6 has the operation, Gluon no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def _send(y, out_desc, memory, place, y0, x0, ADD: gl.constexpr, SWAPPED: gl.constexpr):
    """Half a tile through ``memory`` to its place in the result."""
    if SWAPPED:
        memory.store(gl.reshape(gl.permute(y, (1, 0)), (1, HALF, BLOCK_M)))
    else:
        memory.store(gl.reshape(y, (1, BLOCK_M, HALF)))
    fence_async_shared()
    gl.thread_barrier()
    if ADD:
        _add_to_global(out_desc, [place, y0, x0], memory)
    elif SWAPPED:
        tma.async_copy_shared_to_global(out_desc, [place, x0, y0], memory)
    else:
        tma.async_copy_shared_to_global(out_desc, [place, y0, x0], memory)


@gluon.jit
def _wait_until_sent():
    """Until TMA has read what was sent, for all threads: the memory may be written again."""
    tma.store_wait(0)
    gl.thread_barrier()


@gluon.jit
def _block(
    use_acc, acc, stage, phase, ahead, left, a_row, b_row, col,
    a_desc, b_desc, a_memory, b_memory, arrived, tiles, table_ptr, width, depth, tiles_m, tiles_n,
    GROUP: gl.constexpr, STAGES: gl.constexpr, WGRAD: gl.constexpr,
):  # fmt: skip
    """The product of ``stage`` is started, the one before it waited for, and its stage filled again."""
    mbarrier.wait(arrived.index(stage), phase)
    acc = warpgroup_mma(a_memory.index(stage), b_memory.index(stage).permute((1, 0)), acc, use_acc=use_acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))  # the product of the block before, in this warp; after the barrier, in all
    gl.thread_barrier()
    free = gl.where(stage == 0, STAGES, stage) - 1
    ahead, left, a_row, b_row, col = _load_next(free, ahead, left, a_row, b_row, col, a_desc, b_desc, a_memory, b_memory, arrived,
                                                tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP, WGRAD)  # fmt: skip
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return acc, stage, phase, ahead, left, a_row, b_row, col


@gluon.jit(do_not_specialize=["experts", "height"])
def _promoted_kernel(
    a_desc,  # [rows, K] FP8; wgrad: [N, rows]
    b_desc,  # [E * N, K] FP8; wgrad: [K, rows]
    out_desc,  # [1, rows, N] bf16 or fp32; wgrad: [E, N, K], SWAPPED: [E, K, N]
    scale_a_ptr,  # [rows] fp32; wgrad: [E, N]
    scale_b_ptr,  # [E] or [E, N] fp32; wgrad: [E, K]
    table_ptr,  # block_expert [rows / 128] int32; wgrad: offsets [E + 1]
    experts,
    height,  # rows of what is computed of one result
    width,  # its columns
    depth,  # length of the contraction; wgrad: of all experts together
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTE: gl.constexpr,  # K blocks between promotions, at least 2
    ORDER: gl.constexpr,  # of the experts in out: 1 ascending, -1 descending; 0: not a wgrad, one result
    STRIDE_B: gl.constexpr,  # 1: one scale per column; 0: one per expert
    ADD: gl.constexpr,  # to what is in out (then fp32)
    SWAPPED: gl.constexpr,  # is what is computed the transpose of out?
    LATER: gl.constexpr,  # K blocks of the next tile after which the right half of this one is added; less than PROMOTE
):
    WGRAD: gl.constexpr = ORDER != 0
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

    tiles_n = gl.cdiv(width, BLOCK_N)
    if WGRAD:
        tiles_m = gl.cdiv(height, BLOCK_M)
        tiles = experts * tiles_m * tiles_n
    else:
        used = _used_blocks(table_ptr, height // BLOCK_M)
        tiles_m = gl.maximum(used, 1)
        tiles = used * tiles_n
    ahead = gl.program_id(0) - gl.num_programs(0)
    left = 0
    a_row = 0
    b_row = 0
    col = 0
    for i in gl.static_range(STAGES - 1):
        ahead, left, a_row, b_row, col = _load_next(i, ahead, left, a_row, b_row, col, a_desc, b_desc, a_memory, b_memory, arrived,
                                                    tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP, WGRAD)  # fmt: skip
    stage = 0
    phase = 0  # parity of how often the ring has been gone round
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=WHOLE)
    if ADD:
        last = gl.zeros((BLOCK_M, HALF), gl.float32, layout=PART)
        last_place = 0
        last_y0 = 0
        last_x0 = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, y0, x0, start, blocks = _place(tile, tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP, WGRAD)
        first_a = scale_a_ptr + (expert * height if WGRAD else 0) + y0
        first_b = scale_b_ptr + (expert * width if STRIDE_B else expert)
        _fetch(first_a, height - y0, BLOCK_M)
        if STRIDE_B:
            _fetch(first_b + x0, width - x0, BLOCK_N)
        begun = 0
        if ADD:
            begun = gl.minimum(blocks, LATER)
            for k in range(begun):
                acc, stage, phase, ahead, left, a_row, b_row, col = _block(
                    k != 0, acc, stage, phase, ahead, left, a_row, b_row, col, a_desc, b_desc, a_memory, b_memory, arrived,
                    tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP, STAGES, WGRAD)  # fmt: skip
            if tile != gl.program_id(0):
                _wait_until_sent()
                _send(last, out_desc, outgoing.index(0), last_place, last_y0, last_x0, ADD, SWAPPED)
        total = gl.zeros((BLOCK_M, HALF), gl.float32, layout=PART)
        for k in range(begun, blocks):
            acc, stage, phase, ahead, left, a_row, b_row, col = _block(
                k % PROMOTE != 0, acc, stage, phase, ahead, left, a_row, b_row, col, a_desc, b_desc, a_memory, b_memory, arrived,
                tiles, table_ptr, width, depth, tiles_m, tiles_n, GROUP, STAGES, WGRAD)  # fmt: skip
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
        scale_a, here_b, there_b = _scales(first_a, first_b, height - y0, x0, width, STRIDE_B)
        here = _scaled(here, scale_a, here_b, STRIDE_B).to(out_desc.dtype)
        there = _scaled(there, scale_a, there_b, STRIDE_B).to(out_desc.dtype)
        place = (expert if ORDER == 1 else experts - 1 - expert) if WGRAD else gl.to_tensor(0)
        if ADD:
            place = gl.where(start == depth, experts, place)  # no rows, nothing to add: a box beyond all results
        _wait_until_sent()
        _send(here, out_desc, outgoing.index(0), place, y0, x0, ADD, SWAPPED)
        if ADD:
            last = there
            last_place = place
            last_y0 = y0
            last_x0 = x0 + HALF
        else:
            if SLOTS == 1:
                _wait_until_sent()
            _send(there, out_desc, outgoing.index(SLOTS - 1), place, y0, x0 + HALF, ADD, SWAPPED)
    if ADD and gl.program_id(0) < tiles:
        _wait_until_sent()
        _send(last, out_desc, outgoing.index(0), last_place, last_y0, last_x0, ADD, SWAPPED)
    tma.store_wait(0)


def _descriptor(base: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """TMA descriptor of the contiguous tensor of ``shape`` that starts where ``base`` does."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size * strides[0])
    return TensorDescriptor(base, list(shape), strides, list(block), layout)


def _launch(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, out_shape: tuple[int, int, int], scales: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor,
    experts: int, depth: int, promote: int, order: int, accumulate: bool, swapped: bool, config: GroupedConfig, programs: int,
) -> None:  # fmt: skip
    """a: [., depth], b: [., depth] payloads. out: a tensor that starts where the result, of ``out_shape``, does."""
    results, height, width = out_shape
    if swapped:
        height, width = width, height
    bits = 8 * out.element_size()
    programs = min(programs, results * cdiv(height, BLOCK_M.value) * cdiv(width, BLOCK_N.value))
    launch(
        _promoted_kernel,
        (programs,),
        _descriptor(a, (a.shape[0], depth), (BLOCK_M.value, BLOCK_K.value), _OPERAND),
        _descriptor(b, (b.shape[0], depth), (BLOCK_N.value, BLOCK_K.value), _OPERAND),
        _descriptor(out, out_shape, (1, BLOCK_M.value, HALF.value), gl.NVMMASharedLayout(_SWIZZLE, bits, 3)),
        *scales,
        table,
        experts,
        height,
        width,
        depth,
        GROUP=config.group,
        STAGES=config.stages,
        PROMOTE=promote // BLOCK_K.value,
        ORDER=order,
        STRIDE_B=int(order != 0 or scales[1].dim() == 2),
        ADD=int(accumulate),
        SWAPPED=int(swapped),
        LATER=min(_LATER, promote // BLOCK_K.value - 1),
        num_warps=config.warps,
    )


def promoted_gemm(
    a: ScaledTensor, b: GroupedTensor, block_expert: torch.Tensor, out: torch.Tensor, promote: int, config: GroupedConfig, programs: int
) -> None:
    """`grouped_gemm`, which checks the arguments and says when it comes here, into ``out``, [rows, N] bf16 or fp32, for ``programs`` multiprocessors.

    promote: more than 128, less than K. config: stages and group, the rest is fixed.
    """
    experts, n, k = b.payload.shape
    shape, scales = (1, *out.shape), (a.scale, b.scale)
    _launch(a.payload, b.payload.view(experts * n, k), out, shape, scales, block_expert, experts, k, promote, 0, False, False, config, programs)


def promoted_wgrad(
    a_t: GroupedTensor, b_t: GroupedTensor, offsets: torch.Tensor, first: torch.Tensor, order: int, accumulate: bool, swapped: bool, promote: int,
    config: GroupedConfig, programs: int,
) -> None:  # fmt: skip
    """`grouped_wgrad`, which checks the arguments and says when it comes here, for ``programs`` multiprocessors.

    first: the result of the expert that comes first in memory, the others behind it; order: 1 if that is expert 0, -1 if it is the last one. accumulate: it is
    fp32. swapped: the operands, and the transpose of their product goes to ``first``, which is bf16. promote: more than 128, less than all rows.
    """
    (m, rows), n, experts = a_t.payload.shape, b_t.payload.shape[0], a_t.scale.shape[0]
    shape, scales = (experts, n, m) if swapped else (experts, m, n), (a_t.scale, b_t.scale)
    _launch(a_t.payload, b_t.payload, first, shape, scales, offsets, experts, rows, promote, order, accumulate, swapped, config, programs)
