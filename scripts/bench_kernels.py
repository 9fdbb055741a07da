"""The memory-bound kernels on one GPU: checked bit for bit against the reference, then timed against a copy of the same bytes and TransformerEngine.

    python scripts/bench_kernels.py [--check] [--sweep] [--bench] [--csv DIR]      (no flag: check, then bench)

Times are medians of --rounds rounds in which all contenders take turns, on inputs that rotate so that they are not in L2, with the host far enough ahead not to
be measured. "of copy" is the share of what a device-to-device copy of as many bytes reached in the same rounds. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benchmark import write
from kernel_timing import Calls, Table, copy_calls, measure, record, rotations

from fp8_recipes import kernels, reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.kernels.fold_transpose import TransposePlan
from fp8_recipes.tensor import ScaledTensor
from fp8_recipes.weight_scaling import WeightScaling, measure_amax

SHAPES = [(8192, 4096), (8192, 11008), (8192, 12288), (8192, 22016), (16384, 4096), (32768, 4096), (32768, 11008)]
WEIGHTS = [(4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (11008, 16384)]  # the last is MOSS's, for the cost of measuring a scale
PLANS = [TransposePlan(*p) for p in itertools.product((128, 256), (4, 8), (True, False), (False, True))]
PER_THREAD = (32, 64, 128)
"""Elements per thread of the row kernels that the sweep tries."""
ALLOC: Any = import_module("fp8_recipes.kernels.common")
ROWS: Any = import_module("fp8_recipes.kernels.rows")
FOLD_TRANSPOSE: Any = import_module("fp8_recipes.kernels.fold_transpose")
Run = Callable[[int], object]


def data(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """bf16 normal rows of different size (a binade or two apart, as activations have), so that folds do shift."""
    gen = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, cols, device="cuda", generator=gen, dtype=torch.bfloat16)
    return x.mul_(torch.exp(torch.randn(rows, 1, device="cuda", generator=gen)).bfloat16())


@contextmanager
def attribute(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An output that starts as NaN bytes, so that what no kernel writes is seen."""
    t = torch.empty(shape, dtype=dtype, device=device)
    t.view(-1).view(torch.uint8).fill_(0x7F)
    return t


def differences(actual: ScaledTensor, expected: ScaledTensor) -> int:
    """Number of bytes that differ in payload and scales."""
    count = 0
    for field in ("payload", "scale", "tile_exponent", "global_scale"):
        a, e = getattr(actual, field), getattr(expected, field)
        if (a is None) != (e is None):
            return -1
        if e is not None:
            count += int((a.contiguous().view(-1).view(torch.uint8) != e.contiguous().view(-1).view(torch.uint8)).sum())
    return count


def check_cases() -> Iterator[tuple[str, ScaledTensor, ScaledTensor, float]]:
    """(name, kernel's result, reference's result, share of bytes that may differ)."""
    for rows, cols in ((1024, 4096), (516, 11008), (260, 22016), (37, 700), (64, 40960)):
        x = data(rows, cols)
        x[3, 5], x[4, 6], x[5], x[6] = float("nan"), float("-inf"), 0.0, x[6] * 1e-38
        for fmt, (granularity, fold) in itertools.product(
            (E4M3, E5M2), (("micro", "row"), ("row", None), ("tile", "row"), ("micro", None), ("tile", None), ("block", None), ("tensor", None))
        ):
            case = f"{rows}x{cols} {fmt} {granularity}{'+fold' if fold else ''}"
            q = reference.quantize(x, granularity, fmt, fold=fold)
            yield f"quantize {case}", kernels.quantize(x, granularity, fmt, fold=fold), q, 0
            if granularity == "tensor":
                yield f"fold_transpose {case}", kernels.fold_transpose(q), reference.fold_transpose(q), 0
            if granularity in ("micro", "tile", "row"):
                for to in ("column_block", "tensor"):
                    yield f"fold_transpose {case} {to}", kernels.fold_transpose(q, to), reference.fold_transpose(q, to), 0
                yield f"fold {case}", kernels.fold(q, "tensor"), reference.fold(q, "tensor"), 0
        measured = partial(reference.quantize, x, "micro", global_scale="measured")
        yield f"quantize {rows}x{cols} measured", kernels.quantize(x, "micro", global_scale="measured"), measured(), 0
        amax = torch.tensor(3.5, device="cuda")
        for transpose in (False, True):
            got = kernels.quantize_weight(x, amax, 0.125, transpose=transpose)
            yield f"quantize_weight {rows}x{cols} transpose={transpose}", got, reference.quantize_weight(x, amax, 0.125, transpose=transpose), 0
    yield from check_plans()
    yield from check_fused()
    yield from check_loss()


