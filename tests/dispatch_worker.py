"""What the processes of test_dispatch.py run: every case on every rank, results and error messages handed back as files. No tests in here."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fp8_recipes import from_name, ops
from fp8_recipes.formats import FORMATS
from fp8_recipes.nn import moe_experts
from fp8_recipes.nn.dispatch import AllToAll, DeepEP, Local
from fp8_recipes.tensor import ScaledTensor

COLS = 256
CASES = ("usual", "no tokens on a rank", "all tokens to one rank", "all dropped", "more experts than tokens", "E5M2 without tile exponents", "top 1")


def inputs(case: str, rank: int, world: int) -> SimpleNamespace:
    """x [T, 256] bf16, expert_index [T, K], prob [T, K], experts; the same in every process that asks."""
    gen = torch.Generator().manual_seed(17 * rank + 1)
    tokens, k, experts = 21 + 5 * rank, 3, 4 * world
    if case == "no tokens on a rank":
        tokens = 0 if rank == 1 else 9
    if case == "more experts than tokens":
        tokens, k, experts = 2, 8, 16 * world
    if case == "top 1":
        k = 1
    index = torch.stack([torch.randperm(experts, generator=gen)[:k] for _ in range(tokens)] or [torch.empty(k)]).int()[:tokens]
    index = index.masked_fill(torch.rand(tokens, k, generator=gen) < (2.0 if case == "all dropped" else 0.15), -1)
    if case == "all tokens to one rank":
        index = index % (experts // world) + experts // world
    x = torch.randn(tokens, COLS, generator=gen) * torch.exp2(torch.randint(-9, 9, (tokens, COLS // 128), generator=gen)).repeat_interleave(128, dim=1)
    return SimpleNamespace(x=x.bfloat16(), index=index, prob=torch.rand(tokens, k, generator=gen), experts=experts, tokens=tokens, k=k)


def quantized(case: str, given: SimpleNamespace, device: torch.device) -> ScaledTensor:
    x = given.x.to(device)
    if not case.startswith("E5M2"):
        return ops.quantize(x, "micro", fold="row") if x.numel() else empty_rows(device)
    q = ops.quantize(x, "row", FORMATS["e5m2"])
    return ScaledTensor(q.payload, q.scale, "row")


def empty_rows(device: torch.device) -> ScaledTensor:
    """Zero tokens: nothing to take scales of."""
    tiles = torch.empty(0, COLS // 128, dtype=torch.uint8, device=device)
    return ScaledTensor(torch.empty(0, COLS, dtype=torch.float8_e4m3fn, device=device), torch.empty(0, device=device), "row", tile_exponent=tiles)


def result_of_rows(q: ScaledTensor, index: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for the experts: (y' [R, H] bf16, dprob' [R, K]), different on every rank and for every row."""
    y = ops.dequantize(q).float() * (1 + rank) + index.clamp(min=0).sum(1, keepdim=True)
    return y.bfloat16(), torch.where(index >= 0, 100.0 * rank + index + q.scale[:, None].log2(), 0.0)


