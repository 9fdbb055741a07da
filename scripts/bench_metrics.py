"""Moments on one GPU: checked against the reference and for repeating bit for bit, then timed against a copy of the same bytes; then what one observed step
costs a layer of an 8B (the hooks' three tensors, and everything that FP8 adds).

    python scripts/bench_metrics.py [--check] [--sweep] [--csv DIR] [--rounds N]      (--check: no timing)

Bytes: everything read once. A copy reads and writes, so "copy" moves each of its bytes once too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench_kernels import attribute, data
from benchmark import write
from kernel_timing import Calls, Table, copy_calls, measure, record

from fp8_recipes import kernels, reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.metrics import MomentTable
from fp8_recipes.reference.moments import FIELDS, neutral

SHAPES = {"block output": (8192, 4096), "QKV": (8192, 6144), "down input": (8192, 14336), "odd": (1000, 2880), "wide": (64, 65536)}
LAYER = {"qkv": 4096, "proj": 4096, "fc1": 4096, "fc2": 14336}  # features of each linear's input
GRADS = {"qkv": 6144, "proj": 4096, "fc1": 28672, "fc2": 4096}  # features of each linear's output gradient
TOKENS = 8192


def disagreements(got: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """Fields that are not what the reference gives: counts and maxima equal, sums to 1e-5."""
    found = []
    for name, a, e in zip(FIELDS, got.tolist(), expected.tolist(), strict=False):
        if abs(a - e) > (1e-5 * abs(e) if name in ("kurtosis", "sum2", "sum4") else 0):
            found.append(f"{name} {a!r} instead of {e!r}")
    return found


def check_shape(name: str, rows: int, cols: int) -> int:
    x = data(rows, cols)
    x[0] = 0
    x[1, :2] = torch.tensor([float("nan"), float("inf")], device="cuda")
    bad: list[str] = []
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [("plain", x, None, {}), ("scale", x, None, {"scale": torch.tensor(2.0**-9, device="cuda")})]
    for fmt in (E4M3, E5M2):
        for granularity, fold in (("row", None), ("tile", "row"), ("tensor", None)):
            q = kernels.quantize(x, granularity, fmt, fold=fold)
            cases += [(f"{granularity} {fmt}", x, q, {}), (f"payload {granularity} {fmt}", None, q, {})]
    for case, source, q, options in cases:
        got = kernels.moments(source, q, **options)
        bad += [f"{case}: {text}" for text in disagreements(got, reference.moments(source, q, **options))]
        if not torch.equal(got, kernels.moments(source, q, **options)):
            bad.append(f"{case}: a second run gave other bits")
    sums = [torch.empty(rows, 2, dtype=torch.float64, device="cuda") for _ in range(2)]
    kernels.moments(x, row_sums=sums[0])
    reference.moments(x, row_sums=sums[1])
    if not torch.allclose(*sums, rtol=1e-5, atol=0):
        bad.append("row sums")
    print(f"check {name} {rows}x{cols}: {'pass' if not bad else 'FAIL ' + '; '.join(bad)}")
    return len(bad)


def bench_shape(table: Table, name: str, rows: int, cols: int, rounds: int) -> None:
    print(f"{name}: {rows} x {cols}")
    copies = max(2, int(3e8 / (rows * cols * 2)) + 1)  # more than the L2 cache holds
    xs = [data(rows, cols, i) for i in range(min(copies, 8))]
    qs = [kernels.quantize(x, "row") for x in xs]
    out, scale = neutral(device="cuda"), torch.tensor(2.0**-9, device="cuda")
    cases: dict[str, tuple[float, Calls]] = {
        "moments bf16": (2.0 * rows * cols, {"": [partial(kernels.moments, x, out=out) for x in xs]}),
        "moments bf16, scale": (2.0 * rows * cols, {"": [partial(kernels.moments, x, scale=scale, out=out) for x in xs]}),
        "moments beside payload": (3.0 * rows * cols, {"": [partial(kernels.moments, x, q, out=out) for x, q in zip(xs, qs, strict=True)]}),
        "moments of payload": (1.0 * rows * cols, {"": [partial(kernels.moments, None, q, out=out) for q in qs]}),
    }
    for op, (moved, calls) in cases.items():
        record(table, (rows, cols), measure({"copy": copy_calls(moved), op: calls[""]}, rounds), {"copy": moved, op: moved})


def sweep(rounds: int) -> None:
    """Columns at a time, warps and programs, on the two tensors that matter most."""
    module = import_module("fp8_recipes.kernels.moments")
    for rows, cols in ((8192, 4096), (8192, 14336)):
        xs = [data(rows, cols, i) for i in range(4)]
        qs = [kernels.quantize(x, "row") for x in xs]
        out = neutral(device="cuda")
        for block, warps, per_sm in itertools.product((512, 1024, 2048, 4096), (1, 2, 4, 8), (4, 8, 16, 32)):
            if not 8 <= block // (32 * warps) <= 64 or warps * per_sm > 64:
                continue
            with attribute(module, "BLOCK", block), attribute(module, "WARPS", warps), attribute(module, "PROGRAMS", per_sm * 132):
                plain: Calls = {"": [partial(kernels.moments, x, out=out) for x in xs]}
                beside: Calls = {"": [partial(kernels.moments, x, q, out=out) for x, q in zip(xs, qs, strict=True)]}
                times = measure(plain, rounds)[""], measure(beside, rounds)[""]
            print(f"  {rows}x{cols} block {block} warps {warps} programs {per_sm} x 132: bf16 {times[0]:.1f} us, beside payload {times[1]:.1f} us")


def layer_cost() -> None:
    """GPU time and host time of everything counted in one observed step of one layer and one microbatch, and the transfer at the end."""
    outputs = {"qkv": data(TOKENS, 6144), "down_input": data(TOKENS, 14336), "block_output": data(TOKENS, 4096)}
    pairs = {f"{n}.input": data(TOKENS, f) for n, f in LAYER.items()} | {f"{n}.grad": data(TOKENS, f, 1) for n, f in GRADS.items()}
    quantised = {name: kernels.quantize(x, "row") for name, x in pairs.items()}
    weights = {"qkv": data(6144, 4096), "proj": data(4096, 4096), "fc1": data(28672, 4096), "fc2": data(4096, 14336)}
    scale, table = torch.tensor(2.0**-9, device="cuda"), MomentTable()

    def hooks() -> None:
        for name, x in outputs.items():
            table.add(name, x)

    def fp8() -> None:
        for name, x in pairs.items():
            table.add(name, x, quantised[name])

    def predicted() -> None:
        for name, w in weights.items():
            table.add(f"{name}.weight", w, scale=scale)

    for what, run in (("hooks: QKV, down input, block output", hooks), ("FP8: four inputs, four gradients", fp8), ("weights, once a step", predicted)):
        run()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        for _ in range(20):
            run()
        host = (time.perf_counter() - began) / 20
        end.record()
        torch.cuda.synchronize()
        print(f"  {what}: {start.elapsed_time(end) / 20:.3f} ms on the GPU, {host * 1e3:.3f} ms on the host, per layer of {TOKENS} tokens")
    began = time.perf_counter()
    table.reduce(local=True)
    print(f"  reading {len(outputs) + len(pairs) + len(weights)} rows: {(time.perf_counter() - began) * 1e3:.3f} ms, once per observed step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--csv", type=Path, help="directory for metrics_bench.csv")
    parser.add_argument("--sweep", action="store_true", help="time other launch parameters too")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_metrics.py needs a CUDA GPU; tests/kernels/test_moments.py checks the same kernels on the CPU")
    start = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if sum(check_shape(name, *shape) for name, shape in SHAPES.items()):
        sys.exit(1)
    table: Table = []
    if not args.check:
        for name, shape in SHAPES.items():
            bench_shape(table, name, *shape, args.rounds)
        layer_cost()
        if args.sweep:
            sweep(args.rounds)
    if args.csv and table:
        write(table, args.csv / "metrics_bench.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
