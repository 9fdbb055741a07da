"""Rows to experts and back on the GPU: `fp8_recipes.reference.permute`, bit for bit, without waiting for the device.

gather_rows reads each token once and writes it K times, payload, scale, tile exponents and probability in one launch; the programs in front of the tokens'
write what is padding and nothing else, so no pass fills the buffer with zeros first. combine_rows reads K rows and writes one. Bytes per token and column:
gather 1 in, K out (FP8); combine 2 K in, 2 out (bf16). All moves are 16 bytes per thread and step.

route_map counts in three launches: how many copies each block of COPIES has for each expert, where each block's copies begin within their expert, and
then every copy's row. No atomics, so the order of rows is the order of copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.permute import RowMap, check_combine, check_gather, check_routing
from ..tensor import TILE, ScaledTensor
from . import common
from .common import INTERPRETED, cdiv, check_device, next_power_of_2, to_fp32
from .launch import launch

COPIES = 128
"""Copies that one program of the routing kernels ranks against each other."""
COUNT_EXPERTS = tl.constexpr(32)
SCAN_BLOCKS = 1024
SCAN_EXPERTS = 2
PLACE_WARPS = 4
RANKED = tl.constexpr(32)
"""Copies with which all of a block's are compared at a time. All 128 at once: 167 registers a thread instead of 56 (ptxas), a third of the programs."""
PAD_ROWS = tl.constexpr(16)
"""Rows of one padding program; divides 128."""
WORDS_PER_THREAD = 8
COMBINE_COLUMNS = 1024


@triton.jit
def _count_kernel(expert_ptr, begin_ptr, copies, experts, COPIES: tl.constexpr):
    """begin[block, expert]: how many of the block's copies go to the expert."""
    block = tl.program_id(0)
    copy = block * COPIES + tl.arange(0, COPIES)
    expert = tl.load(expert_ptr + copy, mask=copy < copies, other=-1)
    for first in range(0, experts, COUNT_EXPERTS):
        column = first + tl.arange(0, COUNT_EXPERTS)
        count = tl.sum((expert[:, None] == column[None, :]).to(tl.int32), axis=0)
        tl.store(begin_ptr + block.to(tl.int64) * experts + column, count, mask=column < experts)


