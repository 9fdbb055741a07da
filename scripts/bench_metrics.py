"""Moments on one GPU: checked against the reference and for repeating bit for bit, then timed tensor by tensor against a copy of the same bytes, at the shapes
of the dense benchmark (8 layers of a 7B, 4 microbatches of 8192 tokens); then the sum over an observed iteration, and what it takes of the host.

    python scripts/bench_metrics.py [--check] [--sweep] [--csv DIR] [--rounds N]      (--check: no timing)

Bytes: everything read once. A copy reads and writes, so "copy" moves each of its bytes once too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_kernels import attribute, data
from benchmark import write
from kernel_timing import Calls, Table, copy_calls, measure, record, rotations

from fp8_recipes import kernels, reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.metrics import Alarms, JsonLines, MomentTable
from fp8_recipes.reference.moments import FIELDS, joined, neutral
from fp8_recipes.tensor import ScaledTensor

SHAPES = {"block output": (8192, 4096), "QKV": (8192, 12288), "inner gradient": (8192, 22016), "odd": (1000, 2880), "wide": (64, 65536)}
TOKENS, LAYERS, MICROBATCHES = 8192, 8, 4


class Watched(NamedTuple):
    """What is read of one tensor: x (bf16), its payload q, or x under a scale that is given. times: in an observed iteration."""

    name: str
    rows: int
    cols: int
    kind: str
    times: int
    e5m2: bool = False

    def bytes(self) -> float:
        """One byte per 128 of a payload is its tile's exponent."""
        return float(self.rows * self.cols) * {"x": 2, "x, q": 3 + 1 / 128, "q": 1 + 1 / 128, "x, scale": 2}[self.kind]


EACH = LAYERS * MICROBATCHES
WATCHED = (
    Watched("qkv", TOKENS, 12288, "x", EACH),
    Watched("block_output", TOKENS, 4096, "x", EACH),
    Watched("linear_qkv.input, linear_proj.input", TOKENS, 4096, "x, q", 2 * EACH),
    Watched("linear_proj.grad, linear_fc2.grad", TOKENS, 4096, "x, q", 2 * EACH),
    Watched("linear_qkv.grad", TOKENS, 12288, "x, q", EACH),
    Watched("linear_fc1.input", TOKENS, 4096, "q", EACH),
    Watched("linear_fc2.input", TOKENS, 11008, "q", EACH),
    Watched("linear_fc1.grad", TOKENS, 22016, "q", EACH),
    Watched("output_layer.input", TOKENS, 4096, "x, q", MICROBATCHES),
    Watched("output_layer.grad", TOKENS, 32000, "q", MICROBATCHES, e5m2=True),
    Watched("linear_qkv.weight", 12288, 4096, "x, scale", LAYERS),
    Watched("linear_proj.weight", 4096, 4096, "x, scale", LAYERS),
    Watched("linear_fc1.weight", 22016, 4096, "x, scale", LAYERS),
    Watched("linear_fc2.weight", 4096, 11008, "x, scale", LAYERS),
    Watched("output_layer.weight", 32000, 4096, "x, scale", 1),
)


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
    x[2] *= 2.0**-70
    x[3] *= 2.0**50
    bad: list[str] = []
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [("plain", x, None, {}), ("scale", x, None, {"scale": torch.tensor(2.0**-9, device="cuda")})]
    source = torch.arange(rows, dtype=torch.int32, device="cuda")
    source[::7] = -1
    for fmt in (E4M3, E5M2):
        for granularity, fold in (("row", None), ("micro", "row"), ("tensor", None)):
            q = kernels.quantize(x, granularity, fmt, fold=fold)
            cases += [(f"{granularity} {fmt}", x, q, {}), (f"payload {granularity} {fmt}", None, q, {})]
        cases += [(f"some rows {fmt}", None, kernels.quantize(x, "row", fmt), {"source": source}), (f"codes {fmt}", None, all_codes(rows, cols, fmt), {})]
    for case, given, q, options in cases:
        tables = [neutral(kernels.MOMENT_PARTS, device="cuda") for _ in range(2)]
        for out in tables:
            kernels.moments(given, q, out=out, **options)
        bad += [f"{case}: {text}" for text in disagreements(joined(tables[0]), reference.moments(given, q, **options))]
        if not torch.equal(*tables):
            bad.append(f"{case}: a second run gave other bits")
    sums = [torch.empty(rows, 2, dtype=torch.float64, device="cuda") for _ in range(2)]
    kernels.moments(x, row_sums=sums[0])
    reference.moments(x, row_sums=sums[1])
    if not torch.allclose(*sums, rtol=1e-5, atol=0):
        bad.append("row sums")
    print(f"check {name} {rows}x{cols}: {'pass' if not bad else 'FAIL ' + '; '.join(bad)}")
    return len(bad)


