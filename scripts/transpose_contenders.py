"""Ways to the transposed payload that wgrad of experts reads: ours, the paper's, and what both replace. For bench_grouped.py.

    ours        one scale per row of a payload -> one scale per column block over all tokens of an expert (`grouped_fold_transpose`)
    columns     the same, one scale per column: another read of the payload finds its largest value
    paper       one scale per 1x128 -> one per row of every transposed 128x128 tile (`scaling_aware_transpose`, Algorithm 1 of arXiv 2511.02302)
    naive       dequantise to bf16, transpose, quantise along the tokens: three passes, or two with the transpose inside the first

The naive ways measure new scales, so their values are rounded twice; the others move exponents.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, Format
from fp8_recipes.kernels import grouped_fold_transpose, quantize, scaling_aware_transpose
from fp8_recipes.kernels.common import cdiv, decode, is_e5m2
from fp8_recipes.kernels.launch import launch
from fp8_recipes.reference.grouped import GroupedTensor
from fp8_recipes.tensor import ScaledTensor

SHAPES = ((64, 98304, 2048), (64, 98304, 1408), (8, 32768, 7168), (8, 32768, 4096), (128, 131072, 2048), (128, 131072, 768))
"""Experts, rows, columns: inputs of fc1 and fc2 of DeepSeek-V2-Lite, V3 and Qwen3-30B-A3B."""
BYTES = {"copy": 2, "ours": 2, "columns": 3, "paper": 2, "naive, 2 passes": 6, "naive, 3 passes": 10}
"""Read and written per value."""


@triton.jit
def _dequantize_kernel(payload_ptr, scale_ptr, out_ptr, rows, cols, E5M2: tl.constexpr, TRANSPOSE: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr):
    """FP8 [rows, cols] with a scale per 1x128 -> bf16 [rows, cols], or [cols, rows]. One program: TR rows x TC columns of one column of tiles."""
    row = (tl.program_id(0) * TR + tl.arange(0, TR)).to(tl.int64)[:, None]
    column = tl.program_id(1) * TC + tl.arange(0, TC)[None, :]
    mask = (row < rows) & (column < cols)
    scale = tl.load(scale_ptr + row * ((cols + 127) // 128) + tl.program_id(1) * TC // 128, mask=row < rows, other=1.0)
    value = (decode(tl.load(payload_ptr + row * cols + column, mask=mask, other=0), E5M2) * scale).to(tl.bfloat16)
    if TRANSPOSE:
        row_out = (tl.program_id(0) * TR + tl.arange(0, TR))[None, :]
        column_out = (tl.program_id(1) * TC + tl.arange(0, TC)).to(tl.int64)[:, None]
        tl.store(out_ptr + column_out * rows + row_out, tl.trans(value), mask=(row_out < rows) & (column_out < cols))
    else:
        tl.store(out_ptr + row * cols + column, value, mask=mask)


def dequantize(q: ScaledTensor, transpose: bool) -> torch.Tensor:
    """q [rows, cols] tile -> bf16 [rows, cols] or [cols, rows]; exact."""
    rows, cols = q.shape
    out = torch.empty((cols, rows) if transpose else (rows, cols), dtype=torch.bfloat16, device=q.device)
    tile = {"TR": 128, "TC": 64, "num_warps": 8} if transpose else {"TR": 32, "TC": 128, "num_warps": 4}
    grid = (cdiv(rows, tile["TR"]), cdiv(cols, tile["TC"]))
    launch(_dequantize_kernel, grid, q.payload.view(torch.uint8), q.scale, out, rows, cols, E5M2=is_e5m2(q.format), TRANSPOSE=transpose, **tile)
    return out


def naive(q: ScaledTensor, passes: int) -> ScaledTensor:
    """Dequantise, transpose, quantise: payload [cols, rows] with a scale per 1x128 tokens. passes: 2 or 3."""
    x = dequantize(q, True) if passes == 2 else dequantize(q, False).t().contiguous()
    return quantize(x, "tile", q.format)


def check(rows: int, cols: int, fmt: Format, offsets: torch.Tensor, block_expert: torch.Tensor) -> dict[str, tuple[bool, bool]]:
    """(equal to the reference bit for bit, equal in a second run) of every way, over a buffer whose blocks beyond ``rows`` are unused."""
    total = 128 * block_expert.shape[0]
    x = torch.randn(total, cols, device="cuda") * torch.randn(total, 1, device="cuda").mul(4).exp()
    x[rows // 2, cols // 2] = torch.nan
    by_row, by_tile = (quantize(x.bfloat16(), granularity, fmt) for granularity in ("row", "tile"))
    blocks = rows // 128

    def same(a: GroupedTensor, b: GroupedTensor, scales: int) -> bool:
        payloads = (t.payload[:, :rows].view(torch.uint8) for t in (a, b))
        return torch.equal(*payloads) and torch.equal(a.scale[:scales], b.scale[:scales])

    found = {}
    for name, to in (("ours", "column_block"), ("columns", "column")):
        runs = [grouped_fold_transpose(by_row, offsets, block_expert, to) for _ in range(2)]
        want = reference.grouped_fold_transpose(by_row, offsets, block_expert, to)
        found[name] = same(runs[0], want, len(want.scale)), same(*runs, len(want.scale))
    for name, q in (("paper", by_tile), ("paper, row scales", by_row)):
        runs = [scaling_aware_transpose(q, block_expert) for _ in range(2)]
        found[name] = same(runs[0], reference.scaling_aware_transpose(q, block_expert), blocks), same(*runs, blocks)
    twice = reference.quantize(reference.dequantize(by_tile, torch.bfloat16).t().contiguous(), "tile", fmt)
    for passes in (2, 3):
        results = [naive(by_tile, passes) for _ in range(2)]
        equal = [torch.equal(q.payload.view(torch.uint8), twice.payload.view(torch.uint8)) and torch.equal(q.scale, twice.scale) for q in results]
        found[f"naive, {passes} passes"] = equal[0], all(equal)
    return found


def contenders(sets: list[torch.Tensor], offsets: torch.Tensor, block_expert: torch.Tensor) -> dict[str, Callable[[int], object]]:
    """Each takes a counter and picks its operand by it. sets: bf16 [rows, cols]."""
    by_row, by_tile = ([quantize(x, granularity, E4M3) for x in sets] for granularity in ("row", "tile"))
    source = [q.payload.view(torch.uint8) for q in by_row]
    target = torch.empty_like(source[0])
    n = len(sets)
    return {
        "copy": lambda i: target.copy_(source[i % n]),
        "ours": lambda i: grouped_fold_transpose(by_row[i % n], offsets, block_expert),
        "columns": lambda i: grouped_fold_transpose(by_row[i % n], offsets, block_expert, "column"),
        "paper": lambda i: scaling_aware_transpose(by_tile[i % n], block_expert),
        "naive, 2 passes": lambda i: naive(by_tile[i % n], 2),
        "naive, 3 passes": lambda i: naive(by_tile[i % n], 3),
    }


def report(experts: int, rows: int, cols: int, result: dict[str, float]) -> list[dict[str, object]]:
    """One row of the CSV per way, and a line on the screen. result: milliseconds."""
    percent = {name: 50 * BYTES[name] * result["copy"] / ms for name, ms in result.items()}
    print(f"  E{experts} {rows}x{cols}: " + ", ".join(f"{name} {ms * 1e3:.0f} us ({percent[name]:.0f} %)" for name, ms in result.items()), flush=True)
    return [
        {"experts": experts, "rows": rows, "cols": cols, "way": name, "us": 1e3 * ms, "times_ours": ms / result["ours"], "bytes_per_value": BYTES[name],
         "percent_of_copy_bandwidth": percent[name]}
        for name, ms in result.items()
    ]  # fmt: skip


def summary(rows: list[dict[str, object]]) -> None:
    """Geometric means over the shapes, in units of ours."""
    for name in BYTES:
        ratios = [float(str(r["times_ours"])) for r in rows if r["way"] == name]
        print(f"  {name}: {statistics.geometric_mean(ratios):.2f} x the time of ours ({min(ratios):.2f} to {max(ratios):.2f})")
