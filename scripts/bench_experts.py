"""The memory-bound operations of experts on one Hopper GPU: their weights quantised and measured through a table of addresses, and SwiGLU with h in FP8.

    python scripts/bench_experts.py [--check] [--bench] [--sweep] [--csv DIR]      (no flag: check and bench; about 60 s)

check: against the reference, at real sizes; stops before any time is taken of wrong results. bench: beside a device copy that moves as many bytes, taking
turns; `percent_of_copy` is the bar (75). Also the host's time per call. sweep: sizes of programs. Times are medians, see bench_grouped.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from bench_grouped import SETS, Rows, Run
from benchmark import timed, write

from fp8_recipes import reference
from fp8_recipes.kernels import measure_experts, quantize_experts, swiglu_backward_quantize, swiglu_quantize, swiglu_quantize_saving
from fp8_recipes.kernels.experts import PLAN, ExpertPlan
from fp8_recipes.reference.grouped import GroupedTensor

swiglu_module, row_module = (import_module(f"fp8_recipes.kernels.{name}") for name in ("swiglu", "rows"))
WEIGHTS = {
    "V2-Lite fc1": (64, 2816, 2048),
    "V2-Lite fc2": (64, 2048, 1408),
    "V3 fc1": (8, 4096, 7168),
    "V3 fc2": (8, 7168, 2048),
    "Qwen3-30B fc1": (128, 1536, 2048),
    "Qwen3-30B fc2": (128, 2048, 768),
}
"""Experts, N, K."""
ROWS = {"V2-Lite": (98304, 1408), "V3": (32768, 2048), "Qwen3-30B": (131072, 768)}
"""Rows, F."""
PLANS = [PLAN, replace(PLAN, block=4096), replace(PLAN, block=16384), replace(PLAN, warps=8), replace(PLAN, block=16384, warps=8)]
TILES = [
    PLAN,
    replace(PLAN, warps=8),
    replace(PLAN, cols=128),
    replace(PLAN, cols=128, warps=8),
    replace(PLAN, rows=256, warps=8),
    replace(PLAN, rows=64, cols=128),
]
PER_THREAD = (16, 24, 48, 64)


def parameters(experts: int, n: int, k: int) -> list[torch.Tensor]:
    """Separate allocations, as parameters are."""
    return [torch.randn(n, k, device="cuda").mul_(0.02).bfloat16() for _ in range(experts)]


def activations(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy [rows, F], h [rows, 2F], prob [rows]."""
    dy, h = (torch.randn(rows, c, device="cuda", dtype=torch.bfloat16) for c in (width, 2 * width))
    return dy, h, torch.rand(rows, device="cuda")