def check_plans() -> Iterator[tuple[str, ScaledTensor, ScaledTensor, float]]:
    """Every code under every shift, through every plan."""
    shifts = torch.arange(-60, 68, dtype=torch.int32)
    for fmt in (E4M3, E5M2):
        payload = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(128, 1).view(fmt.dtype).cuda()
        tiles = torch.full((128, 2), 127, dtype=torch.uint8, device="cuda")
        q = ScaledTensor(payload, torch.exp2(shifts.float()).cuda(), "row", tile_exponent=tiles)
        for plan in PLANS:
            yield f"fold_transpose all codes x shifts {fmt} {plan}", kernels.fold_transpose(q, plan=plan), reference.fold_transpose(q), 0
    q = reference.quantize(data(1024, 4096), "micro", fold="row")
    for plan in PLANS:
        yield f"fold_transpose {plan}", kernels.fold_transpose(q, plan=plan), reference.fold_transpose(q), 0


def check_fused() -> Iterator[tuple[str, ScaledTensor, ScaledTensor, float]]:
    for (rows, cols), (granularity, fold) in itertools.product([(1024, 4096), (512, 11008)], [("micro", "row"), ("row", None), ("tile", None)]):
        x, h, gamma = data(rows, cols), data(rows, 2 * cols, 1), data(1, cols, 2)[0]
        case = f"{rows}x{cols} {granularity}"
        got, rstd = kernels.rmsnorm_quantize(x, gamma, 1e-5, granularity, fold=fold)
        expected, expected_rstd = reference.rmsnorm_quantize(x, gamma, 1e-5, granularity, fold=fold)
        if not torch.allclose(rstd, expected_rstd, rtol=1e-6, atol=0):
            raise SystemExit(f"rmsnorm_quantize {case}: rstd differs by {(rstd / expected_rstd - 1).abs().max().item():.2e}")
        yield f"rmsnorm_quantize {case}", got, expected, 1e-3
        yield f"swiglu_quantize {case}", kernels.swiglu_quantize(h, granularity, fold=fold), reference.swiglu_quantize(h, granularity, fold=fold), 1e-3
        got = kernels.swiglu_backward_quantize(x, h, granularity, fold=fold)
        yield f"swiglu_backward_quantize {case}", got, reference.swiglu_backward_quantize(x, h, granularity, fold=fold), 1e-3


def check_loss() -> Iterator[tuple[str, ScaledTensor, ScaledTensor, float]]:
    for rows, cols in ((512, 32000), (64, 128256), (100, 1040)):
        logits, labels, dloss = loss_data(rows, cols, 0)
        m, s, target = kernels.softmax_parts(logits, labels)
        lse = m + s.log()
        if not torch.allclose(lse, torch.logsumexp(logits.float(), dim=1), rtol=1e-6, atol=4e-6):
            raise SystemExit(f"softmax_parts {rows}x{cols}: log of the sum differs")
        for granularity, fold in (("row", None), ("micro", "row")):
            given = (logits, labels, lse, target, dloss, granularity, E5M2)
            got = kernels.cross_entropy_backward_quantize(*given, fold=fold)
            yield f"cross_entropy_backward_quantize {rows}x{cols} {granularity}", got, reference.cross_entropy_backward_quantize(*given, fold=fold), 1e-2


def check() -> bool:
    failures = total = 0
    with attribute(ALLOC, "empty", poisoned):
        for name, actual, expected, share in check_cases():
            count = differences(actual, expected)
            total += 1
            if count < 0 or count > share * actual.payload.numel():
                failures += 1
                print(f"  FAIL {name}: {count} bytes of {actual.payload.numel()} differ")
    print(f"check: {total - failures} of {total} pass")
    return failures == 0


def te_calls(xs: list[torch.Tensor]) -> dict[str, list[Callable[[], object]]]:
    """TransformerEngine's casts with transposed copy: current scaling (amax, then cast) and delayed (cast with a given scale)."""
    if importlib.util.find_spec("transformer_engine") is None:
        return {}
    import transformer_engine.pytorch  # noqa: F401  # loads the extension that the next line names
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    current = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, torch.device("cuda"))
    delayed = Float8Quantizer(torch.ones(1, device="cuda"), torch.zeros(1, device="cuda"), tex.DType.kFloat8E4M3)
    return {"TE current cast+transpose": [partial(current, x) for x in xs], "TE delayed cast+transpose": [partial(delayed, x) for x in xs]}


