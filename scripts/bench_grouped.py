"""Grouped FP8 products and transposes on one Hopper GPU: correctness, sweep of tiles, comparison with torch's grouped products, the ways to transpose.

    python scripts/bench_grouped.py [--check] [--sweep] [--bench] [--transpose] [--csv DIR]      (no flag: check, bench and transpose; about 90 s)

Groups are ragged and random, their sizes multiples of 128 known only to the device. Times are medians over rounds in which all contenders take turns, on
operands that rotate so that they are not in L2, with the host far enough ahead not to be measured. Every contender multiplies the same rows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transpose_contenders
from benchmark import timed, write

from fp8_recipes.formats import E4M3, E5M2, Format
from fp8_recipes.kernels import quantize
from fp8_recipes.kernels.grouped_configs import SHARED, SMALL, WIDE, GroupedConfig
from fp8_recipes.kernels.grouped_gemm import grouped_gemm
from fp8_recipes.kernels.grouped_wgrad import grouped_wgrad
from fp8_recipes.reference import grouped as reference
from fp8_recipes.reference.grouped import GroupedTensor
from fp8_recipes.tensor import ScaledTensor

SHAPES = {
    "V2-Lite fc1": (64, 98304, 2048, 2816),
    "V2-Lite fc2": (64, 98304, 1408, 2048),
    "V3 fc1": (8, 32768, 7168, 4096),
    "V3 fc2": (8, 32768, 2048, 7168),
    "Qwen3-30B fc1": (128, 131072, 2048, 1536),
    "Qwen3-30B fc2": (128, 131072, 768, 2048),
}
"""Experts, rows, K (input features), N (output features)."""
SWEEP: dict[str, GroupedConfig] = {
    "128x256 s3 sub1": WIDE,
    "128x256 s3 sub2": replace(WIDE, subtiles=2),
    "128x256 s3 sub4": replace(WIDE, subtiles=4),
    "128x256 s4 sub2": replace(WIDE, stages=4, subtiles=2),
    "128x256 s3 g4": replace(WIDE, group=4),
    "128x256 s3 g16": replace(WIDE, group=16),
    "128x128 s5": SMALL,
    "128x128 s3 w4 x2": replace(SMALL, stages=3, subtiles=8, warps=4, resident=2),
    "256x128 s3 (wgrad)": replace(WIDE, block_m=256, block_n=128, subtiles=4),
    "128x256 s3 sub4 add (wgrad)": replace(WIDE, store="add", subtiles=4),
    "128x256 s3 sub4 reduce (wgrad)": replace(WIDE, store="reduce", subtiles=4),
    "128x256 s4 sub4 (wgrad)": replace(WIDE, stages=4, subtiles=4),
    "128x256 s2 (wgrad)": replace(WIDE, stages=2),
}
Rows = list[dict[str, object]]
Run = Callable[[int], object]


@dataclass
class Layout:
    """Groups of one buffer: starts [E + 1], expert of every 128-row block, and torch's form of the same (ends [E])."""

    rows: int
    offsets: torch.Tensor
    block_expert: torch.Tensor

    @property
    def ends(self) -> torch.Tensor:
        return self.offsets[1:].contiguous()


def layout(experts: int, rows: int, seed: int, unused: int = 0) -> Layout:
    """Random groups: `rows` rows in blocks of 128 over `experts` experts, shares spread by about a factor of two; then `unused` blocks."""
    gen = torch.Generator().manual_seed(seed)
    share = torch.rand(experts, generator=gen) + 0.5
    owner = torch.multinomial(share, rows // 128, replacement=True, generator=gen).sort().values
    blocks = torch.bincount(owner, minlength=experts)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), blocks.cumsum(0))) * 128
    block_expert = torch.cat((owner, torch.full((unused,), -1)))
    return Layout(rows + 128 * unused, offsets.int().cuda(), block_expert.int().cuda())


def activation(rows: int, cols: int, fmt: Format = E4M3) -> ScaledTensor:
    return quantize(torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16), "row", fmt)


def weights(experts: int, n: int, k: int) -> GroupedTensor:
    """[E, N, K] with one scale per output feature, which is what torch takes."""
    q = activation(experts * n, k)
    return GroupedTensor(q.payload.view(experts, n, k), q.scale.view(experts, n))


def transposed(experts: int, cols: int, rows: int, fmt: Format = E4M3) -> GroupedTensor:
    q = activation(cols, rows, fmt)
    return GroupedTensor(q.payload, torch.exp2(torch.randint(-9, -5, (experts, cols), device="cuda").float()))


def snr(got: torch.Tensor, want: torch.Tensor) -> float:
    """Signal to noise in dB."""
    return (20 * torch.log10(want.double().norm() / (got.double() - want.double()).norm())).item()


