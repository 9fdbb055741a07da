"""Tokens to their experts' ranks in FP8, and results back in bf16: one interface, three ways to travel. No autograd; `nn.moe` calls these from both passes.

    plan = d.plan(expert_index, num_experts)              who sends how many rows to whom: the only wait of the host, and it comes as late as it can
    q', index', prob' = d.dispatch(q, prob, plan)         payload, scales, tile exponents, local expert ids and probabilities: one buffer, one collective
    y = d.combine(y', plan)                               one bf16 row per token and rank comes back; summed in fp32 in the order of the ranks
    dprob = d.combine_prob(dprob', plan)                  and one fp32 number per copy, for the router

`Local` is the identity, for a model without expert parallelism. `AllToAll` runs on any backend with all_to_all_single (NCCL; gloo on the CPU). `DeepEP` uses
DeepSeek's library; it has been run against a stand-in of that library only, never against the library itself. The gradient of a dispatch is a combine with
the same plan, and the other way round: dispatch(q, None, plan) sends gradients, without ids and probabilities, which the receiver still has.

A rank that leaves the group while the others wait is an error on all of them, at the latest when the process group's timeout ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist

from .. import ops
from ..reference.dispatch import HEADER, SendMap, check_send, row_layout
from ..tensor import TILE, ScaledTensor

REFUSED = -1
"""Tag of a rank whose arguments are wrong."""
CARRIER_COLUMNS = 256
"""Columns of the rows that accompany one number per copy through DeepEP."""
Dispatched = tuple[ScaledTensor, torch.Tensor | None, torch.Tensor | None]


class Dispatcher(Protocol):
    """What `nn.moe` asks of a way to travel. T tokens of this rank, R received rows, K copies per token, L local experts."""

    @property
    def size(self) -> int:
        """Ranks that share the experts."""

    def plan(self, expert_index: torch.Tensor, num_experts: int) -> Any:
        """expert_index: [T, K] int32, ids in the whole model, -1 = dropped copy. num_experts: of the whole model, a multiple of `size`."""

    def dispatch(self, q: ScaledTensor, prob: torch.Tensor | None, plan: Any) -> Dispatched:
        """q: [T, H] of row granularity. prob: [T, K] fp32, None in the backward pass. Returns q [R, H], local ids [R, K] int32 (-1: not here), prob [R, K]."""

    def received_copies(self, plan: Any) -> int:
        """Copies whose expert is on this rank, or an upper bound: how large the grouped buffer must be. After the forward dispatch; waits for nothing."""

    def combine(self, y: torch.Tensor, plan: Any) -> torch.Tensor:
        """y: [R, H] bf16, the sum over the local experts of each received row. Returns [T, H] bf16."""

    def combine_prob(self, dprob: torch.Tensor, plan: Any) -> torch.Tensor:
        """dprob: [R, K] fp32, 0 where a copy is not here. Returns [T, K] fp32."""


def check_rows(t: torch.Tensor, rows: int, name: str) -> None:
    if t.dim() != 2 or t.shape[0] != rows or not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous [{rows}, cols], one row for each that the plan has here; got {tuple(t.shape)}, strides {t.stride()}")


class Local:
    """Every expert is here: nothing travels."""

    size = 1

    def plan(self, expert_index: torch.Tensor, num_experts: int) -> torch.Tensor:
        check_send(expert_index, num_experts, 1)
        return expert_index

    def dispatch(self, q: ScaledTensor, prob: torch.Tensor | None, plan: torch.Tensor) -> Dispatched:
        check_rows(q.payload, plan.shape[0], "q")
        return (q, None, None) if prob is None else (q, plan, prob)

    def received_copies(self, plan: torch.Tensor) -> int:
        return plan.numel()

    def combine(self, y: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        check_rows(y, plan.shape[0], "y")
        return y

    def combine_prob(self, dprob: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        check_rows(dprob, plan.shape[0], "dprob")
        return dprob


@dataclass
class Plan:
    """Where the rows of one routing go. Made by `AllToAll.plan`; everything that waits for the device is behind `splits`."""

    expert_index: torch.Tensor
    send: SendMap
    headers: torch.Tensor
    """[ranks, 2 ranks + 4] int32 on the host: every rank's `SendMap.header`; complete once ``arrived`` is."""
    arrived: torch.cuda.Event | None
    rank: int
    _splits: tuple[list[int], list[int]] | None = field(default=None, repr=False)

    @property
    def splits(self) -> tuple[list[int], list[int]]:
        """(rows to each rank, rows from each rank). The first use waits for the counts; raises on every rank if any rank's routing is wrong."""
        if self._splits is None:
            if self.arrived is not None:
                self.arrived.synchronize()
            check_headers(self.headers, self.rank)
            counts = self.headers[:, : self.send.ranks]
            self._splits = counts[self.rank].tolist(), counts[:, self.rank].tolist()
        return self._splits

    @property
    def sent_rows(self) -> int:
        """Rows that this rank sends, those to itself included."""
        return sum(self.splits[0])

    @property
    def received_rows(self) -> int:
        """R: rows that this rank receives, its own included."""
        return sum(self.splits[1])

    @property
    def received_copies(self) -> int:
        """Copies among them whose expert is on this rank: at least R, at most K R."""
        _ = self.splits  # waits for the headers and checks them
        return int(self.headers[:, self.send.ranks + self.rank].sum())