@triton.jit
def _scan_kernel(begin_ptr, demand_ptr, blocks, experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """begin[block, expert] becomes the number in the blocks before; demand[expert] the number in all."""
    column = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    carried = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        pointer = begin_ptr + block.to(tl.int64)[:, None] * experts + column[None, :]
        mask = (block < blocks)[:, None] & (column < experts)[None, :]
        count = tl.load(pointer, mask=mask, other=0)
        tl.store(pointer, tl.cumsum(count, axis=0) - count + carried[None, :], mask=mask)
        carried += tl.sum(count, axis=0)
    tl.store(demand_ptr + column, carried, mask=column < experts)


@triton.jit
def _describe_block(program, index, demand, start, end, source_ptr, offset_ptr, block_expert_ptr, count_ptr, rows, experts):
    """Block ``program`` of 128 rows: its expert, and -1 as the source of its padding. The first one also writes what is per expert."""
    first = program * 128
    expert = tl.sum((end <= first).to(tl.int32), axis=0)  # past the last expert the ends are all equal: no lane of ``index``
    held = tl.sum(tl.where(index == expert, start + demand, 0), axis=0)
    row = first + tl.arange(0, 128)
    tl.store(source_ptr + row, tl.full((128,), -1, tl.int32), mask=row >= held)
    tl.store(block_expert_ptr + program, tl.where(expert < experts, expert, -1))
    if program == 0:
        limit = tl.minimum(end, rows)
        tl.store(offset_ptr, 0)
        tl.store(offset_ptr + 1 + index, limit, mask=index < experts)
        tl.store(count_ptr + index, tl.minimum(demand, limit - tl.minimum(start, rows)), mask=index < experts)


@triton.jit
def _place_copies(block, start, expert_ptr, begin_ptr, source_ptr, destination_ptr, copies, rows, experts, COPIES: tl.constexpr):
    """Rows of the copies of one block: the expert's first row, plus the copies in the blocks before, plus those before it in this block."""
    lane = tl.arange(0, COPIES)
    copy = block * COPIES + lane
    expert = tl.load(expert_ptr + copy, mask=copy < copies, other=-1)
    rank = tl.zeros((COPIES,), tl.int32)
    for first in tl.static_range(0, COPIES, RANKED):
        other = first + tl.arange(0, RANKED)
        same = tl.load(expert_ptr + block * COPIES + other, mask=block * COPIES + other < copies, other=-1)[None, :] == expert[:, None]
        rank += tl.sum((same & (other[None, :] < lane[:, None])).to(tl.int32), axis=1)
    valid = (expert >= 0) & (expert < experts)
    begin = tl.load(begin_ptr + block.to(tl.int64) * experts + expert, mask=valid, other=0)
    row = tl.gather(start, tl.where(valid, expert, 0), axis=0) + begin + rank
    valid = valid & (row < rows)
    tl.store(destination_ptr + copy, tl.where(valid, row, -1), mask=copy < copies)
    tl.store(source_ptr + row, copy, mask=valid)


@triton.jit
def _place_kernel(
    expert_ptr,
    begin_ptr,
    demand_ptr,
    source_ptr,
    destination_ptr,
    offset_ptr,
    block_expert_ptr,
    count_ptr,
    copies,
    rows,
    experts,
    COPIES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The first rows / 128 programs describe a block of rows each, the others place a block of copies each."""
    index = tl.arange(0, EXPERTS)
    demand = tl.load(demand_ptr + index, mask=index < experts, other=0)
    padded = (demand + 127) // 128 * 128
    end = tl.cumsum(padded, axis=0)
    start = end - padded
    program = tl.program_id(0)
    if program < rows // 128:
        _describe_block(program, index, demand, start, end, source_ptr, offset_ptr, block_expert_ptr, count_ptr, rows, experts)
    else:
        _place_copies(program - rows // 128, start, expert_ptr, begin_ptr, source_ptr, destination_ptr, copies, rows, experts, COPIES)


@triton.jit
def _write_padding(
    program, out_ptr, scale_out_ptr, tile_out_ptr, prob_out_ptr, source_ptr, words, scales, tiles,
    BLOCK: tl.constexpr, SCALES: tl.constexpr, TILES: tl.constexpr, PROB: tl.constexpr,
):  # fmt: skip
    first_row = program.to(tl.int64) * PAD_ROWS
    if tl.min(tl.load(source_ptr + first_row + tl.arange(0, PAD_ROWS)), axis=0) < 0:
        for i in range(PAD_ROWS):
            row = first_row + i
            if tl.load(source_ptr + row) < 0:
                for first in range(0, words, BLOCK):
                    word = first + tl.arange(0, BLOCK)
                    tl.store(out_ptr + row * words + word, tl.zeros((BLOCK,), tl.int32), mask=word < words)
                if SCALES:
                    group = tl.arange(0, SCALES)
                    tl.store(scale_out_ptr + row * scales + group, tl.full((SCALES,), 1 << 23, tl.int32), mask=group < scales)  # 2**-126
                if TILES:
                    tile = tl.arange(0, TILES)
                    tl.store(tile_out_ptr + row * tiles + tile, tl.full((TILES,), 1, tl.uint8), mask=tile < tiles)
                if PROB:
                    tl.store(prob_out_ptr + row, 0)


@triton.jit
def _gather_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    scale_out_ptr,
    tile_ptr,
    tile_out_ptr,
    prob_ptr,
    prob_out_ptr,
    source_ptr,
    destination_ptr,
    rows,
    quads,
    x_quads,
    scales,
    scale_stride,
    tiles,
    tile_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    TILES: tl.constexpr,
    PROB: tl.constexpr,
):
    """x in int32 words, four times ``quads`` per row, rows four times ``x_quads`` apart; scales and probabilities as int32, tile exponents as bytes, their
    rows ``scale_stride`` and ``tile_stride`` apart. SCALES, TILES: 0 = there are none."""
    words = quads * 4
    padding_programs = rows // PAD_ROWS
    program = tl.program_id(0)
    if program < padding_programs:
        _write_padding(program, out_ptr, scale_out_ptr, tile_out_ptr, prob_out_ptr, source_ptr, words, scales, tiles, BLOCK, SCALES, TILES, PROB)
    else:
        token = (program - padding_programs).to(tl.int64)
        destination_ptr += token * K
        for first in range(0, words, BLOCK):
            word = first + tl.arange(0, BLOCK)
            value = tl.load(x_ptr + token * (x_quads * 4) + word, mask=word < words, other=0)
            for k in tl.static_range(K):
                row = tl.load(destination_ptr + k).to(tl.int64)
                tl.store(out_ptr + row * words + word, value, mask=(word < words) & (row >= 0))
        if SCALES:
            group = tl.arange(0, SCALES)
            scale = tl.load(scale_ptr + token * scale_stride + group, mask=group < scales, other=0)
            for k in tl.static_range(K):
                row = tl.load(destination_ptr + k).to(tl.int64)
                tl.store(scale_out_ptr + row * scales + group, scale, mask=(group < scales) & (row >= 0))
        if TILES:
            tile = tl.arange(0, TILES)
            exponent = tl.load(tile_ptr + token * tile_stride + tile, mask=tile < tiles, other=0)
            for k in tl.static_range(K):
                row = tl.load(destination_ptr + k).to(tl.int64)
                tl.store(tile_out_ptr + row * tiles + tile, exponent, mask=(tile < tiles) & (row >= 0))
        if PROB:
            for k in tl.static_range(K):
                row = tl.load(destination_ptr + k).to(tl.int64)
                tl.store(prob_out_ptr + row, tl.load(prob_ptr + token * K + k), mask=row >= 0)


@triton.jit
def _to_bf16(x):
    """fp32 -> bf16, nearest even. The interpreter's own conversion truncates subnormals, so there it is integer arithmetic."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _combine_rows_kernel(y_ptr, out_ptr, weight_ptr, destination_ptr, octets, K: tl.constexpr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr):
    """BLOCK columns of one token; a row has eight times ``octets`` columns."""
    cols = octets * 8
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(destination_ptr + token * K + k).to(tl.int64)
        part = to_fp32(tl.load(y_ptr + row * cols + column, mask=(column < cols) & (row >= 0), other=0.0))
        if WEIGHT:
            part = part * tl.load(weight_ptr + token * K + k, mask=row >= 0, other=0.0)
        total += part
    tl.store(out_ptr + token * cols + column, _to_bf16(total), mask=column < cols)


def scan(begin: torch.Tensor, demand: torch.Tensor) -> None:
    """begin: [blocks, columns] int32, counts; becomes the sum over the blocks before. demand: [columns], written with the sum over all."""
    blocks, columns = begin.shape
    constants = {"BLOCKS": SCAN_BLOCKS, "EXPERTS": SCAN_EXPERTS, "num_warps": 4}
    launch(_scan_kernel, (cdiv(columns, SCAN_EXPERTS),), begin, demand, blocks, columns, **constants)


def route_map(expert_index: torch.Tensor, num_experts: int, rows: int | None = None) -> RowMap:
    """Kernel twin of `fp8_recipes.reference.route_map`, three launches and no wait for the device.

    expert_index: [T, K] int32. An id outside -1 .. num_experts - 1 is a dropped copy here; the reference, which can look, raises.
    """
    rows = check_routing(expert_index, num_experts, rows)
    check_device(expert_index, "expert_index")
    device, copies = expert_index.device, expert_index.numel()
    blocks = cdiv(copies, COPIES)
    begin = common.empty((blocks, num_experts), torch.int32, device)
    demand = common.empty((num_experts,), torch.int32, device)
    source = common.empty((rows,), torch.int32, device)
    destination = common.empty(tuple(expert_index.shape), torch.int32, device)
    offsets = common.empty((num_experts + 1,), torch.int32, device)
    block_expert = common.empty((rows // TILE,), torch.int32, device)
    counts = common.empty((num_experts,), torch.int32, device)
    if blocks:
        launch(_count_kernel, (blocks,), expert_index, begin, copies, num_experts, COPIES=COPIES, num_warps=4)
    scan(begin, demand)
    outputs = (source, destination, offsets, block_expert, counts)
    constants = {"COPIES": COPIES, "EXPERTS": next_power_of_2(num_experts), "num_warps": PLACE_WARPS}
    launch(_place_kernel, (rows // TILE + blocks,), expert_index, begin, demand, *outputs, copies, rows, num_experts, **constants)
    return RowMap(*outputs)


def _vectors(scale: torch.Tensor) -> tuple[int, int]:
    """(scales per row, lanes that cover them)."""
    per_row = 1 if scale.dim() == 1 else scale.shape[1]
    return per_row, next_power_of_2(per_row)


def gather_rows(
    x: torch.Tensor | ScaledTensor, row_map: RowMap, prob: torch.Tensor | None = None
) -> tuple[torch.Tensor | ScaledTensor, torch.Tensor | None]:
    """Kernel twin of `fp8_recipes.reference.gather_rows`: one launch writes every row of the buffer, padding included."""
    payload = check_gather(x, row_map, prob)
    check_device(payload, "x")
    rows, cols, device = row_map.rows, payload.shape[1], payload.device
    words = payload.view(torch.int32)
    out = common.empty((rows, cols), payload.dtype, device)
    scale = tiles = out_scale = out_tiles = out_prob = None
    scales = scale_lanes = tile_count = tile_lanes = 0
    if isinstance(x, ScaledTensor):
        scale, tiles = x.scale, x.tile_exponent
        out_scale = common.empty((rows, *scale.shape[1:]), torch.float32, device)
        scales, scale_lanes = _vectors(scale)
        if tiles is not None:
            out_tiles = common.empty((rows, tiles.shape[1]), torch.uint8, device)
            tile_count, tile_lanes = _vectors(tiles)
    if prob is not None:
        out_prob = common.empty((rows,), torch.float32, device)

    def as_words(t: torch.Tensor | None) -> torch.Tensor:
        return words if t is None else t.view(torch.int32)  # an absent array is never touched

    quads = words.shape[1] // 4
    block = min(next_power_of_2(words.shape[1]), 4096)
    launch(
        _gather_rows_kernel,
        (rows // PAD_ROWS.value + row_map.tokens,),
        words,
        out.view(torch.int32),
        as_words(scale),
        as_words(out_scale),
        words if tiles is None else tiles,
        words if out_tiles is None else out_tiles,
        as_words(prob),
        as_words(out_prob),
        row_map.source,
        row_map.destination,
        rows,
        quads,
        words.stride(0) // 4,
        scales,
        0 if scale is None else scale.stride(0),
        tile_count,
        0 if tiles is None else tiles.stride(0),
        K=row_map.copies_per_token,
        BLOCK=block,
        SCALES=scale_lanes,
        TILES=tile_lanes,
        PROB=prob is not None,
        num_warps=max(1, min(8, block // (32 * WORDS_PER_THREAD))),
    )
    if not isinstance(x, ScaledTensor):
        return out, out_prob
    assert out_scale is not None
    return ScaledTensor(out, out_scale, x.granularity, tile_exponent=out_tiles), out_prob


def combine_rows(y: torch.Tensor, row_map: RowMap, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.combine_rows`; no atomics, the sum is in the order of k."""
    check_combine(y, row_map, weight)
    return sum_rows(y, row_map.destination, weight)


def sum_rows(y: torch.Tensor, destination: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.permute.sum_rows`."""
    check_device(y, "y")
    (tokens, copies), cols = destination.shape, y.shape[1]
    out = common.empty((tokens, cols), torch.bfloat16, y.device)
    if tokens == 0:
        return out
    block = min(next_power_of_2(cols), COMBINE_COLUMNS)
    launch(
        _combine_rows_kernel,
        (tokens, cdiv(cols, block)),
        y,
        out,
        destination if weight is None else weight,
        destination,
        cols // 8,
        K=copies,
        BLOCK=block,
        WEIGHT=weight is not None,
        num_warps=max(1, min(8, block // 256)),
        enable_fp_fusion=False,  # the reference rounds the product before it adds
    )
    return out


__all__ = ["combine_rows", "gather_rows", "route_map"]
