"""Settings of the row kernels on one GPU, each against the default: RMSNorm and the loss of a dense model, the kernels around SwiGLU, the routing of experts.

    python3 scripts/sweep_rows.py [--only rmsnorm loss ...] [--csv DIR]

Every setting's bytes are compared with the default's before it is timed (the gradient of prob is a sum whose order follows the warps: its largest relative
difference is printed instead; RMSNorm is compared on integers, whose sums are exact in any order). Times as in bench_kernels.py. Which of these are the
default is for whoever reads the table to decide.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench_kernels import attribute, data
from benchmark import write
from kernel_timing import copy_calls, measure

from fp8_recipes import kernels
from fp8_recipes.formats import E5M2
from fp8_recipes.tensor import TILE, ScaledTensor

DENSE = (8192, 11008)
EXPERTS = (102400, 1408)
"""Rows in use for 16384 tokens of top-6 over 64 experts, and the width of one."""
TOKENS, TOP_K, NUM_EXPERTS = 16384, 6, 64
RMSNORM = {
    4096: ((1, 4, None), (2, 8, None), (4, 8, None), (4, 16, None), (4, 16, 40)),
    11008: ((2, 8, None), (4, 16, None), (4, 16, 64), (8, 32, None), (8, 32, 48)),
    14336: ((4, 16, None), (4, 16, 72), (8, 16, 48), (8, 32, None)),
}
"""Columns -> (warps, tiles per piece, registers per thread) that are tried: 16 values of a piece per thread, or 8; more warps or more registers."""
LOSS = ((1, 4, 2, None), (1, 4, 4, 64), (1, 4, 8, None), (2, 8, 2, None), (2, 8, 4, None), (4, 16, 2, None))
"""(warps, tiles per piece, pieces, registers per thread)."""
Patches = tuple[tuple[str, str, object], ...]
"""(module of kernels, name, value) of a setting."""


@dataclass(frozen=True)
class Case:
    op: str
    nbytes: float
    """Moved by one call."""
    calls: list[Callable[[], Any]]
    """The same call on rotating inputs."""
    settings: dict[str, Patches]
    compared: Callable[[], Any]
    """The call whose result must not depend on the setting."""


def named(warps: int, registers: int | None) -> str:
    return f"{warps} warps, {registers or 'all'} registers"


def limited(registers: int | None, **options: int) -> dict[str, int]:
    return options | ({"maxnreg": registers} if registers else {})


def equal_pieces(cols: int, block: int, warps: int, registers: int | None = None) -> dict[str, int]:
    return limited(registers, BLOCK=block, PIECES=-(-cols // (block * TILE)), WHOLE=cols % (block * TILE) == 0, num_warps=warps)


def rmsnorm_cases() -> Iterator[Case]:
    for rows, cols in ((8192, 4096), (8192, 11008), (8192, 14336), (32768, 4096)):
        gamma = torch.randn(cols, device="cuda").div(4).add(1).bfloat16()
        calls = [partial(kernels.rmsnorm_quantize, data(rows, cols, i), gamma, 1e-5, "micro", fold="row") for i in range(3)]
        settings: dict[str, Patches] = {}
        for warps, block, registers in RMSNORM[cols]:
            options = equal_pieces(cols, block, warps, registers)
            name = f"{options['PIECES']} of {block} tiles, {named(warps, registers)}"
            settings[name] = (("rmsnorm", "row_options", lambda cols, granularity, o=options: o),)
        whole = torch.randint(-8, 9, (rows, cols), device="cuda").bfloat16() * torch.exp2(torch.randint(-9, 9, (rows, 1), device="cuda")).bfloat16()
        compared = partial(kernels.rmsnorm_quantize, whole, gamma, 1e-5, "micro", fold="row")
        yield Case(f"rmsnorm {rows}x{cols}", 3.0 * rows * cols, calls, settings, compared)


def loss_cases() -> Iterator[Case]:
    rows, cols = 8192, 32000
    labels, dloss = torch.randint(0, cols, (rows,), device="cuda"), torch.full((rows,), 2.0**-13, device="cuda")
    calls: list[Callable[[], Any]] = []
    for i in range(2):
        logits = data(rows, cols, i).mul_(3)
        m, s, target = kernels.softmax_parts(logits, labels)
        calls.append(partial(kernels.cross_entropy_backward_quantize, logits, labels, m + s.log(), target, dloss, "row", E5M2))
    settings: dict[str, Patches] = {}
    for warps, tiles, pieces, registers in LOSS:
        options = limited(registers, TILES=tiles, PIECES=pieces, num_warps=warps)
        settings[f"{pieces} of {tiles} tiles, {named(warps, registers)}"] = (("cross_entropy", "GRADIENT_OPTIONS", options),)
    yield Case(f"loss gradient {rows}x{cols}", 3.0 * rows * cols, calls, settings, calls[0])


def gradient(warps: int, registers: int | None, block: int, tail: int) -> Patches:
    options = limited(registers, BLOCK=block, TAIL=tail, num_warps=warps)
    return (("swiglu", "gradient_options", lambda cols, granularity: options),)


def dense_cases() -> Iterator[Case]:
    rows, cols = DENSE
    pairs = [(data(rows, cols, i), data(rows, 2 * cols, 10 + i)) for i in range(2)]
    calls: list[Callable[[], Any]] = [partial(kernels.swiglu_backward_quantize, dy, h, "micro", fold="row") for dy, h in pairs]
    settings = {named(w, r): gradient(w, r, 64, 32) for w, r in ((4, None), (8, None), (16, 64))}
    yield Case("gradient, dense", 8.0 * rows * cols, calls, settings, calls[0])


def expert_cases() -> Iterator[Case]:
    rows, cols = EXPERTS
    prob = torch.rand(rows, device="cuda")
    hs = [data(rows, 2 * cols, i) for i in range(2)]
    saved = [kernels.quantize(h, "row") for h in hs]
    dys = [data(rows, cols, 10 + i) for i in range(2)]
    calls: list[Callable[[], Any]] = [partial(kernels.swiglu_backward_quantize, dy, h, prob=prob) for dy, h in zip(dys, saved, strict=True)]
    settings = {named(w, r): gradient(w, r, 8, 4) for w, r in ((1, 112), (2, None), (4, 64))}
    yield Case("gradient, experts", 6.0 * rows * cols, calls, settings, calls[0])
    calls = [partial(kernels.swiglu_quantize_saving, h, prob=prob) for h in hs]
    settings = {f"{1536 // 32 // n} warps": (("swiglu", "SAVE_PER_THREAD", n),) for n in (12, 48)}
    yield Case("SwiGLU saving h", 7.0 * rows * cols, calls, settings, calls[0])
    calls = [partial(kernels.swiglu_quantize, h, prob=prob) for h in saved]
    settings = {f"{1536 // 32 // n} warps": (("rows", "ELEMENTS_PER_THREAD", n),) for n in (12, 24)}
    yield Case("SwiGLU of the saved h", 3.0 * rows * cols, calls, settings, calls[0])


def routing_cases() -> Iterator[Case]:
    index = [torch.rand(TOKENS, NUM_EXPERTS, device="cuda").topk(TOP_K, dim=1).indices.int() for _ in range(2)]
    calls: list[Callable[[], Any]] = [partial(kernels.route_map, i, NUM_EXPERTS) for i in index]
    settings: dict[str, Patches] = {f"place {w} warps": (("permute", "PLACE_WARPS", w),) for w in (2, 8)}
    settings |= {f"scan {b} x {e}": (("permute", "SCAN_BLOCKS", b), ("permute", "SCAN_EXPERTS", e)) for b, e in ((128, 16), (512, 4))}
    yield Case("route_map", 4.0 * TOKENS * TOP_K, calls, settings, calls[0])


CASES = {"rmsnorm": rmsnorm_cases, "loss": loss_cases, "swiglu": dense_cases, "experts": expert_cases, "routing": routing_cases}


def under(patches: Patches, call: Callable[[], Any]) -> Any:
    with ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(attribute(import_module(f"fp8_recipes.kernels.{module}"), name, value))
        return call()


def tensors(result: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an operation's result."""
    parts = result if isinstance(result, tuple) else (result,)
    for part in parts:
        fields = [part] if isinstance(part, torch.Tensor) else [getattr(part, name) for name in part.__dataclass_fields__]
        yield from (t for t in fields if isinstance(t, torch.Tensor))


