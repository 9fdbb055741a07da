"""Send maps, packing and unpacking on the GPU: `fp8_recipes.reference.dispatch`, bit for bit, without waiting for the device.

send_map counts in three launches, as route_map does: tokens of each block for each rank, where each block's tokens begin within their rank, every token's
rows. No atomics, so a rank's rows are in the order of the tokens.

pack_rows reads each token once and writes it once per rank it goes to, payload, scale, tile exponents, probabilities and local ids in one launch. Rows start
on 16 bytes and the payload comes first, so nearly everything moves 16 bytes per thread. Unpacking moves ids and probabilities only: gather_rows, which sorts
the received rows by expert, reads payload, scales and tile exponents where they arrived.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.dispatch import HEADER, RowLayout, SendMap, check_pack, check_send, check_sent, received_view
from ..tensor import ScaledTensor
from . import common
from .common import cdiv, check_device, next_power_of_2
from .launch import launch
from .permute import WORDS_PER_THREAD, scan, sum_rows

TOKENS = 64
"""Tokens that one program of the counting kernels ranks against each other, with few ranks."""
CELLS = 1024
"""Tokens x ranks that one program holds, and the most ranks there may be."""
PAD = tl.constexpr(16)
COPIES_PER_PROGRAM = 1024


@triton.jit
def _hits(expert_ptr, token, rank, tokens, num_experts, local_experts, K: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr):
    """(int32 [TOKENS, RANKS]: how many of the token's copies go to the rank; int32 [TOKENS]: ids that do not exist)."""
    copies = tl.zeros((TOKENS, RANKS), tl.int32)
    bad = tl.zeros((TOKENS,), tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(expert_ptr + token.to(tl.int64) * K + k, mask=token < tokens, other=-1)
        valid = (expert >= 0) & (expert < num_experts)
        bad += ((expert != -1) & (valid == 0)).to(tl.int32)
        target = tl.where(valid, expert // local_experts, -1)
        copies += (target[:, None] == rank[None, :]).to(tl.int32)
    return copies, bad


@triton.jit
def _count_tokens_kernel(expert_ptr, begin_ptr, tokens, num_experts, local_experts, ranks, K: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr):
    """begin[block, rank]: how many of the block's tokens go to the rank; column ranks + rank: how many copies; column 2 ranks: ids that do not exist."""
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    rank = tl.arange(0, RANKS)
    copies, bad = _hits(expert_ptr, token, rank, tokens, num_experts, local_experts, K, TOKENS, RANKS)
    begin_ptr += block.to(tl.int64) * (2 * ranks + 1)
    tl.store(begin_ptr + rank, tl.sum((copies > 0).to(tl.int32), axis=0), mask=rank < ranks)
    tl.store(begin_ptr + ranks + rank, tl.sum(copies, axis=0), mask=rank < ranks)
    tl.store(begin_ptr + 2 * ranks, tl.sum(bad, axis=0))


@triton.jit(do_not_specialize=["tag"])
def _place_tokens_kernel(
    expert_ptr, begin_ptr, demand_ptr, destination_ptr, row_of_copy_ptr, header_ptr, tokens, num_experts, local_experts, ranks, tag,
    K: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A token's row for a rank: the rank's first row, plus the tokens in the blocks before, plus those before it in this block."""
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    rank = tl.arange(0, RANKS)
    demand = tl.load(demand_ptr + rank, mask=rank < ranks, other=0)
    start = tl.cumsum(demand, axis=0) - demand
    if block == 0:
        tl.store(header_ptr + rank, demand, mask=rank < ranks)
        tl.store(header_ptr + ranks + rank, tl.load(demand_ptr + ranks + rank, mask=rank < ranks, other=0), mask=rank < ranks)
        tl.store(header_ptr + 2 * ranks, tl.load(demand_ptr + 2 * ranks))
        tl.store(header_ptr + 2 * ranks + 1, num_experts)
        tl.store(header_ptr + 2 * ranks + 2, K)
        tl.store(header_ptr + 2 * ranks + 3, tag)
    copies, _ = _hits(expert_ptr, token, rank, tokens, num_experts, local_experts, K, TOKENS, RANKS)
    hit = (copies > 0).to(tl.int32)
    begin = tl.load(begin_ptr + block.to(tl.int64) * (2 * ranks + 1) + rank, mask=rank < ranks, other=0)
    row = (start + begin)[None, :] + tl.cumsum(hit, axis=0) - hit
    first = token.to(tl.int64) * C
    column = tl.cumsum(hit, axis=1) - hit
    tl.store(destination_ptr + first[:, None] + column, row, mask=(hit > 0) & (token < tokens)[:, None])
    found = tl.sum(hit, axis=1)
    for c in tl.static_range(C):
        tl.store(destination_ptr + first + c, tl.full((TOKENS,), -1, tl.int32), mask=(found <= c) & (token < tokens))
    for k in tl.static_range(K):
        copy = token.to(tl.int64) * K + k
        expert = tl.load(expert_ptr + copy, mask=token < tokens, other=-1)
        valid = (expert >= 0) & (expert < num_experts)
        own = tl.sum(tl.where((expert // local_experts)[:, None] == rank[None, :], row, 0), axis=1)
        tl.store(row_of_copy_ptr + copy, tl.where(valid, own, -1), mask=token < tokens)


@triton.jit
def _pack_rows_kernel(
    payload_ptr, scale_ptr, tile_ptr, prob_ptr, expert_ptr, destination_ptr, row_of_copy_ptr, out_ptr, half_ptr, byte_ptr,
    quads, row_quads, tiles, local_experts, used,
    K: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One token. out, half, byte: the send buffer as int32, int16 and bytes; a row of it is four times ``row_quads`` words. K = 0: neither ids nor
    probabilities; TILES = 0: no tile exponents."""
    words = quads * 4
    token = tl.program_id(0).to(tl.int64)
    destination_ptr += token * C
    for first in range(0, words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        value = tl.load(payload_ptr + token * words + word, mask=word < words, other=0)
        for c in tl.static_range(C):
            row = tl.load(destination_ptr + c).to(tl.int64)
            tl.store(out_ptr + row * (row_quads * 4) + word, value, mask=(word < words) & (row >= 0))
    scale = tl.load(scale_ptr + token)
    id_at = words * 4 + 4 + 4 * K
    tile_at = id_at + 2 * K
    for c in tl.static_range(C):
        row = tl.load(destination_ptr + c)
        present = row >= 0
        out_row = out_ptr + row.to(tl.int64) * (row_quads * 4)
        byte_row = byte_ptr + row.to(tl.int64) * (row_quads * 16)
        tl.store(out_row + words, scale, mask=present)
        if K:
            lane = tl.arange(0, LANES)
            copy = token * K + lane
            expert = tl.load(expert_ptr + copy, mask=lane < K, other=-1)
            mine = tl.load(row_of_copy_ptr + copy, mask=lane < K, other=-1) == row
            prob = tl.load(prob_ptr + copy, mask=(lane < K) & mine, other=0)
            tl.store(out_row + words + 1 + lane, prob, mask=(lane < K) & present)
            local = tl.where(mine, expert % local_experts, -1).to(tl.int16)
            tl.store(half_ptr + row.to(tl.int64) * (row_quads * 8) + id_at // 2 + lane, local, mask=(lane < K) & present)
        if TILES:
            tile = tl.arange(0, TILES)
            exponent = tl.load(tile_ptr + token * tiles + tile, mask=tile < tiles, other=0)
            tl.store(byte_row + tile_at + tile, exponent, mask=(tile < tiles) & present)
        tail = used + tl.arange(0, PAD)
        tl.store(byte_row + tail, tl.zeros((PAD,), tl.uint8), mask=(tail < row_quads * 16) & present)


@triton.jit
def _unpack_routing_kernel(word_ptr, half_ptr, prob_ptr, expert_ptr, copies, row_quads, prob_at, id_at, K: tl.constexpr, BLOCK: tl.constexpr):
    """Probabilities and ids of received rows; word, half: the buffer as int32 and int16."""
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (copy // K).to(tl.int64)
    prob = tl.load(word_ptr + row * (row_quads * 4) + prob_at // 4 + copy % K, mask=copy < copies)
    tl.store(prob_ptr + copy, prob, mask=copy < copies)
    local = tl.load(half_ptr + row * (row_quads * 8) + id_at // 2 + copy % K, mask=copy < copies)
    tl.store(expert_ptr + copy, local.to(tl.int32), mask=copy < copies)


@triton.jit
def _copies_of_sent_kernel(value_ptr, row_of_copy_ptr, out_ptr, copies, K: tl.constexpr, BLOCK: tl.constexpr):
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_copy_ptr + copy, mask=copy < copies, other=-1)
    value = tl.load(value_ptr + row.to(tl.int64) * K + copy % K, mask=row >= 0, other=0.0)
    tl.store(out_ptr + copy, value, mask=copy < copies)


def send_map(expert_index: torch.Tensor, num_experts: int, ranks: int, tag: int = 0) -> SendMap:
    """Kernel twin of `fp8_recipes.reference.send_map`: three launches, no wait for the device. At most 1024 ranks."""
    check_send(expert_index, num_experts, ranks)
    check_device(expert_index, "expert_index")
    (tokens, copies), device = expert_index.shape, expert_index.device
    lanes = next_power_of_2(ranks)
    if lanes > CELLS:
        raise ValueError(f"cannot count tokens for {ranks} ranks: at most {CELLS} are supported")
    size = min(TOKENS, CELLS // lanes)
    blocks = max(1, cdiv(tokens, size))  # the first one also writes the header
    columns = 2 * ranks + 1
    begin, demand = common.empty((blocks, columns), torch.int32, device), common.empty((columns,), torch.int32, device)
    destination = common.empty((tokens, min(copies, ranks)), torch.int32, device)
    row_of_copy = common.empty((tokens, copies), torch.int32, device)
    header = common.empty((2 * ranks + HEADER,), torch.int32, device)
    numbers = (tokens, num_experts, num_experts // ranks, ranks)
    constants = {"K": copies, "TOKENS": size, "RANKS": lanes, "num_warps": 4}
    launch(_count_tokens_kernel, (blocks,), expert_index, begin, *numbers, **constants)
    scan(begin, demand)
    outputs = (destination, row_of_copy, header)
    constants = {"K": copies, "C": destination.shape[1], "TOKENS": size, "RANKS": lanes, "num_warps": 4}
    launch(_place_tokens_kernel, (blocks,), expert_index, begin, demand, *outputs, *numbers, tag, **constants)
    return SendMap(*outputs, num_experts, ranks)


def pack_rows(
    q: ScaledTensor, send: SendMap, rows: int, expert_index: torch.Tensor | None = None, prob: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """Kernel twin of `fp8_recipes.reference.pack_rows`: one launch. ``rows`` must be what the header counts, or rows stay unwritten."""
    layout = check_pack(q, send, rows, expert_index, prob)
    check_device(q.payload, "q")
    out = common.empty((rows, layout.nbytes), torch.uint8, q.device)
    if rows == 0:
        return out
    words = out.view(torch.int32)  # also stands for an absent array, which is never touched
    block = min(next_power_of_2(layout.cols // 4), 4096)
    launch(
        _pack_rows_kernel,
        (send.tokens,),
        q.payload.view(torch.int32),
        q.scale.view(torch.int32),
        out if q.tile_exponent is None else q.tile_exponent,
        words if prob is None else prob.view(torch.int32),
        words if expert_index is None else expert_index,
        send.destination,
        send.row_of_copy,
        words,
        out.view(torch.int16),
        out,
        layout.cols // 16,
        layout.nbytes // 16,
        layout.tiles,
        send.local_experts,
        layout.used,
        K=layout.copies,
        LANES=next_power_of_2(max(1, layout.copies)),
        C=send.destination.shape[1],
        BLOCK=block,
        TILES=next_power_of_2(layout.tiles) if layout.tiles else 0,
        num_warps=max(1, min(8, block // (32 * WORDS_PER_THREAD))),
    )
    return out


def unpack_rows(buffer: torch.Tensor, layout: RowLayout, dtype: torch.dtype) -> tuple[ScaledTensor, torch.Tensor | None, torch.Tensor | None]:
    """Kernel twin of `fp8_recipes.reference.unpack_rows`: one launch for ids and probabilities; the rest stays in the buffer."""
    q = received_view(buffer, layout, dtype)
    check_device(buffer, "buffer")
    if not layout.copies:
        return q, None, None
    shape = (buffer.shape[0], layout.copies)
    prob, expert = common.empty(shape, torch.float32, buffer.device), common.empty(shape, torch.int32, buffer.device)
    copies = prob.numel()
    if copies:
        launch(
            _unpack_routing_kernel,
            (cdiv(copies, COPIES_PER_PROGRAM),),
            buffer.view(torch.int32),
            buffer.view(torch.int16),
            prob.view(torch.int32),
            expert,
            copies,
            layout.nbytes // 16,
            layout.prob_at,
            layout.id_at,
            K=layout.copies,
            BLOCK=COPIES_PER_PROGRAM,
            num_warps=4,
        )
    return q, expert, prob


def combine_sent(y: torch.Tensor, send: SendMap) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.combine_sent`: the kernel of combine_rows over the ranks instead of the copies."""
    check_sent(y, send, torch.bfloat16)
    return sum_rows(y, send.destination)


def copies_of_sent(values: torch.Tensor, send: SendMap) -> torch.Tensor:
    """Kernel twin of `fp8_recipes.reference.copies_of_sent`."""
    check_sent(values, send, torch.float32)
    check_device(values, "values")
    out = common.empty(tuple(send.row_of_copy.shape), torch.float32, values.device)
    copies = out.numel()
    if copies:
        grid = (cdiv(copies, COPIES_PER_PROGRAM),)
        launch(_copies_of_sent_kernel, grid, values, send.row_of_copy, out, copies, K=send.copies_per_token, BLOCK=COPIES_PER_PROGRAM, num_warps=4)
    return out


__all__ = ["combine_sent", "copies_of_sent", "pack_rows", "send_map", "unpack_rows"]
