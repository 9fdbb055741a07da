"""Routing, gather and combine on one GPU: checked bit for bit against the reference, then timed against a copy of the same bytes.

    python scripts/bench_permute.py [--check] [--csv DIR] [--rounds N]      (--check: no timing)

Bytes are the least that must move: gather reads a token once and writes all rows of the buffer (padding included), combine reads K rows and writes one.
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
    if failures:
        sys.exit(1)
    table: Table = []
    if not args.check:
        for name, shape in SHAPES.items():
            bench_shape(table, name, *shape, args.rounds)
    if args.csv and table:
        write(table, args.csv / "permute_bench.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