def all_codes(rows: int, cols: int, fmt: Any) -> ScaledTensor:
    """Every byte there is, under scales that a fold shifts by up to 40 binades either way."""
    code = torch.arange(rows * cols, device="cuda").remainder(256).to(torch.uint8).view(rows, cols)
    scale = 2.0 ** (torch.arange(rows, device="cuda").remainder(81) - 40.0)
    return ScaledTensor(code.view(fmt.dtype), scale, "row", torch.full((rows, -(-cols // 128)), 127, dtype=torch.uint8, device="cuda"))


def adders(w: Watched, add: Callable[..., object]) -> list[Callable[[], object]]:
    """``add(x, q, scale=...)`` on as many copies of the tensor as rotate through more than the L2 cache."""
    fmt, found = E5M2 if w.e5m2 else E4M3, []
    for i in range(rotations(w.bytes())):
        x = data(w.rows, w.cols, i)
        q = kernels.quantize(x, "micro", fmt, fold="row") if "q" in w.kind else None
        options = {"scale": torch.tensor(2.0, device="cuda")} if "scale" in w.kind else {}
        found.append(partial(add, x if "x" in w.kind else None, q, **options))
    return found


def bench(table: Table, rounds: int) -> None:
    """Every tensor of an observed iteration, and their sum."""
    sums = neutral(kernels.MOMENT_PARTS, device="cuda")
    total = least = 0.0
    for w in WATCHED:
        moved = w.bytes()
        calls: Calls = {"copy": copy_calls(moved), w.name: adders(w, partial(kernels.moments, out=sums))}
        times = measure(calls, rounds)
        record(table, (w.rows, w.cols), times, {"copy": moved, w.name: moved})
        table[-1] |= {"reads": w.kind, "times_per_iteration": w.times, "ms_per_iteration": round(w.times * times[w.name] / 1000, 3)}
        table[-2] |= {"reads": "", "times_per_iteration": "", "ms_per_iteration": ""}
        total += w.times * times[w.name] / 1000
        least += w.times * times["copy"] / 1000
    print(f"an observed iteration, {LAYERS} layers, {MICROBATCHES} microbatches: {total:.2f} ms on the GPU, {least:.2f} ms for a copy of as many bytes")
    row = dict.fromkeys(table[0], "") | {"op": "an observed iteration", "ms_per_iteration": round(total, 3), "of_copy": round(least / total, 3)}
    table.append(row)


def sweep(rounds: int) -> None:
    """Rows and registers of a program, and programs per multiprocessor, on one tensor of each kind."""
    module = import_module("fp8_recipes.kernels.moments")
    some = [w for w in WATCHED if w.name in ("qkv", "linear_qkv.grad", "linear_fc2.input", "linear_fc1.grad", "linear_fc1.weight")]
    calls = {w.name: adders(w, kernels.moments) for w in some}
    for rows, registers, per_sm in itertools.product((4, 8), (64, 80, 96, 128), (2, 3, 4, 6, 8, 12)):
        if rows * per_sm > 48:
            continue
        sums = neutral(per_sm * 132, device="cuda")
        with attribute(module, "ROWS", rows), attribute(module, "REGISTERS", registers):
            times = {name: measure({"": [partial(call, out=sums) for call in several]}, rounds)[""] for name, several in calls.items()}
        print(f"  rows {rows} registers {registers} programs {per_sm} x 132: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()), flush=True)


def host_cost() -> None:
    """Microseconds of the host to add a tensor, and milliseconds at the end of an observed step: transfer, alarms, JSON."""
    small = [Watched(w.name, 512, w.cols, w.kind, w.times, w.e5m2) for w in WATCHED]
    table, total = MomentTable(), 0.0
    for w in small:
        call = adders(w, partial(table.add, w.name))[0]
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(200):
            call()
        us = (time.perf_counter() - began) / 200 * 1e6
        total += us * w.times / 1000
        print(f"  {w.name}: {us:.1f} us of the host")
        torch.cuda.synchronize()
    print(f"  an observed iteration: {total:.2f} ms of the host beside its other work")
    for layer in range(LAYERS * 15):
        table.add(f"layers.{layer}.qkv", data(8, 128))
    alarms, sink = Alarms(), JsonLines("/dev/null")
    for step in range(1, 40):
        torch.cuda.synchronize()
        times = [time.perf_counter()]
        readings = table.reduce()
        times.append(time.perf_counter())
        raised = alarms.judge(step, readings)
        times.append(time.perf_counter())
        sink.write(step, readings, raised, {})
        times.append(time.perf_counter())
        table.reset()
    read, judged, written = (1e3 * (b - a) for a, b in itertools.pairwise(times))
    print(f"  end of an observed step, {len(readings)} names: reading {read:.2f} ms, alarms {judged:.2f} ms, JSON {written:.2f} ms")


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
        bench(table, args.rounds)
        host_cost()
        if args.csv:
            write(table, args.csv / "metrics_bench.csv")
        if args.sweep:
            sweep(args.rounds)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