def bench_activations(table: Table, rounds: int) -> None:
    for rows, cols in SHAPES:
        size = rows * cols
        xs = [data(rows, cols, i) for i in range(rotations(2 * size))]
        qs = [kernels.quantize(data(rows, cols, i), "micro", fold="row") for i in range(rotations(size))]
        contenders: Calls = {"copy (3 bytes)": copy_calls(3 * size), "copy (2 bytes)": copy_calls(2 * size)}
        contenders["quantize micro+fold"] = [partial(kernels.quantize, x, "micro", fold="row") for x in xs]
        contenders["quantize row"] = [partial(kernels.quantize, x, "row") for x in xs]
        contenders["fold_transpose"] = [partial(kernels.fold_transpose, q) for q in qs]
        if cols in (4096, 11008) and rows == 8192:
            contenders["quantize tensor"] = [partial(kernels.quantize, x, "tensor") for x in xs]
            contenders["quantize micro measured"] = [partial(kernels.quantize, x, "micro", global_scale="measured") for x in xs]
            contenders |= te_calls(xs)
        times = measure(contenders, rounds)
        extra = rows * (-(-cols // 128) + 4)
        once, twice = 3 * size + extra, 5 * size
        nbytes: dict[str, float] = {"copy (3 bytes)": 3 * size, "quantize micro+fold": once, "quantize row": once}
        nbytes |= {"quantize tensor": twice, "quantize micro measured": twice + size / 32}
        transposes = {name: times.pop(name) for name in ("copy (2 bytes)", "fold_transpose")}
        record(table, (rows, cols), times, nbytes, "copy (3 bytes)")
        record(table, (rows, cols), transposes, {"copy (2 bytes)": 2 * size, "fold_transpose": 2 * size + extra}, "copy (2 bytes)")


def bench_weights(table: Table, rounds: int) -> None:
    amax = torch.tensor(4.0, device="cuda")
    for rows, cols in WEIGHTS:
        size = rows * cols
        ws = [data(rows, cols, i) for i in range(rotations(2 * size))]
        contenders: Calls = {"copy": copy_calls(3 * size)}
        contenders["quantize_weight"] = [partial(kernels.quantize_weight, w, amax, 1e-3) for w in ws]
        contenders["quantize_weight transpose"] = [partial(kernels.quantize_weight, w, amax, 1e-3, transpose=True) for w in ws]
        qs = [kernels.quantize_weight(data(rows, cols, i), amax) for i in range(rotations(size))]
        contenders["fold_transpose of one scale"] = [partial(kernels.fold_transpose, q) for q in qs]
        contenders["measure_amax"] = [partial(measure_amax, w) for w in ws]  # what a predicted scale saves; predicting is arithmetic of the host
        moved = dict.fromkeys(contenders, 3 * size) | dict.fromkeys(("fold_transpose of one scale", "measure_amax"), 2 * size)
        record(table, (rows, cols), measure(contenders, rounds), moved)


def bench_fused(table: Table, rounds: int) -> None:
    for rows, cols in ((8192, 4096), (8192, 11008), (8192, 14336), (32768, 4096)):
        size = rows * cols
        hs, dys = [data(rows, 2 * cols, i) for i in range(2)], [data(rows, cols, i) for i in range(rotations(2 * size))]
        gamma = data(1, cols)[0]
        cases: dict[str, tuple[float, list[Callable[[], object]]]] = {
            "rmsnorm_quantize micro+fold": (3 * size, [partial(kernels.rmsnorm_quantize, x, gamma, granularity="micro", fold="row") for x in dys]),
            "swiglu_quantize micro+fold": (5 * size, [partial(kernels.swiglu_quantize, h, "micro", fold="row") for h in hs]),
            "swiglu_backward_quantize micro+fold": (
                8 * size,
                [partial(kernels.swiglu_backward_quantize, dy, h, "micro", fold="row") for dy, h in zip(dys, itertools.cycle(hs), strict=False)],
            ),
        }
        for name, (moved, calls) in cases.items():
            record(table, (rows, cols), measure({"copy": copy_calls(moved), name: calls}, rounds), {"copy": moved, name: moved})


def bench_loss(table: Table, rounds: int) -> None:
    """Both halves of an FP8 head's loss; the tokens of two sequences, vocabularies of Llama 2 and 3."""
    for rows, cols in ((8192, 32000), (8192, 128256)):
        size = rows * cols
        batches = [loss_data(rows, cols, i) for i in range(rotations(2 * size))]
        parts = [partial(kernels.softmax_parts, logits, labels) for logits, labels, _ in batches]
        gradients = []
        for logits, labels, dloss in batches:
            m, s, target = kernels.softmax_parts(logits, labels)
            lse = m + s.log()
            gradients.append(partial(kernels.cross_entropy_backward_quantize, logits, labels, lse, target, dloss, "row", E5M2))
        for name, moved, calls in (("softmax_parts", 2 * size, parts), ("cross_entropy_backward_quantize row", 3 * size, gradients)):
            record(table, (rows, cols), measure({"copy": copy_calls(moved), name: calls}, rounds), {"copy": moved, name: moved})


def loss_data(rows: int, cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, labels, gradient of each token's loss)."""
    gen = torch.Generator(device="cuda").manual_seed(seed)
    labels = torch.randint(0, cols, (rows,), generator=gen, device="cuda")
    return data(rows, cols, seed), labels, torch.rand(rows, generator=gen, device="cuda")


def with_per_thread(per_thread: int, call: Callable[..., object], *args: Any, **options: Any) -> object:
    with attribute(ROWS, "ELEMENTS_PER_THREAD", per_thread):
        return call(*args, **options)


def sweep_cases() -> Iterator[tuple[str, tuple[int, int], float, Calls]]:
    """(operation, shape, bytes moved, setting -> calls)."""
    calls: Calls
    for rows, cols in ((8192, 4096), (8192, 11008), (8192, 12288), (8192, 22016), (32768, 4096)):
        size = rows * cols
        xs = [data(rows, cols, i) for i in range(rotations(2 * size))]
        for granularity, fold in (("micro", "row"), ("row", None)):
            calls = {f"{n}/thread": [partial(with_per_thread, n, kernels.quantize, x, granularity, fold=fold) for x in xs] for n in PER_THREAD}
            yield f"quantize {granularity}", (rows, cols), 3 * size, calls
        qs = [kernels.quantize(data(rows, cols, i), "micro", fold="row") for i in range(rotations(size))]
        plans = PLANS if (rows, cols) == (8192, 11008) else [p for p in PLANS if p.columns_first]
        calls = {plan_name(plan): [partial(kernels.fold_transpose, q, plan=plan) for q in qs] for plan in plans}
        yield "fold_transpose", (rows, cols), 2 * size, calls
    for rows, cols in ((8192, 4096), (8192, 11008), (8192, 14336)):
        hs, dys = [data(rows, 2 * cols, i) for i in range(2)], [data(rows, cols, i) for i in range(2)]
        forward, backward = kernels.swiglu_quantize, kernels.swiglu_backward_quantize
        calls = {f"{n}/thread": [partial(with_per_thread, n, forward, h, "micro", fold="row") for h in hs] for n in PER_THREAD}
        yield "swiglu_quantize", (rows, cols), 5 * rows * cols, calls
        for granularity, fold in (("micro", "row"), ("row", None)):
            pairs = list(zip(dys, hs, strict=True))
            calls = {f"{n}/thread": [partial(with_per_thread, n, backward, dy, h, granularity, fold=fold) for dy, h in pairs] for n in PER_THREAD}
            yield f"swiglu_backward_quantize {granularity}", (rows, cols), 8 * rows * cols, calls
    amax = torch.tensor(4.0, device="cuda")
    for rows, cols in ((12288, 4096), (4096, 11008)):
        ws = [data(rows, cols, i) for i in range(rotations(2 * rows * cols))]
        calls = {}
        for plan in (p for p in PLANS if not p.overlap):  # a single kernel, nothing to overlap with
            calls[plan_name(plan)] = [partial(FOLD_TRANSPOSE.quantize_given_transposed, w, amax, 1e-3, E4M3, plan) for w in ws]
        yield "quantize_weight transpose", (rows, cols), 3 * rows * cols, calls
        qs = [kernels.quantize_weight(w, amax) for w in ws]
        calls = {plan_name(plan): [partial(kernels.fold_transpose, q, plan=plan) for q in qs] for plan in PLANS if not plan.overlap}
        yield "fold_transpose of one scale", (rows, cols), 2 * rows * cols, calls


def sweep(table: Table, rounds: int) -> None:
    """Elements per thread of the row kernels and the transposes' plans: all in the table, the best three of each printed."""
    for op, shape, nbytes, calls in sweep_cases():
        times = measure({"copy": copy_calls(nbytes), **calls}, min(rounds, 8))
        copy = times.pop("copy")
        best = sorted(times, key=times.__getitem__)
        for name in best:
            table.append({"shape": f"{shape[0]}x{shape[1]}", "op": op, "setting": name, "us": round(times[name], 2), "of_copy": round(copy / times[name], 3)})
        print(f"{shape[0]:>6}x{shape[1]:<6} {op:<31} " + "   ".join(f"{name} {times[name]:.1f} us {copy / times[name]:.0%}" for name in best[:3]))


def bench_host(table: Table, rounds: int) -> None:
    """Microseconds that a call takes on the host: many calls on tensors so small that the GPU does not hold them up."""
    x, h, amax = data(256, 512), data(256, 1024), torch.tensor(4.0, device="cuda")
    q = kernels.quantize(x, "micro", fold="row")
    calls: dict[str, Callable[[], object]] = {
        "torch.empty": partial(torch.empty, (256, 512), dtype=torch.uint8, device="cuda"),
        "quantize": partial(kernels.quantize, x, "micro", fold="row"),
        "fold_transpose": partial(kernels.fold_transpose, q),
        "quantize_weight": partial(kernels.quantize_weight, x, amax, 1e-3),
        "quantize_weight transpose": partial(kernels.quantize_weight, x, amax, 1e-3, transpose=True),
        "rmsnorm_quantize": partial(kernels.rmsnorm_quantize, x, x[0], granularity="micro", fold="row"),
        "swiglu_quantize": partial(kernels.swiglu_quantize, h, "micro", fold="row"),
        "swiglu_backward_quantize": partial(kernels.swiglu_backward_quantize, x, h, "micro", fold="row"),
    }
    for name, call in calls.items():
        record_wall(table, "host", name, [wall(call) for _ in range(rounds)])


def bench_weight_scales(table: Table, rounds: int) -> None:
    """What a predicted scale saves (MOSS, section 3.2): wall time of a scale, host and GPU together, of a weight at MOSS's largest size."""
    rows, cols = WEIGHTS[-1]
    ws = [torch.nn.Parameter(data(rows, cols, i)) for i in range(2)]
    clock = WeightScaling(interval=1 << 30, attached=True)
    scales = [clock.track(w) for w in ws]
    turn = itertools.cycle(range(2))
    ways: dict[str, Callable[[], object]] = {
        "scale measured, wall time": lambda: measure_amax(ws[next(turn)].detach()),
        "scale predicted, wall time": lambda: scales[i := next(turn)].amax_and_increment(ws[i]),
    }
    for scale, w in zip(scales, ws, strict=True):
        scale.amax_and_increment(w)  # anchored once, as at the start of a training
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(wall(way, wait=True))
    for name, times in taken.items():
        record_wall(table, f"{rows}x{cols}", name, times)


def wall(call: Callable[[], object], wait: bool = False) -> float:
    """Microseconds of wall time that one of 100 calls takes; wait: until the GPU is done with the last."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(100):
        call()
    if wait:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e4


def record_wall(table: Table, shape: str, name: str, times: list[float]) -> None:
    us = statistics.median(times)
    table.append({"shape": shape, "op": name, "us": round(us, 2), "GB/s": "", "of_copy": ""})
    print(f"{shape:>12}  {name:<44} {us:9.1f} us")


def plan_name(plan: TransposePlan) -> str:
    return f"{plan.rows} rows {plan.warps} warps {'columns' if plan.columns_first else 'rows'} first{' overlap' if plan.overlap else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("check", "sweep", "bench"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--csv", type=Path, help="directory for kernels_bench.csv and kernels_sweep.csv")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a CUDA GPU; the tests in tests/kernels check the same kernels on the CPU")
    everything = not (args.check or args.sweep or args.bench)
    start = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; TransformerEngine " +
          ("installed" if importlib.util.find_spec("transformer_engine") else "not installed"))  # fmt: skip
    if (args.check or everything) and not check():
        sys.exit(1)
    tables: dict[str, Table] = {}
    if args.sweep:
        sweep(tables.setdefault("kernels_sweep", []), args.rounds)
    if args.bench or everything:
        for bench in (bench_activations, bench_weights, bench_weight_scales, bench_fused, bench_loss, bench_host):
            bench(tables.setdefault("kernels_bench", []), args.rounds)
    for name, table in tables.items():
        if args.csv:
            write(table, args.csv / f"{name}.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
