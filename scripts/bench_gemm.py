"""FP8 GEMM on one Hopper GPU: correctness, error of accumulation, sweep of tiles, comparison with stock kernels.

    python scripts/bench_gemm.py [--check] [--error] [--sweep] [--bench] [--csv DIR]      (no flag: all four, in this order)

Times are medians over rounds in which all contenders take turns, on operands that rotate so that they are not in L2, with the host far enough ahead not to
be measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from benchmark import timed, write

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.kernels.gemm import gemm, gemm_persistent
from fp8_recipes.kernels.gemm_configs import SMALL, TALL, WIDE, GemmConfig
from fp8_recipes.tensor import ScaledTensor

FPROP = [
    (8192, 4096, 4096), (8192, 11008, 4096), (8192, 22016, 4096), (8192, 12288, 4096), (8192, 4096, 11008), (8192, 4096, 22016), (8192, 4096, 12288),
    (8192, 8192, 8192),
]  # fmt: skip
WGRAD = [(4096, 4096, 8192), (12288, 4096, 8192), (22016, 4096, 8192), (4096, 11008, 8192), (4096, 7168, 4096), (8192, 8192, 8192)]
SWEEP: dict[str, GemmConfig] = {
    "128x256 s3": WIDE,
    "128x256 s4": replace(WIDE, stages=4),
    "128x256 s3 sub2": replace(WIDE, subtiles=2),
    "128x256 s3 add": replace(WIDE, store="add"),
    "128x256 s4 atomic": replace(WIDE, stages=4, store="atomic"),
    "128x256 s3 g4": replace(WIDE, group=4),
    "128x256 s3 g16": replace(WIDE, group=16),
    "256x128 s3": TALL,
    "256x128 s4 sub4": replace(TALL, stages=4, subtiles=4),
    "128x128 s5": SMALL,
}
Rows = list[dict[str, object]]
Run = Callable[[int], object]
Pairs = list[tuple[ScaledTensor, ScaledTensor]]


def operand(rows: int, cols: int, granularity: str = "row", fmt=E4M3, outliers: bool = False) -> ScaledTensor:
    """Random normal (optionally with 8 columns 1000 times larger), quantised to E4M3 or E5M2."""
    x = torch.randn(rows, cols, device="cuda")
    if outliers:
        x[:, torch.randperm(cols, device="cuda")[:8]] *= 1000
    return reference.quantize(x, granularity, fmt)


def exact(a: ScaledTensor, b: ScaledTensor) -> torch.Tensor:
    return reference.dequantize(a).double() @ reference.dequantize(b).double().t()


def snr(got: torch.Tensor, want: torch.Tensor) -> float:
    """Signal to noise in dB."""
    return (20 * torch.log10(want.norm() / (got.double() - want).norm())).item()


MODES: dict[str, tuple[dict, float]] = {
    "bf16": ({}, 45.0),
    "bf16 split": ({"promote": 1024}, 50.0),
    "fp32": ({"out_dtype": torch.float32}, 45.0),
    "fp32 promoted": ({"out_dtype": torch.float32, "promote": 1024}, 56.0),
    "into bf16": ({"out": torch.bfloat16, "promote": 512}, 50.0),
    "into fp32": ({"out": torch.float32, "promote": 512}, 56.0),
    "accumulate fp32": ({"out": torch.float32, "accumulate": True, "promote": 1024}, 56.0),
    "accumulate bf16": ({"out": torch.bfloat16, "accumulate": True, "promote": 1024}, 50.0),
}
"""Arguments of `gemm` and the least SNR in dB: rounding to bf16 leaves 55, the 14-bit accumulator about 54 at K = 8192, promoted 66."""
E4M3_ROWS = (E4M3, E4M3, "row", "row", False)
CASES = [
    ((4096, 4352, 2048), False, [E4M3_ROWS], list(MODES)),
    ((1000, 1104, 2064), True, [E4M3_ROWS], list(MODES)),
    ((257, 1001, 528), False, [E4M3_ROWS], ["fp32 promoted", "into bf16", "accumulate fp32", "accumulate bf16"]),
    ((130, 40, 8192), True, [E4M3_ROWS], ["fp32", "accumulate fp32"]),
    ((1, 16, 16), False, [E4M3_ROWS], ["bf16", "fp32", "accumulate fp32"]),
    (
        (1000, 1104, 2064),
        False,
        [(E5M2, E4M3, "row", "tensor", False), (E4M3, E5M2, "row", "row", True), (E5M2, E5M2, "tensor", "row", False), (E4M3, E4M3, "tensor", "tensor", True),
         (E4M3, E4M3, "row", "tensor", True)],
        ["bf16", "accumulate fp32"],
    ),
]  # fmt: skip
"""Shape, outlier columns in a, (format and granularity of a and b, bias), modes."""


def check() -> Rows:
    """Every mode against float64 of the dequantised operands, two runs bit for bit, NaN in what must be overwritten."""
    rows: Rows = []
    for (m, n, k), outliers, kinds, modes in CASES:
        for fa, fb, ga, gb, use_bias in kinds:
            a, b = operand(m, k, ga, fa, outliers), operand(n, k, gb, fb)
            bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if use_bias else None
            case = f"{m}x{n}x{k} {fa} {ga} x {fb} {gb}{' bias' if use_bias else ''}{' outliers' if outliers else ''}"
            rows += [check_one(a, b, bias, mode, case) for mode in modes]
    bad = [r for r in rows if not r["ok"]]
    worst = {mode: min(float(str(r["snr_db"])) for r in rows if r["mode"] == mode) for mode in MODES}
    print(f"check: {len(rows) - len(bad)} of {len(rows)} pass; worst SNR in dB:", ", ".join(f"{k} {v:.1f}" for k, v in worst.items()))
    for r in bad[:20]:
        print("  FAIL", r)
    return rows


def check_one(a: ScaledTensor, b: ScaledTensor, bias: torch.Tensor | None, mode: str, case: str) -> dict[str, object]:
    options, floor = dict(MODES[mode][0]), MODES[mode][1]
    shape = (a.shape[0], b.shape[0])
    want = exact(a, b) + (0 if bias is None else bias.double())
    dtype = options.pop("out", None)
    before = None
    if dtype is not None:
        before = torch.randn(shape, device="cuda") * want.std().float() if options.get("accumulate") else torch.full(shape, torch.nan, device="cuda")
        before = before.to(dtype)
        want = want + before.double() if options.get("accumulate") else want
    results = [gemm(a, b, bias=bias, out=None if before is None else before.clone(), **options) for _ in range(2)]
    db = snr(results[0], want)
    same = torch.equal(results[0], results[1])
    return {"case": case, "mode": mode, "snr_db": db, "bitwise_repeat": same, "ok": bool(db > floor and same)}


def error() -> Rows:
    """Relative Frobenius error of accumulation alone (operands are exact FP8), random normal, M = N = 1024."""
    rows: Rows = []
    for k in (2048, 4096, 8192, 16384, 32768):
        a, b = operand(1024, k, "tensor"), operand(1024, k, "tensor")
        want = exact(a, b)
        row: dict[str, object] = {"K": k}
        for promote in (0, 4096, 2048, 1024, 512, 128):
            out = torch.empty(1024, 1024, device="cuda")
            gemm_persistent(a, b, out, promote=promote, config=WIDE, programs=132)
            row[f"promote {promote}"] = ((out.double() - want).norm() / want.norm()).item()
        for name, fast in (("cublas fast", True), ("cublas split", False)):
            out = torch._scaled_mm(a.payload, b.payload.t(), a.scale, b.scale, out_dtype=torch.float32, use_fast_accum=fast)
            row[name] = ((out.double() - want).norm() / want.norm()).item()
        ra, rb = (q.scale.expand(1024).contiguous() for q in (a, b))
        for name, fast in (("row x column fast, bf16", True), ("row x column split, bf16", False)):
            out = torch._scaled_mm(a.payload, b.payload.t(), ra[:, None], rb[None, :], out_dtype=torch.bfloat16, use_fast_accum=fast)
            row[name] = ((out.double() - want).norm() / want.norm()).item()
        rows.append(row)
    keys = list(rows[0])
    print("error of accumulation, relative Frobenius (bf16 results include their rounding, 1.7e-3)")
    print(" | ".join(keys))
    for row in rows:
        print(" | ".join(f"{v:.2e}" if isinstance(v, float) else str(v) for v in row.values()))
    return rows


def operand_sets(m: int, n: int, k: int) -> Pairs:
    """Enough pairs that the operands of a call have left the 50 MB L2 when their turn comes again."""
    count = max(2, -(-160_000_000 // ((m + n) * k)))
    return [(operand(m, k), operand(n, k)) for _ in range(count)]


def accumulating(sets: Pairs, out: torch.Tensor, config: GemmConfig, promote: int) -> Run:
    def run(i: int) -> torch.Tensor:
        a, b = sets[i % len(sets)]
        return gemm_persistent(a, b, out, accumulate=True, promote=promote, config=config, programs=132)

    return run


def ours(sets: Pairs, **options) -> Run:
    def run(i: int) -> torch.Tensor:
        a, b = sets[i % len(sets)]
        return gemm(a, b, **options)

    return run


def split_then_add(sets: Pairs, grad: torch.Tensor) -> Run:
    """What a framework without accumulating FP8 products does: cuBLAS into bf16, then add to main_grad."""
    one = torch.ones((), device="cuda")

    def run(i: int) -> torch.Tensor:
        a, b = sets[i % len(sets)]
        return grad.add_(torch._scaled_mm(a.payload, b.payload.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=False))

    return run


def sweep() -> Rows:
    """Candidate tiles on the wgrad shapes, accumulating into fp32, promoted every 1024; TFLOP/s."""
    rows: Rows = []
    for m, n, k in WGRAD:
        sets = operand_sets(m, n, k)
        out = torch.zeros(m, n, device="cuda")
        contenders = {name: accumulating(sets, out, config, 1024) for name, config in SWEEP.items()}
        for promote in (2048, 0):
            contenders[f"128x256 s3 promote {promote}"] = accumulating(sets, out, WIDE, promote)
        result = timed(contenders, rounds=8, calls=4)
        rows += [{"shape": f"{m}x{n}x{k}", "config": name, "ms": ms, "tflops": 2e-9 * m * n * k / ms} for name, ms in result.items()]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    print("sweep, TFLOP/s, accumulate into fp32, promote 1024:", " | ".join(map(str, shapes)))
    for name in dict.fromkeys(r["config"] for r in rows):
        values = [next(r["tflops"] for r in rows if r["shape"] == s and r["config"] == name) for s in shapes]
        print(f"  {name:26s}", " ".join(f"{v:6.0f}" for v in values))
    return rows


def stock(sets: Pairs) -> dict[str, Run]:
    """torch's kernels on the same payloads, bf16 result."""
    one = torch.ones((), device="cuda")

    def scaled(i: int, rows: bool, fast: bool) -> torch.Tensor:
        a, b = sets[i % len(sets)]
        sa, sb = (a.scale[:, None], b.scale[None, :]) if rows else (one, one)
        return torch._scaled_mm(a.payload, b.payload.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "cublas fast": lambda i: scaled(i, False, True),
        "cublas split": lambda i: scaled(i, False, False),
        "row x column fast": lambda i: scaled(i, True, True),
        "row x column split": lambda i: scaled(i, True, False),
    }