def difference(result: Any, expected: Any) -> str:
    """'' if every byte is equal; how far the sum beside the quantised tensor is off where it is that alone. Exits if anything else differs."""
    note = ""
    summed = isinstance(expected, tuple) and isinstance(expected[0], ScaledTensor) and isinstance(expected[-1], torch.Tensor)
    pairs = list(zip(tensors(result), tensors(expected), strict=True))
    for i, (a, b) in enumerate(pairs):
        if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            continue
        if not (summed and i == len(pairs) - 1):
            sys.exit(f"sweep_rows.py: tensor {i} of the result differs from the default's")
        note = f"the sum differs by {float((a - b).abs().max() / b.abs().max()):.1e}"
    return note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="directory for rows_sweep.csv")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="kernels to sweep")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sweep_rows.py needs a CUDA GPU")
    start, table = time.time(), []
    for case in (case for name in args.only for case in CASES[name]()):
        expected = case.compared()
        notes = {name: difference(under(patches, case.compared), expected) for name, patches in case.settings.items()}
        contenders = {"default": case.calls} | {name: [partial(under, patches, c) for c in case.calls] for name, patches in case.settings.items()}
        times = measure({"copy": copy_calls(case.nbytes), **contenders}, args.rounds)
        copy = times.pop("copy")
        for name, us in times.items():
            table.append({"op": case.op, "setting": name, "us": round(us, 2), "of_copy": round(copy / us, 3), "note": notes.get(name, "")})
            print(f"{case.op:<24} {name:<40} {us:8.1f} us {copy / us:5.0%} of copy  {notes.get(name, '')}", flush=True)
    if args.csv:
        write(table, args.csv / "rows_sweep.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
