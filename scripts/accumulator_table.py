"""What Hopper's FP8 accumulator does to a long sum: a model of it in float64, checked against the measured error, and applied to sums that have a mean.

    python scripts/accumulator_table.py      writes docs/benchmarks/numerics_accumulator.csv (a minute on a CPU); make_tables.py puts it into docs/numerics.md

The model: every instruction adds 32 products to the accumulator. All 33 terms are aligned to the largest exponent among them, cut (toward zero) to 13 bits
below it, added, and the sum is cut again. On random normal operands at K = 8192 it gives 2.0e-3 unpromoted, 1.4e-3, 8.2e-4 and 5.9e-4 promoted every 4096,
2048 and 1024; the chip gives 2.0e-3, 1.3e-3, 8.5e-4 and 5.4e-4 (docs/benchmarks/gemm_error.csv). A cut toward zero is not noise: where a sum grows
steadily, every addition loses in the same direction.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from fp8_recipes.reference import dequantize, quantize

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "numerics_accumulator.csv"
STEP, FRACTION_BITS = 32, 13
LENGTHS, PROMOTE, WIDTH = (2048, 8192, 65536), (0, 4096, 2048, 1024), 16


def exponent(v: torch.Tensor) -> torch.Tensor:
    """Of zero: one that no term has to be aligned to."""
    return torch.where(v == 0, -1000.0, torch.frexp(v)[1].double() - 1)


def cut(v: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    unit = torch.exp2(top - FRACTION_BITS)
    return torch.trunc(v / unit) * unit


def hopper_sum(a: torch.Tensor, b: torch.Tensor, promote: int) -> torch.Tensor:
    """a: [K, N], b: [K, M] float64 holding FP8 values -> a^T b [N, M], with the accumulator added to a float64 total every ``promote`` rows (0 = never)."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    accumulator = total.clone()
    for k in range(0, a.shape[0], STEP):
        terms = a[k : k + STEP, :, None] * b[k : k + STEP, None, :]  # [32, N, M], exact
        top = torch.maximum(exponent(terms.abs().amax(0)), exponent(accumulator))
        accumulator = cut(accumulator, top) + cut(terms, top).sum(0)
        accumulator = cut(accumulator, exponent(accumulator))
        if promote and (k + STEP) % promote == 0:
            total += accumulator
            accumulator.zero_()
    return total + accumulator


def operands(kind: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two [rows, WIDTH] operands of wgrad. "coherent": columns with a mean of half their spread, as an outlier channel or a bias direction has."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
    if kind == "coherent":
        a, b = a + 0.5, b + 0.5
    return a, b


def measure() -> list[dict[str, str]]:
    rows = []
    for kind in ("random", "coherent"):
        for length in LENGTHS:
            a, b = operands(kind, length)
            aq, bq = (dequantize(quantize(t, "tensor")).double() for t in (a, b))
            exact = aq.t() @ bq
            rounding = (exact - a.double().t() @ b.double()).norm() / exact.norm()
            for promote in PROMOTE:
                if promote < length:
                    y = hopper_sum(aq, bq, promote)
                    error, lost = (y - exact).norm() / exact.norm(), 1 - (y * exact).sum() / exact.square().sum()
                    row = {"sum": kind, "K": str(length), "promote": str(promote)}
                    rows.append(row | {"error": f"{error:.1e}", "lost_percent": f"{100 * lost:.2f}", "fp8_rounding": f"{rounding:.1e}"})
                    print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    table = measure()
    with open(OUT, "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