def check_headers(headers: torch.Tensor, rank: int) -> None:
    """Raise if the ranks' headers [ranks, 2 ranks + 4] do not fit together: the same message on every rank, because every rank sees all headers."""
    bad, num_experts, copies, tag = headers[:, -HEADER:].unbind(1)
    refused = [r for r, t in enumerate(tag.tolist()) if t == REFUSED]
    if refused:
        raise ValueError(f"rank {rank} stops because expert_index or num_experts of rank {refused} cannot be planned; the error there says why")
    for name, values in (("num_experts", num_experts), ("K", copies), ("number of plans so far", tag)):
        if bool((values != values[0]).any()):
            shown = ", ".join(f"{v} on rank {r}" for r, v in enumerate(values.tolist()))
            raise ValueError(f"the ranks do not fit together: {name} is {shown}; give every rank the same model and the same order of calls")
    if bool(bad.any()):
        where = ", ".join(f"{n} on rank {r}" for r, n in enumerate(bad.tolist()) if n)
        raise ValueError(f"expert_index has ids outside -1 .. {int(num_experts[0]) - 1}: {where}; ids count the experts of the whole model, -1 drops a copy")


class AllToAll:
    """One all_to_all_single of packed rows, over a process group (None: the default one); its ranks hold num_experts / size experts each, in order.

    Every plan compares experts, K and the number of plans, so that wrong routing on one rank is an error on all. Columns and format are compared when a
    dispatcher first meets them; should one rank alone change them later, the collective fails as it does when a rank dies.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._plans = 0
        self._agreed: set[tuple[object, ...]] = set()

    def plan(self, expert_index: torch.Tensor, num_experts: int) -> Plan:
        """Counts this rank's rows on the device and starts to tell the others; on a GPU the host waits, and errors come, when the counts are first used.

        Launch what does not depend on them (the cast) between this and `dispatch`.
        """
        self._plans += 1
        try:
            send = ops.send_map(expert_index, num_experts, self.size, tag=self._plans)
        except (TypeError, ValueError):
            self._tell(torch.full((2 * self.size + HEADER,), REFUSED, dtype=torch.int32, device=expert_index.device))  # the others wait for this rank's header
            raise
        headers = self._tell(send.header)
        if not headers.is_cuda:
            plan = Plan(expert_index, send, headers, None, self.rank)
            _ = plan.splits  # nothing to wait for: wrong routing raises here
            return plan
        host = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True)
        host.copy_(headers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Plan(expert_index, send, host, arrived, self.rank)

    @torch.no_grad()
    def dispatch(self, q: ScaledTensor, prob: torch.Tensor | None, plan: Plan) -> Dispatched:
        copies = 0 if prob is None else plan.send.copies_per_token
        layout = row_layout(q, copies)
        self._agree(what="rows", columns=layout.cols, tile_exponents=layout.tiles, K=copies, format=str(q.payload.dtype))
        sent, received = plan.splits
        packed = ops.pack_rows(q, plan.send, sum(sent), None if prob is None else plan.expert_index, prob)
        return ops.unpack_rows(self._exchange(packed, sent, received), layout, q.payload.dtype)

    def received_copies(self, plan: Plan) -> int:
        return plan.received_copies

    @torch.no_grad()
    def combine(self, y: torch.Tensor, plan: Plan) -> torch.Tensor:
        sent, received = plan.splits
        check_rows(y, sum(received), "y")
        self._agree(what="results", columns=y.shape[1], dtype=str(y.dtype))
        back = self._exchange(y.view(torch.uint8), received, sent)
        return ops.combine_sent(back.view(y.dtype), plan.send)

    @torch.no_grad()
    def combine_prob(self, dprob: torch.Tensor, plan: Plan) -> torch.Tensor:
        sent, received = plan.splits
        check_rows(dprob, sum(received), "dprob")
        back = self._exchange(dprob.view(torch.uint8), received, sent)
        return ops.copies_of_sent(back.view(dprob.dtype), plan.send)

    def _tell(self, header: torch.Tensor) -> torch.Tensor:
        """Every rank's header, [ranks, 2 ranks + 4]."""
        headers = header.new_empty(self.size, header.numel())
        self._collective(dist.all_gather_into_tensor, headers.view(-1), header)
        return headers

    def _exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Rows of bytes, ranks one after the other -> the rows for this rank, in the order of the ranks they come from."""
        out = rows.new_empty(sum(received), rows.shape[1])
        self._collective(dist.all_to_all_single, out, rows, received, sent)
        return out

    def _collective(self, call: Any, *args: Any) -> None:
        try:
            call(*args, group=self.group)
        except RuntimeError as error:
            text = f"{call.__name__} over {self.size} ranks failed on rank {self.rank}: a rank died, left the group or did not call it within the timeout"
            raise RuntimeError(f"{text} ({error})") from error

    def _agree(self, **terms: object) -> None:
        """Raise on every rank, with what each has, unless all have the same terms. Terms that were agreed on once are not exchanged again."""
        key = tuple(terms.items())
        if key in self._agreed:
            return
        everyone: list[Any] = [None] * self.size
        self._collective(dist.all_gather_object, everyone, terms)
        if any(other != terms for other in everyone):
            raise_disagreement(everyone)
        self._agreed.add(key)


def raise_disagreement(everyone: list[dict[str, object]]) -> NoReturn:
    """everyone: the terms of each rank, which are not all the same."""
    shown = "; ".join(f"rank {r}: " + ", ".join(f"{k} {v}" for k, v in terms.items()) for r, terms in enumerate(everyone))
    raise ValueError(f"the ranks do not fit together ({shown}); give every rank the same model, recipe and order of calls")


@dataclass
class DeepEPPlan:
    """expert_index: [T, K] int64, dropped copies -1. handle: what the library remembers of the forward dispatch, with which everything else travels.
    copies: for this rank's experts, known after that dispatch."""

    expert_index: torch.Tensor
    num_experts: int
    handle: Any = None
    copies: int = 0