# --- check --------------------------------------------------------------------------------------------------------------------------------------

CHECKS = [(8, 4096, 2048, 2816, E4M3), (16, 2048, 1408, 2048, E5M2), (5, 1152, 272, 1104, E4M3), (40, 1024, 768, 208, E4M3), (1, 640, 528, 48, E5M2)]
"""Experts, rows, K, N, format of what is a gradient in wgrad."""


def check() -> Rows:
    """Against the fp32 reference; two runs bit for bit; rows of unused blocks and empty experts' gradients untouched; transposes bit for bit."""
    rows: Rows = []
    for case in CHECKS:
        rows += check_gemm(*case) + check_wgrad(*case) + check_transpose(*case)
    bad = [r for r in rows if not r["ok"]]
    print(f"check: {len(rows) - len(bad)} of {len(rows)} pass; worst SNR {min(float(str(r['snr_db'])) for r in rows):.1f} dB")
    for r in bad[:20]:
        print("  FAIL", r)
    return rows


def verdict(case: str, db: float, floor: float, repeats: bool, kept: bool) -> dict[str, object]:
    return {"case": case, "snr_db": db, "bitwise_repeat": repeats, "rest_untouched": kept, "ok": bool(db > floor and repeats and kept)}


def check_gemm(experts: int, rows: int, k: int, n: int, fmt: Format) -> Rows:
    groups = layout(experts, rows, seed=rows, unused=3)
    a, b = activation(groups.rows, k, fmt), weights(experts, n, k)
    want = reference.grouped_gemm(a, b, groups.block_expert, out_dtype=torch.float32)[:rows]
    results: Rows = []
    for dtype, promote, floor in ((torch.bfloat16, 0, 45.0), (torch.float32, 0, 45.0), (torch.float32, 512, 56.0)):
        runs = []
        for _ in range(2):
            out = torch.full((groups.rows, n), -7.0, device="cuda", dtype=dtype)
            runs.append(grouped_gemm(a, b, groups.block_expert, out=out, promote=promote))
        kept = bool((runs[0][rows:] == -7).all())
        name = f"gemm E{experts} {rows}x{n}x{k} {fmt} {dtype} promote {promote}"
        results.append(verdict(name, snr(runs[0][:rows], want), floor, torch.equal(*runs), kept))
    return results


def check_wgrad(experts: int, rows: int, k: int, n: int, fmt: Format) -> Rows:
    groups = layout(experts, rows, seed=rows + 1, unused=3)
    a_t, b_t = transposed(experts, n, groups.rows, fmt), transposed(experts, k, groups.rows)
    empty = groups.offsets[1:] == groups.offsets[:-1]
    results: Rows = []
    for dtype, accumulate, promote, floor in (
        (torch.float32, True, 0, 45.0),
        (torch.float32, True, 256, 56.0),
        (torch.float32, False, 0, 45.0),
        (torch.float32, False, 256, 56.0),
        (torch.bfloat16, True, 256, 45.0),
        (torch.bfloat16, False, 0, 45.0),
        (torch.bfloat16, False, 256, 45.0),
    ):
        before = torch.randn(experts, n, k, device="cuda").to(dtype) if accumulate else torch.full((experts, n, k), torch.nan, device="cuda", dtype=dtype)
        want = reference.grouped_wgrad(a_t, b_t, groups.offsets, out=before.float().clone(), accumulate=accumulate)
        runs = [grouped_wgrad(a_t, b_t, groups.offsets, out=before.clone(), accumulate=accumulate, promote=promote) for _ in range(2)]
        for gaps in (0, 64):  # one matrix per expert: in reverse without gaps, as Megatron lays out gradients, and scattered
            out = matrices(experts, n, k, dtype, gaps)
            for matrix, start in zip(out, before, strict=True):
                matrix.copy_(start)
            runs.append(torch.stack(list(grouped_wgrad(a_t, b_t, groups.offsets, out=out, accumulate=accumulate, promote=promote))))
        # Promoted sums are added to scattered main_grads at every promotion, to others once: as many roundings to fp32 more.
        roundings = accumulate and promote > 0 and dtype == torch.float32
        same = all(torch.equal(runs[0], r) for r in runs[1:-1]) and (snr(runs[-1], runs[0]) > 120 if roundings else torch.equal(runs[-1], runs[0]))
        kept = torch.equal(runs[0][empty], before[empty] if accumulate else torch.zeros_like(before[empty]))
        name = f"wgrad E{experts} {rows}x{n}x{k} {fmt} {dtype} accumulate {accumulate} promote {promote}"
        results.append(verdict(name, snr(runs[0], want), floor, same, kept))
    return results


