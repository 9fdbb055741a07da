"""What the processes of test_moe_ranks.py run: one MoE layer over ranks, every case, results handed back as files. No tests in here."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_cases import FLOW, Case, F, H, Results, case, flow, results, top_k, watched, with_main_grad

from fp8_recipes.nn import MoE, moe_experts
from fp8_recipes.nn.dispatch import AllToAll

EXPERTS, K = 8, 3
SPLITS = {"usual": 55, "no tokens on rank 1": 90, "all tokens to rank 1": 40, "one expert for all": 45, "NaN in a token": 55}
"""Tokens of rank 0, of 90."""
SAVED = {"usual": ("activation", "h", "input")}
XIELU = ("usual", "all tokens to rank 1")
POISONED = (5, 7)
"""Token and feature that are NaN, in the case that has one."""
RUNS = [(name, saved, "swiglu") for name in SPLITS for saved in SAVED.get(name, ("h",))] + [(name, "h", "xielu") for name in XIELU]
"""Splits, moe_saved, activation."""


def whole(name: str, activation: str) -> Case:
    """The tokens of all ranks, one after the other."""
    index = top_k(90, K, EXPERTS)
    index[::7, 1] = -1
    if name == "all tokens to rank 1":
        index = torch.where(index < 0, index, index % 4 + 4)
    if name == "one expert for all":
        index = torch.full((90, 1), 6)
    c = case(index, EXPERTS, activation=activation)
    if name == "NaN in a token":
        c.x[POISONED] = torch.nan
    return c


def launches(c: Case, dispatcher: AllToAll) -> tuple[dict[str, int], list[str]]:
    """(calls of each operation, operators outside the operations that touch a large tensor) of one forward and backward over the ranks."""
    w1, w2 = with_main_grad(c)
    x, prob = c.x.clone().requires_grad_(), c.prob.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, watched(patch, large=32 * H) as (calls, movements):
        moe_experts(x, c.index, prob, w1, w2, recipe=FLOW, dispatcher=dispatcher, num_experts=EXPERTS).backward(c.dy)
    return dict(calls), movements.seen


def module(state: dict[str, torch.Tensor] | None = None, **changed: Any) -> MoE:
    """`MoE` with shared experts and an auxiliary loss; ``state``: of the whole one, of which it takes its experts."""
    torch.manual_seed(3)
    layer = MoE(H, F, EXPERTS, K, shared_ffn=64, aux_loss=0.1, dtype=torch.bfloat16, **changed)
    if state is not None:
        first = layer.dispatcher.rank * len(layer.w1) if len(layer.w1) < EXPERTS else 0  # type: ignore[attr-defined]
        layer.load_state_dict({name: state[name if name[0] != "w" else f"{name[:3]}{int(name[3:]) + first}"] for name in layer.state_dict()})
    return layer


def gradients(layer: MoE, x: torch.Tensor, dy: torch.Tensor) -> Results:
    """y, dx and the gradient of every parameter by its name here."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}


def part(c: Case, name: str, rank: int, world: int) -> Case:
    """What rank holds: its tokens, its experts."""
    begin, end = (0, SPLITS[name]) if rank == 0 else (SPLITS[name], 90)
    local = EXPERTS // world
    mine = slice(rank * local, (rank + 1) * local)
    return Case(c.x[begin:end], c.index[begin:end], c.prob[begin:end], c.w1[mine], c.w2[mine], c.dy[begin:end], c.activation, c.alpha)


def work(rank: int, world: int, backend: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    dispatcher, found = AllToAll(), dict[tuple[str, str, str], Results]()
    for name, saved, activation in RUNS:
        mine = part(whole(name, activation), name, rank, world).to(device)
        got = results(mine, flow(f"fp8_flow_moe:moe_saved={saved}", activation=activation, dispatcher=dispatcher, num_experts=EXPERTS))
        found[name, saved, activation] = {key: t.cpu() for key, t in got.items()}
    torch.save(found, f"{out}/{rank}.pt")
    if backend == "gloo":
        mine = part(whole("usual", "swiglu"), "usual", rank, world)
        torch.save(gradients(module(module().state_dict(), dispatcher=dispatcher), mine.x, mine.dy), f"{out}/module {rank}.pt")
        torch.save(launches(mine, dispatcher), f"{out}/launches {rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