class DeepEP:
    """DeepSeek's library behind the same interface: its kernels for one node over NVLink, or for several with RDMA. For E4M3 and E5M2 payloads whose columns
    are a multiple of 128. The library moves one fp32 word per 128 columns; here its exponent field is the row's scale and its lowest byte the tile's exponent.

    The counts are exchanged inside the forward dispatch, where the host waits. An id outside the experts is a dropped copy. NEVER RUN with the library (1.x,
    class deep_ep.Buffer): tests/nn/test_dispatch.py checks these calls against a stand-in with the documented semantics.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        try:
            import deep_ep
        except ImportError as error:
            raise RuntimeError("dispatch with DeepEP needs the package deep_ep (github.com/deepseek-ai/DeepEP); install it or use AllToAll") from error
        self._library = deep_ep
        self.group = group if group is not None else dist.group.WORLD
        self.size = dist.get_world_size(self.group)
        self._buffer: Any = None
        self._hidden_bytes = 0

    def plan(self, expert_index: torch.Tensor, num_experts: int) -> DeepEPPlan:
        check_send(expert_index, num_experts, self.size)
        return DeepEPPlan(torch.where((expert_index >= 0) & (expert_index < num_experts), expert_index, -1).long(), num_experts)

    @torch.no_grad()
    def dispatch(self, q: ScaledTensor, prob: torch.Tensor | None, plan: DeepEPPlan) -> Dispatched:
        check_rows(q.payload, plan.expert_index.shape[0], "q")
        x = (q.payload.view(torch.float8_e4m3fn), scale_words(q))  # the library looks at the type and moves bytes
        buffer = self._reserve(q.shape[1])
        index, weight = None, None
        if prob is None:
            if plan.handle is None:
                raise RuntimeError("this plan has not been dispatched with probabilities yet, so the library knows no handle; dispatch forward first")
            received = buffer.dispatch(x, handle=plan.handle)[0]
        else:
            per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(plan.expert_index, plan.num_experts)
            received, index, weight, copies, plan.handle, _ = buffer.dispatch(
                x,
                topk_idx=plan.expert_index,
                topk_weights=prob,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
            index, plan.copies = index.int(), sum(copies)
        payload, words = received
        return from_scale_words(payload.view(q.payload.dtype), words, q.tile_exponent is not None), index, weight

    def received_copies(self, plan: DeepEPPlan) -> int:
        return plan.copies

    @torch.no_grad()
    def combine(self, y: torch.Tensor, plan: DeepEPPlan) -> torch.Tensor:
        return self._reserve(y.shape[1]).combine(y, plan.handle)[0]

    @torch.no_grad()
    def combine_prob(self, dprob: torch.Tensor, plan: DeepEPPlan) -> torch.Tensor:
        # The library takes one number per copy only beside bf16 rows: the narrowest ones go along.
        carrier = torch.zeros(dprob.shape[0], CARRIER_COLUMNS, dtype=torch.bfloat16, device=dprob.device)
        return self._reserve(CARRIER_COLUMNS).combine(carrier, plan.handle, topk_weights=dprob)[1]

    def _reserve(self, columns: int) -> Any:
        """The library's buffer, large enough for bf16 rows of ``columns``."""
        hidden_bytes = 2 * columns
        if self._buffer is None or hidden_bytes > self._hidden_bytes:
            kind = self._library.Buffer
            configs = (kind.get_dispatch_config(self.size), kind.get_combine_config(self.size))
            nvlink = max(c.get_nvl_buffer_size_hint(hidden_bytes, self.size) for c in configs)
            rdma = max(c.get_rdma_buffer_size_hint(hidden_bytes, self.size) for c in configs)
            self._buffer, self._hidden_bytes = kind(self.group, nvlink, rdma), hidden_bytes
        return self._buffer