# --- check ------------------------------------------------------------------------------------------------------------------------------------


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def share(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of bytes that differ."""
    return (a.view(torch.uint8) != b.view(torch.uint8)).float().mean().item()


def check() -> Rows:
    """Weights and the saved h bit for bit; what goes through exp differs in at most one element of a thousand."""
    rows: Rows = []
    for name, shape in (("V2-Lite fc2", WEIGHTS["V2-Lite fc2"]), ("V3 fc2", WEIGHTS["V3 fc2"]), ("ragged", (3, 1000, 2056)), ("one expert", (1, 256, 512))):
        w = parameters(*shape)
        w[0][3, 5], w[-1][7, 9] = torch.nan, torch.inf
        w[-1][8] = 0
        amax = measure_experts(w)
        ok = same(amax, reference.measure_experts(w))
        for transpose in (False, True):
            got, want = (f(w, amax, 0.01, transpose=transpose) for f in (quantize_experts, reference.quantize_experts))
            ok &= same(got.payload, want.payload) and same(got.scale, want.scale)
        rows.append({"case": f"weights {name}", "differs": 0.0, "ok": ok})
    for width in (768, 1408, 2048, 7168):
        dy, h, prob = activations(4096, width)
        q, saved = swiglu_quantize_saving(h, prob=prob)
        want_q, want = reference.swiglu_quantize_saving(h, prob=prob)
        exact = same(saved.payload, want.payload) and same(saved.scale, want.scale)
        grad, dprob = swiglu_backward_quantize(dy, saved, prob=prob)
        want_grad, want_dprob = reference.swiglu_backward_quantize(dy, saved, prob=prob)
        again = swiglu_quantize(saved, prob=prob), reference.swiglu_quantize(saved, prob=prob)
        differs = max(share(a.payload, b.payload) for a, b in ((q, want_q), (grad, want_grad), again))
        near = bool(((dprob - want_dprob).abs() <= 1e-4 * (dy.float().abs() * reference.dequantize(saved)[:, :width].abs()).sum(1)).all())
        rows.append({"case": f"swiglu F {width}", "differs": differs, "ok": exact and near and differs < 1e-3})
    for r in rows:
        print(f"  {r['case']}: {'ok' if r['ok'] else 'FAIL'}, {float(str(r['differs'])):.1e} differ")
    return rows


# --- timing -----------------------------------------------------------------------------------------------------------------------------------


def beside_copy(case: str, contenders: dict[str, tuple[Run, int]], rounds: int = 10) -> Rows:
    """Contenders (call, bytes it moves) and for each a copy of as many bytes, in turns."""
    runs: dict[str, Run] = {}
    memory = torch.empty(max(b for _, b in contenders.values()) // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(memory)
    for name, (run, moved) in contenders.items():
        runs[name] = run
        runs[f"copy for {name}"] = lambda i, n=moved // 2: target[:n].copy_(memory[:n])
    result = timed(runs, rounds, calls=3)
    found: Rows = []
    for name, (_, moved) in contenders.items():
        ms, copy = result[name], result[f"copy for {name}"]
        percent = 100 * copy / ms
        found.append({"case": case, "operation": name, "us": 1e3 * ms, "tb_per_s": moved / ms * 1e-9, "copy_us": 1e3 * copy, "percent_of_copy": percent})
        print(f"  {case}, {name}: {1e3 * ms:.1f} us, {moved / ms * 1e-9:.2f} TB/s, {percent:.0f} % of copy", flush=True)
    return found


def weight_contenders(shape: tuple[int, int, int], plans: list[tuple[ExpertPlan, bool]]) -> dict[str, tuple[Run, int]]:
    sets = [parameters(*shape) for _ in range(SETS)]
    maxima = [measure_experts(w) for w in sets]
    values = shape[0] * shape[1] * shape[2]

    def quantised(i: int, transpose: bool, plan: ExpertPlan) -> GroupedTensor:
        return quantize_experts(sets[i % SETS], maxima[i % SETS], transpose=transpose, plan=plan)

    found: dict[str, tuple[Run, int]] = {}
    for plan, transpose in plans:
        size = f"{plan.rows}x{plan.cols}" if transpose else plan.block
        name = f"quantize_experts {'transposed ' if transpose else ''}{size}/{plan.warps}"
        found[name] = (lambda i, t=transpose, p=plan: quantised(i, t, p)), 3 * values
    found["measure_experts"] = (lambda i: measure_experts(sets[i % SETS])), 2 * values
    return found


def swiglu_contenders(rows: int, width: int) -> dict[str, tuple[Run, int]]:
    sets = [activations(rows, width) for _ in range(SETS)]
    saved = [swiglu_quantize_saving(h, prob=prob)[1] for _, h, prob in sets]
    values = rows * width

    def forward(i: int, operation: Callable[..., object]) -> object:
        _, h, prob = sets[i % SETS]
        return operation(h, prob=prob)

    def backward(i: int, fp8: bool, **options: str) -> object:
        dy, h, prob = sets[i % SETS]
        return swiglu_backward_quantize(dy, saved[i % SETS] if fp8 else h, prob=prob, **options)

    return {
        "swiglu": (lambda i: forward(i, swiglu_quantize), 5 * values),
        "swiglu, save_h": (lambda i: forward(i, swiglu_quantize_saving), 7 * values),
        "swiglu of saved h": (lambda i: swiglu_quantize(saved[i % SETS], prob=sets[i % SETS][2]), 3 * values),
        "backward": (lambda i: backward(i, False), 8 * values),
        "backward of saved h": (lambda i: backward(i, True), 6 * values),
        "backward of saved h, tile to row": (lambda i: backward(i, True, granularity="tile", fold="row"), 6 * values),
    }


def bench() -> Rows:
    rows: Rows = []
    for name, shape in WEIGHTS.items():
        rows += beside_copy(name, weight_contenders(shape, [(PLAN, False), (PLAN, True)]))
        torch.cuda.empty_cache()
    for name, shape in ROWS.items():
        rows += beside_copy(f"{name} {shape[0]}x{shape[1]}", swiglu_contenders(*shape))
    for experts in (8, 64, 128):
        w = parameters(experts, 128, 128)
        amax = measure_experts(w)
        rows.append({"case": f"host, {experts} experts", "operation": "quantize_experts", "us": host_us(lambda w=w, amax=amax: quantize_experts(w, amax))})
        print(f"  {rows[-1]['case']}: {rows[-1]['us']:.1f} us a call")
    worst = min((r for r in rows if "percent_of_copy" in r), key=lambda r: float(str(r["percent_of_copy"])))
    print(f"lowest: {worst['case']}, {worst['operation']}: {worst['percent_of_copy']:.0f} % of copy (bar 75)")
    return rows


def host_us(call: Callable[[], object], calls: int = 200) -> float:
    """Microseconds that the host spends per call, the GPU having less to do."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent / calls


def sweep() -> Rows:
    rows: Rows = []
    for name in ("V2-Lite fc1", "V3 fc2", "Qwen3-30B fc2"):
        rows += beside_copy(name, weight_contenders(WEIGHTS[name], [(p, False) for p in PLANS] + [(p, True) for p in TILES]), rounds=5)
    usual = swiglu_module.SAVE_PER_THREAD, row_module.ELEMENTS_PER_THREAD
    for name, shape in ROWS.items():
        for values in PER_THREAD:
            swiglu_module.SAVE_PER_THREAD = row_module.ELEMENTS_PER_THREAD = values
            rows += beside_copy(f"{name} {shape[0]}x{shape[1]}, {values}/thread", swiglu_contenders(*shape), rounds=5)
    swiglu_module.SAVE_PER_THREAD, row_module.ELEMENTS_PER_THREAD = usual
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps: dict[str, Callable[[], Rows]] = {"check": check, "bench": bench, "sweep": sweep}
    for name in steps:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="write DIR/experts_<step>.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU; the CPU tests are tests/kernels/test_experts.py and test_swiglu.py")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in [name for name in steps if getattr(args, name)] or ["check", "bench"]:
        start = time.perf_counter()
        rows = steps[name]()
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
        if args.csv:
            write(rows, args.csv / f"experts_{name}.csv")
        if name == "check" and not all(r["ok"] for r in rows):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