def te_wgrad(m: int, n: int, k: int, out: torch.Tensor) -> Run:
    """TransformerEngine's own wgrad: per-tensor FP8, split accumulator, accumulated into fp32 by cuBLASLt."""
    import transformer_engine.pytorch  # noqa: F401  # loads the extension
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    quantizer = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, torch.device("cuda"), rowwise=True, columnwise=True)
    count = max(2, -(-160_000_000 // ((m + n) * k)))
    sets = [tuple(quantizer(torch.randn(k, rows, device="cuda", dtype=torch.bfloat16)) for rows in (n, m)) for _ in range(count)]

    def run(i: int) -> object:
        x, dy = sets[i % count]
        return general_gemm(x, dy, out_dtype=torch.float32, layout="NT", out=out, accumulate=True, use_split_accumulator=True, grad=True)

    return run


def bench_one(kind: str, m: int, n: int, k: int) -> Rows:
    sets = operand_sets(m, n, k)
    halves = [tuple(torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n)) for _ in range(2)]
    contenders: dict[str, Run] = {"bf16": lambda i: halves[i % 2][0] @ halves[i % 2][1].t()}
    contenders |= stock(sets)
    if kind == "fprop":
        linear = [(a, ScaledTensor(b.payload, b.scale[0].clone(), "tensor")) for a, b in sets]  # as fprop has it: row x tensor
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        contenders |= {"ours fast": ours(linear), "ours split": ours(linear, promote=1024)}
        contenders |= {f"ours into out, {name}": ours(sets, out=out, promote=p) for name, p in (("fast", 0), ("split", 1024))}
        peers = {name: "cublas fast" if name.endswith("fast") else "cublas split" for name in contenders if name.startswith("ours")}
    else:
        grad = torch.zeros(m, n, device="cuda")
        contenders["cublas split + add"] = split_then_add(sets, grad)
        if importlib.util.find_spec("transformer_engine"):
            contenders["transformer_engine"] = te_wgrad(m, n, k, grad)
        contenders |= {f"ours {name}": ours(sets, out=grad, accumulate=True, promote=p) for name, p in (("fast", 0), ("split", 1024))}
        peers = {name: "cublas fast" if name.endswith("fast") else "cublas split" for name in contenders if name not in ("bf16", "cublas fast")}
    result = timed(contenders, rounds=12, calls=4)
    return [
        {"kind": kind, "shape": f"{m}x{n}x{k}", "contender": name, "ms": ms, "tflops": 2e-9 * m * n * k / ms,
         "percent_of_cublas": 100 * result[peers[name]] / ms if name in peers else ""}
        for name, ms in result.items()
    ]  # fmt: skip


def bench() -> Rows:
    """Ours beside stock kernels; percent is of cuBLAS per-tensor with the same accumulation (which writes bf16 and does not accumulate)."""
    rows: Rows = []
    for kind, shapes in (("fprop", FPROP), ("wgrad", WGRAD)):
        print(f"{kind}: TFLOP/s (% of cuBLAS per-tensor, same accumulation)")
        for shape in shapes:
            new = bench_one(kind, *shape)
            rows += new
            cells = (f"{r['contender']} {r['tflops']:.0f}" + (f" ({r['percent_of_cublas']:.0f}%)" if r["percent_of_cublas"] else "") for r in new)
            print(f"  {new[0]['shape']}: " + ", ".join(cells), flush=True)
    print(f"host time per call: {host_microseconds():.0f} us")
    return rows


def host_microseconds() -> float:
    """What one accumulating call costs the host."""
    a, b, out = operand(128, 128), operand(128, 128), torch.zeros(128, 128, device="cuda")
    for _ in range(20):
        gemm(a, b, out=out, accumulate=True, promote=0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        gemm(a, b, out=out, accumulate=True, promote=0)
    return (time.perf_counter() - start) / 200 * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"check": check, "error": error, "sweep": sweep, "bench": bench}
    for name in steps:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="write DIR/gemm_<step>.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU; the CPU tests are tests/kernels/test_gemm.py")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    chosen = [name for name in steps if getattr(args, name)] or list(steps)
    failed = False
    for name in chosen:
        start = time.perf_counter()
        rows = steps[name]()
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
        if args.csv:
            write(rows, args.csv / f"gemm_{name}.csv")
        failed |= name == "check" and not all(r["ok"] for r in rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
