"""Routing, gather, combine, and what dispatch does on a rank before and after its collectives: checked bit for bit against the reference, then timed against a
copy of the same bytes. One GPU; the collectives are bench_dispatch.py's.

    python scripts/bench_permute.py [--check] [--csv DIR] [--rounds N]      (--check: no timing)

Bytes are the least that must move: gather reads a token once and writes all rows of the buffer (padding included), combine reads K rows and writes one;
pack_rows reads a token once and writes it for every rank it goes to, combine_sent reads the rows that come back and writes a token.
What SwiGLU does with the probabilities is in bench_experts.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from bench_kernels import ALLOC, attribute, data, differences, poisoned
from benchmark import write
from kernel_timing import Calls, Table, copy_calls, measure, record

from fp8_recipes import kernels, reference
from fp8_recipes.reference import SendMap
from fp8_recipes.reference.dispatch import row_layout
from fp8_recipes.tensor import ScaledTensor

SHAPES = {  # tokens, K, experts, hidden
    "V2-Lite": (16384, 6, 64, 2048),
    "V3, 8 local experts": (32768, 1, 8, 7168),
    "V3, one rank": (4096, 8, 256, 7168),
    "Qwen3-30B": (8192, 8, 128, 2048),
}


def routing(tokens: int, k: int, experts: int, seed: int = 0) -> torch.Tensor:
    """K different experts per token, unevenly popular; [T, K] int32."""
    gen = torch.Generator("cuda").manual_seed(seed)
    score = torch.rand(tokens, experts, device="cuda", generator=gen) + 0.3 * torch.rand(experts, device="cuda", generator=gen)
    return score.topk(k, dim=1).indices.int()


def check_shape(name: str, tokens: int, k: int, experts: int, hidden: int) -> int:
    """Number of results that differ from the reference."""
    index = routing(tokens, k, experts)
    index[::97, 0] = -1
    expected_map, row_map = reference.route_map(index, experts), kernels.route_map(index, experts)
    fields = ("source", "destination", "offsets", "block_expert", "counts")
    bad = [f for f in fields if not torch.equal(getattr(row_map, f), getattr(expected_map, f))]
    x, prob = data(tokens, hidden), torch.rand(tokens, k, device="cuda")
    for granularity in ("row", "tile"):
        q = kernels.quantize(x, granularity)
        (got, got_prob), (expected, expected_prob) = kernels.gather_rows(q, row_map, prob), reference.gather_rows(q, row_map, prob)
        if differences(got, expected) or not torch.equal(got_prob, expected_prob):
            bad.append(f"gather {granularity}")
    y = kernels.gather_rows(x, row_map)[0]
    bad += [] if torch.equal(y, reference.gather_rows(x, row_map)[0]) else ["gather bf16"]
    for weight in (None, prob):
        same = torch.equal(kernels.combine_rows(y, row_map, weight), reference.combine_rows(y, row_map, weight))
        bad += [] if same else [f"combine {'weighted' if weight is not None else ''}"]
    print(f"check {name}: {'pass' if not bad else 'FAIL ' + ', '.join(bad)}")
    return len(bad)


RANKS = 8
"""Over which the experts of DISPATCHED are spread."""
DISPATCHED = ("V2-Lite", "V3, one rank", "Qwen3-30B")


def sent(tokens: int, k: int, experts: int, hidden: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, SendMap, int, ScaledTensor]:
    """(experts, probabilities, map, rows sent, payload as a layer sends it: FP8 rows with the exponents of their tiles)."""
    index, prob = routing(tokens, k, experts, seed), torch.rand(tokens, k, device="cuda")
    send = kernels.send_map(index, experts, RANKS)
    return index, prob, send, int(send.header[:RANKS].sum()), kernels.quantize(data(tokens, hidden, seed), "micro", fold="row")


def check_dispatch(name: str, tokens: int, k: int, experts: int, hidden: int) -> int:
    """Number of results that differ from the reference."""
    index, prob, send, rows, q = sent(tokens, k, experts, hidden)
    expected = reference.send_map(index, experts, RANKS)
    bad = [f for f in ("header", "row_of_copy", "destination") if not torch.equal(getattr(send, f), getattr(expected, f))]
    buffer = kernels.pack_rows(q, send, rows, index, prob)
    bad += [] if torch.equal(buffer, reference.pack_rows(q, send, rows, index, prob)) else ["pack_rows"]
    layout = row_layout(q, k)
    for got, want in zip(kernels.unpack_rows(buffer, layout, q.payload.dtype)[1:], reference.unpack_rows(buffer, layout, q.payload.dtype)[1:], strict=True):
        bad += [] if got is not None and want is not None and torch.equal(got, want) else ["unpack_rows"]
    y, grad = data(rows, hidden, 1), torch.rand(rows, k, device="cuda")
    bad += [] if torch.equal(kernels.combine_sent(y, send), reference.combine_sent(y, send)) else ["combine_sent"]
    bad += [] if torch.equal(kernels.copies_of_sent(grad, send), reference.copies_of_sent(grad, send)) else ["copies_of_sent"]
    print(f"check dispatch {name}: {'pass' if not bad else 'FAIL ' + ', '.join(bad)}")
    return len(bad)


def bench_dispatch(table: Table, name: str, tokens: int, k: int, experts: int, hidden: int, rounds: int) -> None:
    sets = [sent(tokens, k, experts, hidden, seed) for seed in range(3)]
    index, prob, send, rows, q = sets[0]
    layout = row_layout(q, k)
    buffer = kernels.pack_rows(q, send, rows, index, prob)
    ys = [data(s[3], hidden, i) for i, s in enumerate(sets)]
    cases: dict[str, tuple[float, Calls]] = {
        "pack_rows": (
            tokens * (layout.used + 2 * k) + rows * layout.nbytes,
            {"": [partial(kernels.pack_rows, s[4], s[2], s[3], s[0], s[1]) for s in sets]},
        ),
        "combine_sent": ((rows + tokens) * 2 * hidden, {"": [partial(kernels.combine_sent, y, s[2]) for y, s in zip(ys, sets, strict=True)]}),
    }
    print(f"dispatch {name}: {tokens} tokens, top {k} of {experts} on {RANKS} ranks, hidden {hidden}; {rows} rows of {layout.nbytes} bytes")
    for op, (moved, calls) in cases.items():
        times = measure({"copy": copy_calls(moved), op: calls[""]}, rounds)
        record(table, (rows, hidden), times, {"copy": moved, op: moved})
    small: Calls = {
        "copy": copy_calls(1 << 20),
        "send_map": [partial(kernels.send_map, s[0], experts, RANKS) for s in sets],
        "unpack_rows": [partial(kernels.unpack_rows, buffer, layout, q.payload.dtype)],
        "copies_of_sent": [partial(kernels.copies_of_sent, torch.rand(rows, k, device="cuda"), send)],
    }
    record(table, (tokens * k, RANKS), measure(small, rounds), {"copy": 1 << 20})


def bench_shape(table: Table, name: str, tokens: int, k: int, experts: int, hidden: int, rounds: int) -> None:
    row_map = kernels.route_map(routing(tokens, k, experts), experts)
    rows, copies = row_map.rows, tokens * k
    xs = [data(tokens, hidden, i) for i in range(3)]
    qs: list[ScaledTensor] = [kernels.quantize(x, "row") for x in xs]
    ys = [kernels.gather_rows(x, row_map)[0] for x in xs]
    prob = torch.rand(tokens, k, device="cuda")
    index = routing(tokens, k, experts)
    cases: dict[str, tuple[float, Calls]] = {
        "gather_rows FP8 row": ((tokens + rows) * (hidden + hidden / 128 + 8), {"": [partial(kernels.gather_rows, q, row_map, prob) for q in qs]}),
        "gather_rows bf16": ((tokens + rows) * 2 * hidden, {"": [partial(kernels.gather_rows, x, row_map) for x in xs]}),
        "combine_rows": ((tokens + copies) * 2 * hidden, {"": [partial(kernels.combine_rows, y, row_map) for y in ys]}),
        "combine_rows weighted": ((tokens + copies) * 2 * hidden, {"": [partial(kernels.combine_rows, y, row_map, prob) for y in ys]}),
    }
    print(f"{name}: {tokens} tokens, top {k} of {experts}, hidden {hidden}; {rows} rows, {int(row_map.offsets[-1])} in use")
    for op, (moved, calls) in cases.items():
        times = measure({"copy": copy_calls(moved), op: calls[""]}, rounds)
        record(table, (rows, hidden), times, {"copy": moved, op: moved})
    times = measure({"copy": copy_calls(1 << 20), "route_map": [partial(kernels.route_map, index, experts)] * 2}, rounds)
    record(table, (copies, experts), times, {"copy": 1 << 20})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--csv", type=Path, help="directory for permute_bench.csv")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_permute.py needs a CUDA GPU; the tests in tests/kernels check the same kernels on the CPU")
    start = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with attribute(ALLOC, "empty", poisoned):
        failures = sum(check_shape(name, *shape) for name, shape in SHAPES.items())
        failures += sum(check_dispatch(name, *SHAPES[name]) for name in DISPATCHED)
    if failures:
        sys.exit(1)
    table: Table = []
    if not args.check:
        for name, shape in SHAPES.items():
            bench_shape(table, name, *shape, args.rounds)
        for name in DISPATCHED:
            bench_dispatch(table, name, *SHAPES[name], args.rounds)
    if args.csv and table:
        write(table, args.csv / "permute_bench.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