def matrices(experts: int, n: int, k: int, dtype: torch.dtype, gaps: int) -> list[torch.Tensor]:
    """One [N, K] matrix per expert, the last first in memory, ``gaps`` elements between them."""
    memory = torch.zeros(experts, n * k + gaps, device="cuda", dtype=dtype)
    return [row[: n * k].view(n, k) for row in reversed(memory.unbind())]


def check_transpose(experts: int, rows: int, k: int, n: int, fmt: Format) -> Rows:
    del n
    groups = layout(experts, rows, seed=rows + 2, unused=3)
    found = transpose_contenders.check(rows, k, fmt, groups.offsets, groups.block_expert)
    return [verdict(f"transpose E{experts} {rows}x{k} {fmt} {name}", math.inf if equal else 0.0, 1.0, again, True) for name, (equal, again) in found.items()]


# --- timing -------------------------------------------------------------------------------------------------------------------------------------


SETS = 2
"""Operands of every shape here are larger than the 50 MB L2, so two sets that take turns suffice."""


def forward_contenders(experts: int, rows: int, k: int, n: int, configs: dict[str, GroupedConfig] | None) -> dict[str, Run]:
    groups = [layout(experts, rows, seed=s) for s in range(SETS)]
    sets = [(activation(rows, k), weights(experts, n, k), g) for g in groups]
    one_scale = [GroupedTensor(b.payload, b.scale[:, 0].contiguous()) for _, b, _ in sets]
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)

    def ours(i: int, promote: int = 0, config: GroupedConfig | None = None) -> torch.Tensor:
        a, b, g = sets[i % SETS]
        return grouped_gemm(a, b, g.block_expert, out=out, promote=promote, config=config)

    def expert_scales(i: int) -> torch.Tensor:
        """As the recipes have them: one scale per expert. torch wants one for every output feature."""
        a, _, g = sets[i % SETS]
        return grouped_gemm(a, one_scale[i % SETS], g.block_expert, out=out)

    if configs is not None:
        return {name: lambda i, c=c: ours(i, 0, c) for name, c in configs.items()}
    ends = [g.ends for g in groups]
    halves = [(torch.randn(rows, k, device="cuda", dtype=torch.bfloat16), torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)) for _ in range(SETS)]

    def scaled(i: int, fast: bool) -> torch.Tensor:
        a, b, _ = sets[i % SETS]
        return torch._scaled_grouped_mm(
            a.payload, b.payload.transpose(1, 2), a.scale, b.scale, offs=ends[i % SETS], out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    def bf16(i: int) -> torch.Tensor:
        a, b = halves[i % SETS]
        return torch._grouped_mm(a, b.transpose(1, 2), offs=ends[i % SETS])

    return {
        "bf16": bf16,
        "torch fast": lambda i: scaled(i, True),
        "torch split": lambda i: scaled(i, False),
        "ours fast": ours,
        "ours 1024": lambda i: ours(i, 1024),
        "ours fast, one scale": expert_scales,
    }


def wgrad_contenders(experts: int, rows: int, k: int, n: int, configs: dict[str, GroupedConfig] | None) -> dict[str, Run]:
    """torch returns a new bf16 gradient; ours does that, and adds to an fp32 main_grad: one tensor, or a matrix per expert."""
    groups = [layout(experts, rows, seed=s) for s in range(SETS)]
    sets = [(transposed(experts, n, rows), transposed(experts, k, rows), g) for g in groups]
    grad = torch.zeros(experts, n, k, device="cuda")
    reverse, scattered = (matrices(experts, n, k, torch.float32, gaps) for gaps in (0, 64)) if configs is None else ([], [])
    fresh = torch.empty(experts, n, k, device="cuda", dtype=torch.bfloat16)

    def ours(i: int, promote: int = 0, config: GroupedConfig | None = None, accumulate: bool = True) -> torch.Tensor:
        a, b, g = sets[i % SETS]
        return grouped_wgrad(a, b, g.offsets, out=grad if accumulate else fresh, accumulate=accumulate, promote=promote, config=config)

    if configs is not None:
        adding = {name: c for name, c in configs.items() if c.shared_bytes(4, c.store == "add") <= SHARED}
        found = {f"{name}, +fp32": lambda i, c=c: ours(i, 2048, c) for name, c in adding.items()}  # as training promotes
        found |= {f"{name}, bf16": lambda i, c=c: ours(i, 0, c, False) for name, c in configs.items() if c.store == WIDE.store}
        promoted = {name: c for name, c in configs.items() if c == SMALL or c.stages <= 3 and c.block_n == WIDE.block_n}
        return found | {f"{name}, bf16 promoted": lambda i, c=c: ours(i, 1024, c, False) for name, c in promoted.items()}
    ends = [g.ends for g in groups]
    flat = [(a.scale.flatten(), b.scale.flatten()) for a, b, _ in sets]
    halves = [tuple(torch.randn(c, rows, device="cuda", dtype=torch.bfloat16) for c in (n, k)) for _ in range(SETS)]

    def scaled(i: int, fast: bool) -> torch.Tensor:
        a, b, _ = sets[i % SETS]
        return torch._scaled_grouped_mm(a.payload, b.payload.t(), *flat[i % SETS], offs=ends[i % SETS], out_dtype=torch.bfloat16, use_fast_accum=fast)

    def bf16(i: int) -> torch.Tensor:
        a, b = halves[i % SETS]
        return torch._grouped_mm(a, b.t(), offs=ends[i % SETS])

    def apart(i: int, out: list[torch.Tensor], promote: int = 0) -> object:
        a, b, g = sets[i % SETS]
        return grouped_wgrad(a, b, g.offsets, out=out, accumulate=True, promote=promote)

    return {
        "bf16": bf16,
        "torch fast": lambda i: scaled(i, True),
        "torch split": lambda i: scaled(i, False),
        "ours fast": lambda i: ours(i, accumulate=False),
        "ours 1024": lambda i: ours(i, 1024, accumulate=False),
        "ours fast, +fp32": ours,
        "ours 1024, +fp32": lambda i: ours(i, 1024),
        "ours fast, +fp32 in reverse": lambda i: apart(i, reverse),
        "ours 2048, +fp32 in reverse": lambda i: apart(i, reverse, 2048),
        "ours fast, +fp32 scattered": lambda i: apart(i, scattered),
    }


CONTENDERS = {"fwd": forward_contenders, "wgrad": wgrad_contenders}


def bench(configs: dict[str, GroupedConfig] | None = None, rounds: int = 10) -> Rows:
    """TFLOP/s; `vs` is the speed beside torch's fast accumulator, fwd and wgrad separately in the geometric means."""
    rows: Rows = []
    for name, (experts, tokens, k, n) in SHAPES.items():
        for kind, make in CONTENDERS.items():
            usable = configs and {c: v for c, v in configs.items() if kind == "wgrad" or not c.endswith("(wgrad)")}
            result = timed(make(experts, tokens, k, n, usable), rounds, calls=3)
            base = result.get("torch fast", next(iter(result.values())))
            rows += [
                {"kind": kind, "shape": name, "experts": experts, "rows": tokens, "K": k, "N": n, "contender": c, "ms": ms,
                 "tflops": 2e-9 * tokens * n * k / ms, "vs": base / ms}
                for c, ms in result.items()
            ]  # fmt: skip
            print(f"  {name} {kind}: " + ", ".join(f"{c} {2e-9 * tokens * n * k / ms:.0f} ({base / ms:.2f}x)" for c, ms in result.items()), flush=True)
            torch.cuda.empty_cache()
    for kind in CONTENDERS:
        names = dict.fromkeys(str(r["contender"]) for r in rows if r["kind"] == kind)
        ratios = {c: [float(str(r["vs"])) for r in rows if r["kind"] == kind and r["contender"] == c] for c in names}
        print(f"{kind}, geometric mean (worst): " + ", ".join(f"{c} {statistics.geometric_mean(v):.3f}x ({min(v):.2f})" for c, v in ratios.items()))
    return rows


def sweep() -> Rows:
    """Candidate tiles, fast accumulator; ratios are to the first."""
    return bench(SWEEP, rounds=5)


def transpose() -> Rows:
    """Ours, the paper's and dequantise-transpose-quantise, against a copy of the same payload in the same run; in brackets the share of its bandwidth."""
    rows: Rows = []
    for experts, tokens, cols in transpose_contenders.SHAPES:
        groups = layout(experts, tokens, seed=0)
        sets = [torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)]
        result = timed(transpose_contenders.contenders(sets, groups.offsets, groups.block_expert), rounds=10, calls=3)
        rows += transpose_contenders.report(experts, tokens, cols, result)
        del sets
        torch.cuda.empty_cache()
    transpose_contenders.summary(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps: dict[str, Callable[[], Rows]] = {"check": check, "sweep": sweep, "bench": bench, "transpose": transpose}
    for name in steps:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="write DIR/grouped_<step>.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU; the CPU tests are tests/kernels/test_grouped_gemm.py and test_grouped_transpose.py")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    chosen = [name for name in steps if getattr(args, name)] or ["check", "bench", "transpose"]
    for name in chosen:
        start = time.perf_counter()
        rows = steps[name]()
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
        if args.csv:
            write(rows, args.csv / f"grouped_{name}.csv")
        if name == "check" and not all(r["ok"] for r in rows):
            return 1  # no times of wrong results
    return 0


if __name__ == "__main__":
    sys.exit(main())
