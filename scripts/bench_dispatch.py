"""FP8 dispatch over the GPUs of one host: checked against one GPU, then timed beside bf16 all-to-alls of the same routing; bytes on the wire.

    torchrun --nproc-per-node 2 scripts/bench_dispatch.py [--check] [--csv DIR] [--rounds N]      (--check: no timing)
    torchrun --nproc-per-node 2 scripts/bench_dispatch.py --check --cpu                           (gloo and the reference, small sizes)

The check: every received row is the row that one process would pick; a layer of experts over the ranks gives the outputs and gradients of one GPU that holds
all experts and all tokens. Any difference ends the program with 1, before anything is timed.

Times are the slowest rank's median over rounds in which all contenders take turns, each after a barrier of the ranks. "bf16, per copy" is what Megatron's
all-to-all dispatcher does: a row for every expert of a token, and the probabilities in a collective of their own. "bf16, per rank" sends a token once to each
rank, without ids and probabilities. "FP8" is the cast, packing, the collective and unpacking of ids and probabilities; the rest is read where it arrived, by
the permutation that every MoE layer has ("permute": from there, and from contiguous rows). Bytes are those that leave a rank for others.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fp8_recipes import ops
from fp8_recipes.nn.dispatch import AllToAll, Plan
from fp8_recipes.nn.moe import moe_experts
from fp8_recipes.recipe import from_name
from fp8_recipes.reference.dispatch import row_layout
from fp8_recipes.tensor import ScaledTensor

SHAPES = {  # tokens per rank, K, experts, hidden
    "V2-Lite": (16384, 6, 64, 2048),
    "V3": (16384, 8, 256, 7168),
    "Qwen3-30B": (16384, 8, 128, 2048),
}
SPLITS = ((24576, 2048), (98304, 2048), (32768, 7168))
"""Rows x hidden of bare all-to-alls with equal splits."""
QUANTIZE = {"granularity": "micro", "fold": "row"}
Table = list[dict[str, object]]


@dataclass
class Inputs:
    x: torch.Tensor
    index: torch.Tensor
    prob: torch.Tensor


def make_inputs(rank: int, tokens: int, k: int, experts: int, hidden: int, device: torch.device) -> Inputs:
    """What ``rank`` holds; every process can make it for every rank. K different experts per token, unevenly popular."""
    gen = torch.Generator(device).manual_seed(rank)
    x = torch.randn(tokens, hidden, device=device, generator=gen, dtype=torch.bfloat16)
    x *= torch.exp(torch.randn(tokens, 1, device=device, generator=gen)).bfloat16()
    popular = 0.3 * torch.rand(experts, generator=torch.Generator().manual_seed(5)).to(device)
    index = (torch.rand(tokens, experts, device=device, generator=gen) + popular).topk(k, dim=1).indices.int()
    index[::97, 0] = -1
    return Inputs(x, index, torch.rand(tokens, k, device=device, generator=gen))


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_rows(d: AllToAll, shape: tuple[int, int, int, int], device: torch.device) -> list[str]:
    """Names of what differs from the rows that belong to this rank, picked from every rank's inputs."""
    tokens, k, experts, hidden = shape
    local, ranks = experts // d.size, range(d.size)
    inputs = [make_inputs(r, *shape, device) for r in ranks]
    quantized = [ops.quantize(i.x, **QUANTIZE) for i in inputs]
    mine = inputs[d.rank]
    plan = d.plan(mine.index, experts)
    q, index, prob = d.dispatch(quantized[d.rank], mine.prob, plan)
    back = d.dispatch(quantized[d.rank], None, plan)[0]
    here = [(i.index >= 0) & (i.index // local == d.rank) for i in inputs]
    picked = [h.any(1) for h in here]
    expected = {
        "ids": (index, torch.cat([(i.index - d.rank * local).masked_fill(~h, -1)[p] for i, h, p in zip(inputs, here, picked, strict=True)])),
        "prob": (prob, torch.cat([i.prob.masked_fill(~h, 0.0)[p] for i, h, p in zip(inputs, here, picked, strict=True)])),
    }
    for name in ("payload", "scale", "tile_exponent"):
        wanted = torch.cat([getattr(t, name).view(torch.uint8 if name != "scale" else torch.float32)[p] for t, p in zip(quantized, picked, strict=True)])
        expected[name], expected[f"{name} in backward"] = (getattr(q, name), wanted), (getattr(back, name), wanted)
    copies = torch.stack([((mine.index >= 0) & (mine.index // local == r)).any(1) for r in ranks]).sum(0)
    y = ops.dequantize(quantized[d.rank]).float()
    expected["combine"] = d.combine(ops.dequantize(q).bfloat16(), plan), sum((y * (copies > r)[:, None] for r in ranks), torch.zeros_like(y)).bfloat16()
    expected["combine_prob"] = d.combine_prob(prob, plan), mine.prob.masked_fill(mine.index < 0, 0.0)
    return [name for name, (a, b) in expected.items() if not same(a, b)]


def snr_db(truth: torch.Tensor, got: torch.Tensor) -> float:
    noise = (truth.double() - got.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(truth.double().square().sum() / noise))


def check_layer(d: AllToAll, tokens: int, k: int, experts: int, hidden: int, ffn: int, device: torch.device) -> tuple[list[str], str]:
    """A layer over the ranks against all experts and all tokens on this one: (what is too far off, the figures)."""
    recipe, gen = from_name("fp8_flow_moe"), torch.Generator(device).manual_seed(99)
    weights = [torch.randn(experts, *shape, device=device, generator=gen).mul_(shape[1] ** -0.5).bfloat16() for shape in ((2 * ffn, hidden), (hidden, ffn))]
    inputs = [make_inputs(r, tokens, k, experts, hidden, device) for r in range(d.size)]
    dys = [torch.randn(tokens, hidden, device=device, generator=torch.Generator(device).manual_seed(50 + r)).bfloat16() for r in range(d.size)]
    local = experts // d.size

    def run(x: torch.Tensor, index: torch.Tensor, prob: torch.Tensor, dy: torch.Tensor, part: slice, dispatcher: AllToAll | None) -> list[torch.Tensor]:
        x, prob = x.clone().requires_grad_(), prob.clone().requires_grad_()
        w1, w2 = ([w.clone().requires_grad_() for w in stack[part]] for stack in weights)
        y = moe_experts(x, index, prob, w1, w2, recipe=recipe, dispatcher=dispatcher, num_experts=experts if dispatcher else None)
        y.backward(dy)
        grads = [torch.stack([w.grad for w in ws if w.grad is not None]) for ws in (w1, w2)]
        assert x.grad is not None and prob.grad is not None
        return [y.detach(), x.grad, prob.grad, *grads]

    mine, own = inputs[d.rank], slice(d.rank * local, (d.rank + 1) * local)
    got = run(mine.x, mine.index, mine.prob, dys[d.rank], own, d)
    everything = [torch.cat([getattr(i, name) for i in inputs]) for name in ("x", "index", "prob")]
    one = run(*everything, torch.cat(dys), slice(None), None)
    rows = slice(d.rank * tokens, (d.rank + 1) * tokens)
    one = [t[rows] for t in one[:3]] + [t[own] for t in one[3:]]
    names = ("y", "dx", "dprob", "dw1", "dw2")
    least = (45.0, 45.0, 60.0, 60.0, 60.0)  # bf16 rounds each rank's part of a sum (50 dB or more); the rest sees the same rows in the same order
    figures = {name: snr_db(a, b) for name, a, b in zip(names, one, got, strict=True)}
    return [n for n, limit in zip(names, least, strict=True) if not figures[n] >= limit], ", ".join(f"{n} {v:.1f} dB" for n, v in figures.items())


def check(d: AllToAll, device: torch.device) -> int:
    """Number of checks that fail on any rank."""
    if device.type == "cpu":
        shapes, layer = {"small": (50, 3, 8, 256)}, (40, 3, 8, 256, 128)
    else:
        shapes, layer = SHAPES, (4096, 6, 16, 2048, 1408)
    failures = 0
    for name, shape in shapes.items():
        failures += report(d, f"rows {name}", check_rows(d, shape, device), "")
    return failures + report(d, "layer", *check_layer(d, *layer, device))


def report(d: AllToAll, name: str, bad: list[str], figures: str) -> int:
    """Print one line for all ranks; the number of ranks on which something is wrong."""
    everyone: list[tuple[list[str], str]] = [([], "")] * d.size
    dist.all_gather_object(everyone, (bad, figures), d.group)
    if d.rank == 0:
        wrong = "; ".join(f"rank {r}: {', '.join(b)}" for r, (b, _) in enumerate(everyone) if b)
        print(f"check {name}: {'FAIL ' + wrong if wrong else 'pass'} {' | '.join(f for _, f in everyone if f)}", flush=True)
    return sum(bool(b) for b, _ in everyone)


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each contender on its slowest rank."""
    together = torch.zeros(1, device="cuda")
    for call in contenders.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        torch.cuda._sleep(2_000_000 + 1_000_000 * len(contenders))  # the GPU waits while the host fills its queue
        for name, call in contenders.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.all_reduce(together)  # nobody is timed while waiting for a late rank
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    medians = torch.tensor([statistics.median(b.elapsed_time(e) * 1000 for b, e in pairs) for pairs in events.values()], device="cuda")
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return dict(zip(events, medians.tolist(), strict=True))


def exchange(rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows, received, sent)
    return out


def record(table: Table, where: dict[str, object], times: dict[str, float], sizes: dict[str, tuple[int, int]], base: str) -> None:
    """sizes: contender -> (rows to other ranks, bytes to other ranks); contenders without one are parts of others, which are not compared."""
    for name, us in times.items():
        row: dict[str, object] = {
            **where,
            "contender": name,
            "us": round(us, 1),
            **dict.fromkeys(("rows_out", "MB_out", "GB/s", "speedup", "bytes_of_base"), ""),
        }
        shown = ""
        if name in sizes:
            rows, nbytes = sizes[name]
            speedup, share = times[base] / us, nbytes / sizes[base][1]
            row |= {"rows_out": rows, "MB_out": round(nbytes / 1e6, 2), "GB/s": round(nbytes / us / 1e3, 1)}
            row |= {"speedup": round(speedup, 3), "bytes_of_base": round(share, 3)}
            shown = f"{nbytes / 1e6:8.1f} MB out  {speedup:5.2f}x of '{base}' with {share:.1%} of its bytes"
        table.append(row)
        if dist.get_rank() == 0:
            print(f"  {name:<28} {us:9.1f} us  {shown}", flush=True)


def per_copy(given: Inputs, local: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Megatron's rows: (token of each row, in the order of the ranks; its probability; rows to each rank; rows from each rank)."""
    rank = torch.where(given.index >= 0, given.index // local, ranks).reshape(-1)
    order = rank.argsort(stable=True)[: int((rank < ranks).sum())]
    sent = torch.bincount(rank, minlength=ranks + 1)[:ranks]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return order // given.index.shape[1], given.prob.reshape(-1)[order], sent.tolist(), received.tolist()


def away(counts: list[int], rank: int) -> int:
    return sum(counts) - counts[rank]


def bench_shape(table: Table, d: AllToAll, name: str, shape: tuple[int, int, int, int], rounds: int, device: torch.device) -> None:
    tokens, k, experts, hidden = shape
    given = make_inputs(d.rank, *shape, device)
    plan = d.plan(given.index, experts)
    sent, received = plan.splits
    q = ops.quantize(given.x, **QUANTIZE)
    packed = ops.pack_rows(q, plan.send, sum(sent), given.index, given.prob)
    token = torch.empty(sum(sent), dtype=torch.long, device=device)
    for c in range(plan.send.destination.shape[1]):  # the token in each row of the send buffer
        row = plan.send.destination[:, c].long()
        token[row[row >= 0]] = (row >= 0).nonzero()[:, 0]
    x_rows = given.x[token]
    copy_token, copy_prob, copies_sent, copies_received = per_copy(given, experts // d.size, d.size)
    y = torch.randn(sum(received), hidden, device=device).bfloat16()
    arrived, ids, arrived_prob = d.dispatch(q, given.prob, plan)
    assert ids is not None and arrived.tile_exponent is not None
    apart = ScaledTensor(arrived.payload.contiguous(), arrived.scale.contiguous(), "row", tile_exponent=arrived.tile_exponent.contiguous())
    row_map = ops.route_map(ids, experts // d.size, ops.rows_for(d.received_copies(plan), experts // d.size))

    def megatron() -> object:
        exchange(copy_prob[:, None], copies_received, copies_sent)
        return exchange(given.x[copy_token], copies_received, copies_sent)

    contenders: dict[str, Callable[[], object]] = {
        "bf16, per copy": megatron,
        "bf16, per rank": lambda: exchange(given.x[token], received, sent),
        "FP8": lambda: d.dispatch(ops.quantize(given.x, **QUANTIZE), given.prob, plan),
        "FP8, backward": lambda: d.dispatch(ops.quantize(given.x, **QUANTIZE), None, plan),
        "FP8 without the cast": lambda: d.dispatch(q, given.prob, plan),
        "bf16, per rank, wire only": lambda: exchange(x_rows, received, sent),
        "FP8, wire only": lambda: exchange(packed, received, sent),
        "cast": lambda: ops.quantize(given.x, **QUANTIZE),
        "pack": lambda: ops.pack_rows(q, plan.send, sum(sent), given.index, given.prob),
        "unpack ids and prob": lambda: ops.unpack_rows(packed, row_layout(q, k), q.payload.dtype),
        "permute, received rows": lambda: ops.gather_rows(arrived, row_map, arrived_prob),
        "permute, rows copied out": lambda: ops.gather_rows(apart, row_map, arrived_prob),
        "combine": lambda: d.combine(y, plan),
        "combine_prob": lambda: d.combine_prob(torch.empty(sum(received), k, device=device), plan),
    }
    if d.rank == 0:
        print(f"{name}: {tokens} tokens, top {k} of {experts}, hidden {hidden}, {d.size} ranks; rows to each rank {sent}, copies {copies_sent}", flush=True)
    copies, rows = away(copies_sent, d.rank), away(sent, d.rank)
    forward, backward = row_layout(q, k).nbytes, row_layout(q, 0).nbytes
    sizes = {"bf16, per copy": (copies, copies * (2 * hidden + 4)), "FP8, backward": (rows, rows * backward)}
    sizes |= dict.fromkeys(("bf16, per rank", "bf16, per rank, wire only"), (rows, rows * 2 * hidden))
    sizes |= dict.fromkeys(("FP8", "FP8 without the cast", "FP8, wire only"), (rows, rows * forward))
    where: dict[str, object] = {"shape": name, "tokens": tokens, "k": k, "experts": experts, "hidden": hidden, "ranks": d.size}
    record(table, where, measure(contenders, rounds), sizes, "bf16, per rank")
    record(table, where, {"plan, on the host": plan_us(d, given, experts, rounds)}, {}, "")


def plan_us(d: AllToAll, given: Inputs, experts: int, rounds: int) -> float:
    """Microseconds from the call of plan until the host has the counts, on an idle GPU."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        plan: Plan = d.plan(given.index, experts)
        assert plan.splits
        taken.append((time.perf_counter() - began) * 1e6)
    return statistics.median(taken)


def bench_splits(table: Table, d: AllToAll, rows: int, hidden: int, rounds: int, device: torch.device) -> None:
    """Bare all-to-alls of equal splits: bf16 rows and rows of this package's layout."""
    empty = torch.empty(1, hidden, dtype=torch.float8_e4m3fn, device=device)
    q = ScaledTensor(empty, torch.empty(1, device=device), "row", tile_exponent=torch.empty(1, hidden // 128, dtype=torch.uint8, device=device))
    width = {"bf16": 2 * hidden, "FP8, forward": row_layout(q, 8).nbytes, "FP8, backward": row_layout(q, 0).nbytes}
    split = [rows // d.size] * d.size
    buffers = {name: torch.zeros(rows, nbytes, dtype=torch.uint8, device=device) for name, nbytes in width.items()}
    calls = {name: lambda b=b: exchange(b, split, split) for name, b in buffers.items()}
    if d.rank == 0:
        print(f"all-to-all of {rows} x {hidden}, equal splits, {d.size} ranks", flush=True)
    out = rows - rows // d.size
    where: dict[str, object] = {"shape": f"{rows} rows, equal splits", "tokens": rows, "k": 8, "experts": "", "hidden": hidden, "ranks": d.size}
    record(table, where, measure(calls, rounds), {name: (out, out * nbytes) for name, nbytes in width.items()}, "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--cpu", action="store_true", help="gloo and the reference; with --check")
    parser.add_argument("--csv", type=Path, help="directory for dispatch_bench.csv")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit("start this with torchrun --nproc-per-node 2 scripts/bench_dispatch.py")
    if args.cpu and not args.check:
        sys.exit("--cpu checks only; add --check")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if args.cpu else torch.device("cuda", local_rank)
    if not args.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.cpu else "nccl")
    start, d = time.time(), AllToAll()
    if d.rank == 0:
        print(f"{torch.cuda.get_device_name() if not args.cpu else 'CPU'}, torch {torch.__version__}, {d.size} ranks", flush=True)
    failures = check(d, device)
    table: Table = []
    if not failures and not args.check:
        for rows, hidden in SPLITS:
            bench_splits(table, d, rows, hidden, args.rounds, device)
        for name, shape in SHAPES.items():
            bench_shape(table, d, name, shape, args.rounds, device)
    if args.csv and table and d.rank == 0:
        args.csv.mkdir(parents=True, exist_ok=True)
        with open(args.csv / "dispatch_bench.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    if d.rank == 0:
        print(f"{time.time() - start:.0f} s", flush=True)
    dist.destroy_process_group()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