_EXPONENT, _NAN = 0x7F800000, 0x7FC00000
"""Bits of an fp32 value: the exponent, a quiet NaN."""


def scale_words(q: ScaledTensor) -> torch.Tensor:
    """[T, cols / 128] fp32: in every word the row's scale, a power of two, with the tile's exponent in the lowest byte of the mantissa. A scale that is none
    travels as NaN, as it would end in a later fold: there is no room for its mantissa."""
    layout = row_layout(q, 0)
    if layout.cols % TILE:
        raise ValueError(f"DeepEP moves one scale per {TILE} columns, so the columns must be a multiple of {TILE}, got {layout.cols}; use AllToAll")
    bits = q.scale.view(torch.int32)
    words = torch.where(bits & ~_EXPONENT == 0, bits, _NAN)[:, None].expand(-1, layout.cols // TILE)
    words = words.clone() if q.tile_exponent is None else words | q.tile_exponent.int()
    return words.view(torch.float32)


def from_scale_words(payload: torch.Tensor, words: torch.Tensor, tile_exponents: bool) -> ScaledTensor:
    """The inverse of `scale_words`."""
    bits = words.contiguous().view(torch.int32)
    first = bits[:, :1]
    scale = torch.where(first & _NAN == _NAN, _NAN, first & _EXPONENT).view(torch.float32).reshape(-1)
    return ScaledTensor(payload, scale, "row", tile_exponent=(bits & 0xFF).byte() if tile_exponents else None)