def run_case(dispatcher: Any, case: str, rank: int, world: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """Dispatch forward, combine, dispatch backward, combine prob."""
    given = inputs(case, rank, world)
    q = quantized(case, given, device)
    plan = dispatcher.plan(given.index.to(device), given.experts)
    received, index, prob = dispatcher.dispatch(q, given.prob.to(device), plan)
    y, dprob = result_of_rows(received, index, rank)
    back = dispatcher.dispatch(q, None, plan)
    assert back[1] is None and back[2] is None
    results = {
        "y": y,
        "dprob": dprob,
        "index": index,
        "prob": prob,
        "combined": dispatcher.combine(y, plan),
        "combined_prob": dispatcher.combine_prob(dprob, plan),
    }
    for name, t in (("forward", received), ("backward", back[0])):
        results |= {f"{name} payload": t.payload, f"{name} scale": t.scale, f"{name} tile_exponent": t.tile_exponent}
    assert index is not None and dispatcher.received_copies(plan) == int((index >= 0).sum())
    if isinstance(dispatcher, AllToAll):
        results["splits"] = torch.tensor(plan.splits)
        assert plan.received_rows == received.shape[0] and plan.sent_rows == sum(plan.splits[0])
    return {name: None if t is None else t.cpu().clone(memory_format=torch.contiguous_format) for name, t in results.items()}


def experts_through(dispatcher: Any, given: SimpleNamespace, device: torch.device, first: int, local: int) -> torch.Tensor:
    """A whole layer of "experts" that multiply by powers of two: on few and small integers every sum is exact, whichever rank makes it."""
    x = torch.randint(-3, 4, (given.tokens, COLS), generator=torch.Generator().manual_seed(given.tokens)).bfloat16().to(device)
    plan = dispatcher.plan(given.index.to(device), given.experts)
    q, index, prob = dispatcher.dispatch(ops.quantize(x, "row"), torch.ones(given.tokens, given.k, device=device), plan)
    row_map = ops.route_map(index, local)
    rows, row_prob = ops.gather_rows(q, row_map, prob)
    expert = first + row_map.block_expert.repeat_interleave(128)
    y = ops.dequantize(rows).float() * (torch.exp2(expert % 3) * row_prob)[:, None]
    return dispatcher.combine(ops.combine_rows(y.bfloat16(), row_map), plan).cpu()


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def wrong_calls(rank: int, world: int, device: torch.device) -> dict[str, str]:
    """Message of each wrong use on this rank; after every one of them the group still works."""
    d, given = AllToAll(), inputs("usual", rank, world)
    index, prob = given.index.to(device), given.prob.to(device)
    spoiled = index.clone()
    if rank == 1:
        spoiled[2, 0], spoiled[3, 1] = given.experts, -2
    plan = d.plan(index, given.experts)
    q = quantized("usual", given, device)
    narrow = ScaledTensor(q.payload[:, :128].contiguous(), q.scale, "row") if rank == 1 else q
    other = quantized("E5M2 without tile exponents", given, device) if rank == 1 else q
    late = AllToAll()
    late.plan(index, given.experts)
    late.plan(index, given.experts)
    calls: dict[str, Callable[[], object]] = {
        "ids": lambda: d.plan(spoiled, given.experts).splits,
        "experts": lambda: d.plan(index, given.experts * (1 + rank)),
        "top-k": lambda: d.plan(index[:, : 3 - rank].contiguous(), given.experts),
        "not a multiple": lambda: d.plan(index, given.experts + 1),
        "not a multiple on one rank": lambda: d.plan(index, given.experts + rank),
        "columns": lambda: d.dispatch(narrow, prob, plan),
        "format": lambda: d.dispatch(other, prob, plan),
        "prob on one rank": lambda: d.dispatch(q, prob if rank else None, plan),
        "result columns": lambda: d.combine(torch.zeros(plan.received_rows, 32 + 16 * rank, dtype=torch.bfloat16, device=device), plan),
        "plans": lambda: (late if rank else d).plan(index, given.experts).splits,
        "rows here": lambda: d.combine(torch.zeros(plan.received_rows + 1, 32, dtype=torch.bfloat16, device=device), plan),
        "granularity": lambda: d.dispatch(ops.quantize(given.x.to(device), "tile"), prob, plan),
    }
    messages = {name: error_of(call) for name, call in calls.items()}
    messages["afterwards"] = error_of(lambda: d.dispatch(q, prob, plan))
    return messages


class StandInBuffer:
    """deep_ep.Buffer as its documentation describes it, in plain torch: every rank sees everything and takes what is for it."""

    @staticmethod
    def get_dispatch_config(size: int) -> SimpleNamespace:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda nbytes, n: nbytes * n, get_rdma_buffer_size_hint=lambda nbytes, n: 0)

    get_combine_config = get_dispatch_config

    def __init__(self, group: Any, nvlink: int, rdma: int) -> None:
        self.group, self.size, self.rank, self.nvlink = group, dist.get_world_size(group), dist.get_rank(group), nvlink

    def everyone(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, self.group)
        return found

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        local = num_experts // self.size
        in_rank = torch.stack([(topk_idx // local == r).any(1) & (topk_idx >= 0).any(1) for r in range(self.size)], dim=1)
        for r in range(self.size):
            in_rank[:, r] = ((topk_idx >= r * local) & (topk_idx < (r + 1) * local)).any(1)
        return in_rank.sum(0).int(), None, torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int(), in_rank, None

    def dispatch(
        self, x: tuple[torch.Tensor, torch.Tensor], handle: Any = None, topk_idx: Any = None, topk_weights: Any = None, **layout: Any
    ) -> tuple[Any, ...]:
        payload, scales = x
        assert payload.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32 and scales.shape == (payload.shape[0], payload.shape[1] // 128)
        assert handle is None or (topk_idx is None and topk_weights is None), "a handle excludes routing"
        in_rank = layout["is_token_in_rank"] if handle is None else handle[0]
        if handle is None:
            assert layout["num_tokens_per_rank"].tolist() == in_rank.sum(0).tolist() and topk_weights.dtype == torch.float32
        found = self.everyone((payload.view(torch.uint8), scales, in_rank, topk_idx, topk_weights))
        masks = [f[2][:, self.rank] for f in found]
        received = (
            torch.cat([f[0][m] for f, m in zip(found, masks, strict=True)]).view(torch.float8_e4m3fn),
            torch.cat([f[1][m] for f, m in zip(found, masks, strict=True)]),
        )
        if handle is not None:
            return received, None, None, None, None, None
        local = layout["num_tokens_per_expert"].numel() // self.size
        index = torch.cat([f[3][m] for f, m in zip(found, masks, strict=True)]) - self.rank * local
        here = (index >= 0) & (index < local)
        weights = torch.cat([f[4][m] for f, m in zip(found, masks, strict=True)])
        per_expert = torch.bincount(index[here], minlength=local).tolist()
        return received, index.masked_fill(~here, -1), weights.masked_fill(~here, 0.0), per_expert, (in_rank, [f[2] for f in found]), None

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: torch.Tensor | None = None) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and 2 * x.shape[1] * self.size <= self.nvlink, "the buffer is too small for these rows"
        in_rank, masks = handle
        parts: list[torch.Tensor | None] = []
        for t in (x, topk_weights):
            if t is None:
                parts.append(None)
                continue
            total = torch.zeros(in_rank.shape[0], t.shape[1])
            for rank, (rows, their_masks) in enumerate(self.everyone((t, masks))):
                mine = torch.cat([torch.full((int(m[:, rank].sum()),), source == self.rank) for source, m in enumerate(their_masks)])
                total[in_rank[:, rank]] += rows[mine].float()
            parts.append(total.to(t.dtype))
        return parts[0], parts[1], None


def install_stand_in() -> None:
    module = ModuleType("deep_ep")
    module.Buffer = StandInBuffer  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("deep_ep", None)
    sys.modules["deep_ep"] = module


def work(rank: int, world: int, backend: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {case: run_case(AllToAll(), case, rank, world, device) for case in CASES}
    usual = inputs("usual", rank, world)
    local = usual.experts // world
    results["layer"] = experts_through(AllToAll(), usual, device, rank * local, local)
    results["layer, one rank"] = experts_through(Local(), usual, device, 0, usual.experts)
    if backend == "nccl":
        results["waits"] = waits(rank, world, device)
    elif world == 2:
        results["errors"] = wrong_calls(rank, world, device)
        install_stand_in()
        for case in CASES:
            results[f"DeepEP {case}"] = run_case(DeepEP(), case, rank, world, device)
    torch.save(results, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def waits(rank: int, world: int, device: torch.device) -> str:
    """Everything once more with torch refusing to wait for the device; reading the counts is an event, which it allows."""
    given, d = inputs("usual", rank, world), AllToAll()
    q, index, prob = quantized("usual", given, device), given.index.to(device), given.prob.to(device)

    def once() -> None:
        plan = d.plan(index, given.experts)
        received, _, p = d.dispatch(q, prob, plan)
        d.combine(torch.ones(received.shape, dtype=torch.bfloat16, device=device), plan)
        d.combine_prob(p, plan)
        d.dispatch(q, None, plan)

    once()
    torch.cuda.set_sync_debug_mode("error")
    message = error_of(once)
    torch.cuda.set_sync_debug_mode("default")
    return message


def layer_output(d: AllToAll, given: SimpleNamespace) -> torch.Tensor:
    """The forward pass of a whole layer of experts over the ranks."""
    local = given.experts // d.size
    w1, w2 = ([torch.ones(*shape).bfloat16().requires_grad_() for _ in range(local)] for shape in ((32, COLS), (COLS, 16)))
    return moe_experts(given.x, given.index, given.prob, w1, w2, recipe=from_name("fp8_flow_moe"), dispatcher=d, num_experts=given.experts)


def leave(rank: int, world: int, store: str, out: str, how: str, when: str) -> None:
    """Rank 1 dies, or stops taking part, before a collective; rank 0 writes what it got and after how many seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=4))
    given, d = inputs("usual", rank, world), AllToAll()
    q = quantized("usual", given, torch.device("cpu"))
    plan = d.plan(given.index, given.experts)
    received = d.dispatch(q, given.prob, plan)[0]
    y = torch.zeros(received.shape, dtype=torch.bfloat16)
    d.combine(y, plan)
    output = layer_output(d, given)
    if rank == 1:
        while how == "stops" and not Path(out).exists():
            time.sleep(0.1)
        os._exit(0)  # as a killed process: nothing is closed in order
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: d.plan(given.index, given.experts),
        "dispatch": lambda: d.dispatch(q, given.prob, plan),
        "combine": lambda: d.combine(y, plan),
        "backward": lambda: output.backward(torch.ones_like(output)),
    }
    began = time.perf_counter()
    message = error_of(calls[when])
    torch.save((message, time.perf_counter() - began), f"{out}.tmp")
    os.replace(f"{out}.tmp", out)
    os._exit(0)


def spawn(function: Callable[..., None], world: int, *args: object, seconds: float = 240) -> None:
    """Run `function` (rank, world, *args) in ``world`` new processes; raise if one fails or has not ended after ``seconds``."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=function, args=(rank, world, *args)) for rank in range(world)]
    for p in processes:
        p.start()
    end = time.monotonic() + seconds
    try:
        for rank, p in enumerate(processes):
            p.join(max(0.0, end - time.monotonic()))
            if p.exitcode != 0:
                raise RuntimeError(f"rank {rank} of {world} ended with {p.exitcode} ({seconds} s allowed); its output is above")
    finally:
        for p in processes:
            p.kill()
