"""Rows to experts and back: which row of a grouped buffer holds which token, and the moves that follow it.

A grouped buffer has the rows of all experts one group after the other. Every group starts on a multiple of 128 rows, so that a 128-row block belongs to one
expert; what is left of a group's last block is padding. How many rows an expert has is known on the device alone, so the buffer has a static number of
rows, enough for every routing, and nothing here waits for the device. Gathering into the buffer and summing back out of it are each other's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import E8M0_BIAS, SCALE_EXPONENT_MIN
from ..tensor import TILE, ScaledTensor

PADDING_SCALE = 2.0**SCALE_EXPONENT_MIN
"""Scale of a padding row: the smallest, so that it wins no maximum."""
PADDING_TILE_EXPONENT = SCALE_EXPONENT_MIN + E8M0_BIAS
VECTOR = 16
"""Columns of a buffer are a multiple of this: rows start on 16 bytes in every dtype."""


@dataclass(frozen=True)
class RowMap:
    """Where K copies of each of T tokens lie in a grouped buffer of ``rows`` rows; all tensors int32, on one device.

    Copy ``token * K + k`` is the k-th of a token.

    source: [rows], the copy in this row, -1 = padding.
    destination: [T, K], the row of this copy, -1 = dropped.
    offsets: [E+1], first row of each expert, multiples of 128; offsets[E] is the number of rows in use, padding included.
    block_expert: [rows / 128], the expert that the block belongs to, -1 = not in use.
    counts: [E], rows of each expert without padding.
    """

    source: torch.Tensor
    destination: torch.Tensor
    offsets: torch.Tensor
    block_expert: torch.Tensor
    counts: torch.Tensor

    @property
    def rows(self) -> int:
        return self.source.shape[0]

    @property
    def tokens(self) -> int:
        return self.destination.shape[0]

    @property
    def copies_per_token(self) -> int:
        return self.destination.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]


def rows_for(copies: int, num_experts: int) -> int:
    """Rows that hold ``copies`` copies however they are routed: each expert adds at most 127 of padding; a multiple of 128, at least 128."""
    return -(-(copies + num_experts * (TILE - 1)) // TILE) * TILE


def check_routing(expert_index: torch.Tensor, num_experts: int, rows: int | None) -> int:
    """Raise unless the arguments of `route_map` have the right shapes and types; the number of rows of its buffer."""
    if expert_index.dim() != 2 or expert_index.shape[1] == 0:
        raise ValueError(f"expert_index must be [tokens, K] with K >= 1, got shape {tuple(expert_index.shape)}")
    if expert_index.dtype != torch.int32:
        raise TypeError(f"expert_index must be int32, got {expert_index.dtype}; use expert_index.int()")
    if not expert_index.is_contiguous():
        raise ValueError(f"expert_index of strides {expert_index.stride()} is not contiguous; call .contiguous()")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if rows is None:
        return rows_for(expert_index.numel(), num_experts)
    if rows < TILE or rows % TILE:
        raise ValueError(f"rows must be a positive multiple of {TILE}, got {rows}; rows_for(copies, num_experts) gives the number that always suffices")
    return rows


def route_map(expert_index: torch.Tensor, num_experts: int, rows: int | None = None) -> RowMap:
    """The `RowMap` of a routing; an expert's rows are in the order of its copies.

    expert_index: [T, K] int32, the experts of each token, -1 = dropped copy; T may be 0 (every row is then padding).
    rows: of the buffer, a multiple of 128. None: `rows_for`, which always suffices. With fewer, copies that find no row are dropped, the last expert's first.
    Raises ValueError for an id outside -1 .. num_experts - 1. The kernel cannot (it would have to wait for the device) and drops such a copy.
    """
    rows = check_routing(expert_index, num_experts, rows)
    bad = (expert_index < -1) | (expert_index >= num_experts)
    if bool(bad.any()):
        raise ValueError(f"expert_index has {int(expert_index[bad][0])}; ids are 0 .. {num_experts - 1}, and -1 for a dropped copy")
    expert = expert_index.reshape(-1).long()
    expert = torch.where(expert < 0, num_experts, expert)
    demand = torch.bincount(expert, minlength=num_experts + 1)
    ends = ((demand[:num_experts] + TILE - 1) // TILE * TILE).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends))
    order = torch.argsort(expert, stable=True)
    ranks = torch.arange(expert.numel(), device=expert.device) - (demand.cumsum(0) - demand)[expert[order]]
    row = starts[expert[order]] + ranks
    row = torch.where((expert[order] < num_experts) & (row < rows), row, -1)
    destination = torch.empty_like(expert).scatter_(0, order, row)
    source = torch.full((rows,), -1, device=expert.device)
    source[row[row >= 0]] = order[row >= 0]
    offsets = starts.clamp(max=rows)
    counts = torch.minimum(demand[:num_experts], offsets.diff())
    block_expert = torch.searchsorted(offsets[1:], torch.arange(0, rows, TILE, device=expert.device), right=True)
    block_expert = torch.where(block_expert < num_experts, block_expert, -1)
    return RowMap(source.int(), destination.view_as(expert_index).int(), offsets.int(), block_expert.int(), counts.int())


def check_gather(x: torch.Tensor | ScaledTensor, row_map: RowMap, prob: torch.Tensor | None) -> torch.Tensor:
    """Raise unless `gather_rows` takes these; the payload (or the plain tensor itself)."""
    payload = x
    if isinstance(x, ScaledTensor):
        if x.granularity not in ("row", "tile"):
            raise ValueError(f"cannot gather rows of a {x.granularity} payload: its scales are not per row; quantise at 'row' or 'tile' granularity")
        payload = x.payload
        check_row_strides(x)
    assert isinstance(payload, torch.Tensor)
    if payload.dim() != 2 or payload.shape[0] != row_map.tokens:
        raise ValueError(f"the map is of {row_map.tokens} tokens, so x must be [{row_map.tokens}, cols]; got shape {tuple(payload.shape)}")
    if payload is x:
        check_columns(payload, "x")
    if prob is not None and (prob.shape != row_map.destination.shape or prob.dtype != torch.float32 or not prob.is_contiguous()):
        raise ValueError(f"prob must be contiguous fp32 {tuple(row_map.destination.shape)}, got {prob.dtype} {tuple(prob.shape)} with strides {prob.stride()}")
    return payload


def check_row_strides(q: ScaledTensor) -> None:
    """Raise unless every row of ``q`` is contiguous and its payload starts on 16 bytes. Rows may be apart, as those that arrived over the wire are."""
    for name, t in {"payload": q.payload, "scale": q.scale, "tile_exponent": q.tile_exponent}.items():
        if t is not None and t.dim() == 2 and t.stride(1) != 1:
            raise ValueError(f"{name} of strides {t.stride()} has no contiguous rows; call .contiguous()")
    cols, stride, start = q.payload.shape[1], q.payload.stride(0), q.payload.storage_offset()
    if cols == 0 or cols % VECTOR or stride % VECTOR or start % VECTOR:
        raise ValueError(f"payload must have a multiple of {VECTOR} columns, rows {VECTOR} bytes aligned; got {cols} columns, strides {q.payload.stride()}")


def check_columns(x: torch.Tensor, name: str) -> None:
    """Raise unless rows of ``x`` [rows, cols] start on 16 bytes."""
    if x.shape[1] == 0 or x.shape[1] % VECTOR or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous with a multiple of {VECTOR} columns, got shape {tuple(x.shape)} and strides {x.stride()}; pad the columns")


def gather_rows(
    x: torch.Tensor | ScaledTensor, row_map: RowMap, prob: torch.Tensor | None = None
) -> tuple[torch.Tensor | ScaledTensor, torch.Tensor | None]:
    """Every token's row to the rows of its copies; the gradient of `combine_rows`.

    x: [T, H], a tensor or a `ScaledTensor` of row or tile granularity; H a multiple of 16. The rows of a `ScaledTensor` may be views of a buffer of received
    rows (`unpack_rows`), which are then read where they lie. prob: [T, K] fp32.
    Returns (x in the grouped buffer [rows, H], prob [rows] fp32 or None). A padding row is exactly zero: payload 0, scale 2**-126, tile exponent 1, prob 0.
    """
    check_gather(x, row_map, prob)
    padding = row_map.source < 0
    copy = row_map.source.clamp(min=0).long()
    token = copy // row_map.copies_per_token

    def moved(t: torch.Tensor, index: torch.Tensor, fill: float) -> torch.Tensor:
        if t.shape[0] == 0:
            return torch.full((row_map.rows, *t.shape[1:]), fill, dtype=t.dtype, device=t.device)
        return t[index].masked_fill_(padding.view(-1, *[1] * (t.dim() - 1)), fill)

    out_prob = None if prob is None else moved(prob.reshape(-1), copy, 0.0)
    if isinstance(x, torch.Tensor):
        return moved(x, token, 0), out_prob
    payload = moved(x.payload.view(torch.uint8), token, 0).view(x.payload.dtype)
    tiles = None if x.tile_exponent is None else moved(x.tile_exponent, token, PADDING_TILE_EXPONENT)
    return ScaledTensor(payload, moved(x.scale, token, PADDING_SCALE), x.granularity, tile_exponent=tiles), out_prob


def check_combine(y: torch.Tensor, row_map: RowMap, weight: torch.Tensor | None) -> None:
    """Raise unless `combine_rows` takes these."""
    if y.dim() != 2 or y.shape[0] != row_map.rows:
        raise ValueError(f"the map is of {row_map.rows} rows, so y must be [{row_map.rows}, cols]; got shape {tuple(y.shape)}")
    if y.dtype != torch.bfloat16:
        raise TypeError(f"y must be bfloat16, got {y.dtype}")
    check_columns(y, "y")
    if weight is not None and (weight.shape != row_map.destination.shape or weight.dtype != torch.float32 or not weight.is_contiguous()):
        shape = tuple(row_map.destination.shape)
        raise ValueError(f"weight must be contiguous fp32 {shape}, got {weight.dtype} {tuple(weight.shape)} with strides {weight.stride()}")


def combine_rows(y: torch.Tensor, row_map: RowMap, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Each token's copies added up: ``sum_k weight[t, k] * y[destination[t, k]]``, in fp32 in the order of k, rounded once; the gradient of `gather_rows`.

    y: [rows, H] bf16, H a multiple of 16; padding rows are not read. weight: [T, K] fp32, None = 1. Dropped copies add nothing, whatever their weight.
    Returns [T, H] bf16.
    """
    check_combine(y, row_map, weight)
    return sum_rows(y, row_map.destination, weight)


