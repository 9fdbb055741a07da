"""Every algorithm that cuBLASLt offers for wgrad into fp32, timed beside the one that it recommends and that this package runs.

    python3 scripts/sweep_cublaslt.py [--count N] [--rounds N] [--csv DIR]

Split accumulator, added to main_grad; the shapes of scripts/bench_gemm.py and a long contraction. All candidates of a shape take turns; each is checked
against the recommended one first. An algorithm that is clearly faster on a shape is a reason to search by time once per kind of product (`cublaslt._plan`).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gemm import WGRAD
from benchmark import timed, write

from fp8_recipes.kernels import cublaslt
from fp8_recipes.tensor import ScaledTensor

SHAPES = [*WGRAD, (1024, 2816, 65536)]  # M x N x K; the last: few results of many tokens


def operand(rows: int, k: int, seed: int) -> ScaledTensor:
    """E4M3 payload [rows, k] under a scale per row."""
    gen = torch.Generator("cuda").manual_seed(seed)
    payload = torch.randn(rows, k, device="cuda", generator=gen).to(torch.float8_e4m3fn)
    return ScaledTensor(payload, torch.full((rows,), 2.0**-7, device="cuda"), "row")


def sweep(shape: tuple[int, int, int], count: int, rounds: int) -> list[dict[str, Any]]:
    m, n, k = shape
    pairs = [(operand(m, k, 2 * i), operand(n, k, 2 * i + 1)) for i in range(3)]
    out = torch.zeros(m, n, device="cuda")
    a, b = pairs[0]
    plans = cublaslt.candidates(cublaslt.kind_of(a, b, out, fast=False), count)
    if not plans:
        raise SystemExit(f"{m}x{n}x{k}: cuBLASLt has no algorithm")

    def run(plan: Any, call: int) -> torch.Tensor:
        one, other = pairs[call % len(pairs)]
        return cublaslt.product(plan, (one.payload, one.scale), (other.payload, other.scale), out, True)

    results = [cublaslt.product(plan, (a.payload, a.scale), (b.payload, b.scale), torch.zeros_like(out), False) for plan in plans]
    errors = [((result - results[0]).norm() / results[0].norm()).item() for result in results]
    del results
    times = timed({str(index): partial(run, plan) for index, plan in enumerate(plans)}, rounds, 4)
    best = min(times, key=times.__getitem__)
    first, gain = 2e-9 * m * n * k / times["0"], times["0"] / times[best]
    print(f"{m}x{n}x{k}: {len(plans)} algorithms; recommended {first:.0f} TFLOP/s, fastest is number {best}, {gain:.3f}x")
    return [
        {"shape": f"{m}x{n}x{k}", "algorithm": index, "workspace": plan.algo.workspace, "waves": float(plan.algo.waves), "ms": times[str(index)],
         "tflops": 2e-9 * m * n * k / times[str(index)], "over_recommended": times["0"] / times[str(index)], "difference": errors[index]}
        for index, plan in enumerate(plans)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="algorithms per shape, at most")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="directory for cublaslt_sweep.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sweep_cublaslt.py needs a CUDA GPU")
    rows = [row for shape in SHAPES for row in sweep(shape, args.count, args.rounds)]
    if args.csv:
        write(rows, args.csv / "cublaslt_sweep.csv")


if __name__ == "__main__":
    main()
