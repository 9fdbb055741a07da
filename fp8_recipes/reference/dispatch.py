"""Tokens to the ranks that hold their experts: which row of a send buffer holds which token, what a row on the wire looks like, and the way back.

A token goes once to every rank that holds at least one of its experts, not once per copy: with top-8 over 8 ranks that is two thirds of the rows. The rank
that receives it routes it to its own experts and adds the copies up, so that one row comes back. Everything about a token travels in one row of bytes, so
that a dispatch is one collective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tensor import ScaledTensor
from .permute import VECTOR, check_columns, sum_rows

HEADER = 4
"""What follows the two counts per rank in `SendMap.header`: how many ids do not exist, num_experts, K, and the caller's tag."""
MAX_LOCAL_EXPERTS = 2**15 - 1
"""An expert's id travels in 16 bits."""


@dataclass(frozen=True)
class SendMap:
    """Where T tokens lie in a send buffer: ranks one after the other, a rank's rows in the order of the tokens, no padding. All tensors int32, on one device.

    destination: [T, C], C = min(K, ranks): the rows of a token, one per rank it goes to, in the order of the ranks; -1 behind the last.
    row_of_copy: [T, K], the row that carries this copy, -1 = dropped. Copies for one rank share a row.
    header: [2 ranks + 4]: rows for each rank, copies for each rank (those whose expert is there), number of ids outside -1 .. num_experts - 1, num_experts, K,
        tag. What the ranks tell each other.
    num_experts, ranks: of the whole group; every rank holds num_experts / ranks of them, in order.
    """

    destination: torch.Tensor
    row_of_copy: torch.Tensor
    header: torch.Tensor
    num_experts: int
    ranks: int

    @property
    def tokens(self) -> int:
        return self.row_of_copy.shape[0]

    @property
    def copies_per_token(self) -> int:
        return self.row_of_copy.shape[1]

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks


@dataclass(frozen=True)
class RowLayout:
    """Bytes of one row on the wire: payload, scale (fp32), K probabilities (fp32), K local expert ids (int16), tile exponents, zeros up to 16 bytes.

    cols: of the payload, a multiple of 16. tiles: tile exponents per row, 0 = none. copies: K, 0 = neither probabilities nor ids (the backward pass, whose
    receiver still has them).
    """

    cols: int
    tiles: int
    copies: int

    @property
    def prob_at(self) -> int:
        return self.cols + 4

    @property
    def id_at(self) -> int:
        return self.prob_at + 4 * self.copies

    @property
    def tile_at(self) -> int:
        return self.id_at + 2 * self.copies

    @property
    def used(self) -> int:
        return self.tile_at + self.tiles

    @property
    def nbytes(self) -> int:
        return -(-self.used // VECTOR) * VECTOR


def row_layout(q: ScaledTensor, copies: int) -> RowLayout:
    """The `RowLayout` of the rows of ``q`` with ``copies`` probabilities and ids each. Raises ValueError for a payload that cannot travel row by row."""
    if q.granularity != "row":
        raise ValueError(f"cannot send rows of a {q.granularity} payload: it has more than one scale per row; quantise at granularity 'row' or with fold='row'")
    for name, t in {"payload": q.payload, "scale": q.scale, "tile_exponent": q.tile_exponent}.items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} of strides {t.stride()} is not contiguous; call .contiguous()")
    check_columns(q.payload, "payload")
    return RowLayout(q.shape[1], 0 if q.tile_exponent is None else q.tile_exponent.shape[1], copies)


def check_send(expert_index: torch.Tensor, num_experts: int, ranks: int) -> None:
    """Raise unless the arguments of `send_map` have the right shapes and types."""
    if expert_index.dim() != 2 or expert_index.shape[1] == 0:
        raise ValueError(f"expert_index must be [tokens, K] with K >= 1, got shape {tuple(expert_index.shape)}")
    if expert_index.dtype != torch.int32:
        raise TypeError(f"expert_index must be int32, got {expert_index.dtype}; use expert_index.int()")
    if not expert_index.is_contiguous():
        raise ValueError(f"expert_index of strides {expert_index.stride()} is not contiguous; call .contiguous()")
    if ranks < 1 or num_experts < 1 or num_experts % ranks:
        raise ValueError(f"num_experts = {num_experts} cannot be shared equally by {ranks} ranks; use a multiple of the group's size")
    if num_experts // ranks > MAX_LOCAL_EXPERTS:
        raise ValueError(f"{num_experts // ranks} experts per rank are more than the {MAX_LOCAL_EXPERTS} whose ids travel in 16 bits; use more ranks")