def sum_rows(y: torch.Tensor, destination: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of `combine_rows`: ``sum_k weight[t, k] * y[destination[t, k]]`` over destination [T, K] int32, -1 = nothing."""
    total = torch.zeros(destination.shape[0], y.shape[1], device=y.device)
    for k in range(destination.shape[1] if y.shape[0] else 0):
        row = destination[:, k].long()
        part = y[row.clamp(min=0)].float()
        if weight is not None:
            part = part * weight[:, k, None]
        total += part.masked_fill(row[:, None] < 0, 0.0)
    return total.bfloat16()


def check_copies(values: torch.Tensor, row_map: RowMap) -> None:
    """Raise unless `copies_of_rows` takes these."""
    if values.shape != (row_map.rows,):
        raise ValueError(f"the map is of {row_map.rows} rows, so values must have shape ({row_map.rows},); got {tuple(values.shape)}")
    if values.dtype != torch.float32:
        raise TypeError(f"values must be float32, got {values.dtype}")


def copies_of_rows(values: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """One number per row -> one per copy: [rows] fp32 -> [T, K], 0 for dropped copies. Takes the gradient of prob back to the router."""
    check_copies(values, row_map)
    return values[row_map.destination.clamp(min=0).long()].masked_fill_(row_map.destination < 0, 0.0)