def send_map(expert_index: torch.Tensor, num_experts: int, ranks: int, tag: int = 0) -> SendMap:
    """The `SendMap` of a routing over ``ranks`` ranks with num_experts / ranks experts each.

    expert_index: [T, K] int32, ids in the whole model, -1 = dropped copy; T may be 0. tag: any number, for the header.
    An id outside -1 .. num_experts - 1 is a dropped copy and counts in the header, so that all ranks can raise together.
    """
    check_send(expert_index, num_experts, ranks)
    expert = expert_index.long()
    valid = (expert >= 0) & (expert < num_experts)
    rank = torch.where(valid, expert // (num_experts // ranks), ranks)
    hit = torch.zeros(expert.shape[0], ranks + 1, dtype=torch.bool, device=expert.device).scatter_(1, rank, True)[:, :ranks].long()
    counts = hit.sum(0)
    row = counts.cumsum(0) - counts + hit.cumsum(0) - 1
    row_of_copy = torch.where(valid, row.gather(1, rank.clamp(max=ranks - 1)), -1)
    behind = int(row.numel())
    destination = torch.where(hit > 0, row, behind).sort(dim=1).values[:, : min(expert.shape[1], ranks)]
    destination = torch.where(destination < behind, destination, -1)
    bad = (~valid & (expert != -1)).sum()
    copies = (rank[:, :, None] == torch.arange(ranks, device=expert.device)).sum((0, 1))
    header = torch.cat((counts, copies, bad[None], counts.new_tensor((num_experts, expert.shape[1], tag))))
    return SendMap(destination.int().contiguous(), row_of_copy.int(), header.int(), num_experts, ranks)


def check_pack(q: ScaledTensor, send: SendMap, rows: int, expert_index: torch.Tensor | None, prob: torch.Tensor | None) -> RowLayout:
    """Raise unless `pack_rows` takes these; the layout of its rows."""
    if q.shape[0] != send.tokens:
        raise ValueError(f"the map is of {send.tokens} tokens, so q must be [{send.tokens}, cols]; got shape {tuple(q.shape)}")
    if rows < 0:
        raise ValueError(f"rows must be the number of rows to send, at least 0, got {rows}")
    if (expert_index is None) != (prob is None):
        raise ValueError("expert_index and prob travel together: give both (forward) or neither (backward)")
    shape = tuple(send.row_of_copy.shape)
    for name, t, dtype in (("expert_index", expert_index, torch.int32), ("prob", prob, torch.float32)):
        if t is not None and (t.shape != shape or t.dtype != dtype or not t.is_contiguous()):
            raise ValueError(f"{name} must be contiguous {dtype} {shape}, got {t.dtype} {tuple(t.shape)} with strides {t.stride()}")
    return row_layout(q, 0 if prob is None else send.copies_per_token)


def pack_rows(q: ScaledTensor, send: SendMap, rows: int, expert_index: torch.Tensor | None = None, prob: torch.Tensor | None = None) -> torch.Tensor:
    """The send buffer: every token's row once per rank it goes to, [rows, layout.nbytes] uint8.

    q: [T, cols] of row granularity. rows: of the buffer, a host number (the header's counts added up). expert_index, prob: [T, K] int32 and fp32, or neither.
    In a row for rank r, copies for other ranks and dropped ones have id -1 and probability 0; ids count from the first expert of rank r.
    """
    layout = check_pack(q, send, rows, expert_index, prob)
    out = torch.zeros(rows, layout.nbytes, dtype=torch.uint8, device=q.device)
    for c in range(send.destination.shape[1]):
        row = send.destination[:, c].long()
        token = (row >= 0).nonzero()[:, 0]
        row = row[token]
        out[row, : layout.cols] = q.payload.view(torch.uint8)[token]
        out[row, layout.cols : layout.prob_at] = q.scale[token, None].view(torch.uint8)
        if expert_index is not None and prob is not None:
            mine = send.row_of_copy[token] == row[:, None]
            out[row, layout.prob_at : layout.id_at] = torch.where(mine, prob[token], 0.0).view(torch.uint8)
            ids = torch.where(mine, expert_index[token] % send.local_experts, -1)
            out[row, layout.id_at : layout.tile_at] = ids.short().view(torch.uint8)
        if q.tile_exponent is not None:
            out[row, layout.tile_at : layout.used] = q.tile_exponent[token]
    return out


def check_unpack(buffer: torch.Tensor, layout: RowLayout) -> None:
    """Raise unless `unpack_rows` takes these."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 2 or buffer.shape[1] != layout.nbytes or not buffer.is_contiguous():
        raise ValueError(f"buffer must be contiguous uint8 [rows, {layout.nbytes}], got {buffer.dtype} {tuple(buffer.shape)} with strides {buffer.stride()}")


def unpack_rows(buffer: torch.Tensor, layout: RowLayout, dtype: torch.dtype) -> tuple[ScaledTensor, torch.Tensor | None, torch.Tensor | None]:
    """Received rows [R, layout.nbytes] uint8 -> (q [R, cols] of row granularity, local expert ids [R, K] int32, prob [R, K] fp32).

    dtype: of the payload. q stays where it is: its tensors are views of the buffer, which `gather_rows` takes. Ids and prob are copied; None where the layout
    has none.
    """
    q = received_view(buffer, layout, dtype)
    if not layout.copies:
        return q, None, None
    ids, prob = buffer[:, layout.id_at : layout.tile_at], buffer[:, layout.prob_at : layout.id_at]
    return q, ids.view(torch.int16).int().contiguous(), prob.clone(memory_format=torch.contiguous_format).view(torch.float32)


def received_view(buffer: torch.Tensor, layout: RowLayout, dtype: torch.dtype) -> ScaledTensor:
    """Payload, scales and tile exponents of received rows, as views."""
    check_unpack(buffer, layout)
    scale = buffer[:, layout.cols : layout.prob_at].view(torch.float32)[:, 0]
    tiles = buffer[:, layout.tile_at : layout.used] if layout.tiles else None
    return ScaledTensor(buffer[:, : layout.cols].view(dtype), scale, "row", tile_exponent=tiles)


def check_sent(values: torch.Tensor, send: SendMap, dtype: torch.dtype) -> None:
    """Raise unless ``values`` [rows sent, cols] can come back through the map."""
    if values.dim() != 2 or values.dtype != dtype or not values.is_contiguous():
        raise ValueError(f"rows that come back must be contiguous {dtype} [rows, cols], got {values.dtype} {tuple(values.shape)} strides {values.stride()}")
    if dtype == torch.bfloat16:
        check_columns(values, "rows that come back")
    elif values.shape[1] != send.copies_per_token:
        raise ValueError(f"one value per copy must be [rows, {send.copies_per_token}], got shape {tuple(values.shape)}")


def combine_sent(y: torch.Tensor, send: SendMap) -> torch.Tensor:
    """Rows that come back from the ranks, in the order in which they were sent, added up per token in fp32 in the order of the ranks, rounded once.

    y: [rows sent, H] bf16. Returns [T, H] bf16; zero for a token that went nowhere.
    """
    check_sent(y, send, torch.bfloat16)
    return sum_rows(y, send.destination)


def copies_of_sent(values: torch.Tensor, send: SendMap) -> torch.Tensor:
    """One fp32 value per copy, as it comes back: [rows sent, K] -> [T, K], each from the rank that holds the copy's expert; 0 for dropped copies."""
    check_sent(values, send, torch.float32)
    if values.shape[0] == 0:
        return torch.zeros(send.row_of_copy.shape, device=values.device)
    return values.gather(0, send.row_of_copy.clamp(min=0).long()).masked_fill_(send.row_of_copy < 0, 0.0)
