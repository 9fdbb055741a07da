"""Settings of the kernels around SwiGLU on one GPU, each against the default: a dense layer of a 7B and the experts of DeepSeek-V2-Lite.

    python3 scripts/sweep_swiglu.py [--csv DIR]

Every setting's bytes are compared with the default's before it is timed (the gradient of prob is a sum whose order follows the warps: its largest relative
difference is printed instead). Times as in bench_kernels.py. Which of these are the default is for whoever reads the table to decide.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench_kernels import attribute, data
from benchmark import write
from kernel_timing import copy_calls, measure

from fp8_recipes import kernels
from fp8_recipes.tensor import ScaledTensor

DENSE = (8192, 11008)
EXPERTS = (102400, 1408)
"""Rows in use for 16384 tokens of top-6 over 64 experts, and the width of one."""
TOKENS, TOP_K, NUM_EXPERTS = 16384, 6, 64
Patches = tuple[tuple[str, str, object], ...]
"""(module of kernels, name, value) of a setting."""
Case = tuple[str, float, list[Callable[[], Any]], dict[str, Patches]]
"""(operation, bytes moved, the same call on rotating inputs, setting -> what it patches)."""


def gradient(warps: int, registers: int | None, block: int, tail: int) -> Patches:
    options: dict[str, Any] = {"BLOCK": block, "TAIL": tail, "num_warps": warps}
    if registers:
        options["maxnreg"] = registers
    return (("swiglu", "gradient_options", lambda cols, granularity: options),)


def dense_cases() -> Iterator[Case]:
    rows, cols = DENSE
    pairs = [(data(rows, cols, i), data(rows, 2 * cols, 10 + i)) for i in range(2)]
    calls: list[Callable[[], Any]] = [partial(kernels.swiglu_backward_quantize, dy, h, "micro", fold="row") for dy, h in pairs]
    settings = {f"{w} warps, {r or 'all'} registers": gradient(w, r, 64, 32) for w, r in ((8, 80), (8, None), (16, 64))}
    yield "gradient, dense", 8.0 * rows * cols, calls, settings


def expert_cases() -> Iterator[Case]:
    rows, cols = EXPERTS
    prob = torch.rand(rows, device="cuda")
    hs = [data(rows, 2 * cols, i) for i in range(2)]
    saved = [kernels.quantize(h, "row") for h in hs]
    dys = [data(rows, cols, 10 + i) for i in range(2)]
    calls: list[Callable[[], Any]] = [partial(kernels.swiglu_backward_quantize, dy, h, prob=prob) for dy, h in zip(dys, saved, strict=True)]
    settings = {f"{w} warps, {r or 'all'} registers": gradient(w, r, 8, 4) for w, r in ((1, 112), (2, None), (4, 64))}
    yield "gradient, experts", 6.0 * rows * cols, calls, settings
    calls = [partial(kernels.swiglu_quantize_saving, h, prob=prob) for h in hs]
    yield "SwiGLU saving h", 7.0 * rows * cols, calls, {f"{1536 // 32 // n} warps": (("swiglu", "SAVE_PER_THREAD", n),) for n in (12, 48)}
    calls = [partial(kernels.swiglu_quantize, h, prob=prob) for h in saved]
    yield "SwiGLU of the saved h", 3.0 * rows * cols, calls, {f"{1536 // 32 // n} warps": (("rows", "ELEMENTS_PER_THREAD", n),) for n in (12, 24)}


def routing_cases() -> Iterator[Case]:
    index = [torch.rand(TOKENS, NUM_EXPERTS, device="cuda").topk(TOP_K, dim=1).indices.int() for _ in range(2)]
    calls: list[Callable[[], Any]] = [partial(kernels.route_map, i, NUM_EXPERTS) for i in index]
    settings: dict[str, Patches] = {f"place {w} warps": (("permute", "PLACE_WARPS", w),) for w in (2, 8)}
    settings |= {f"scan {b} x {e}": (("permute", "SCAN_BLOCKS", b), ("permute", "SCAN_EXPERTS", e)) for b, e in ((512, 4), (1024, 2))}
    yield "route_map", 4.0 * TOKENS * TOP_K, calls, settings


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
    """'' if every byte is equal; how far prob's gradient is off where it is that alone. Exits if anything else differs."""
    note = ""
    summed = isinstance(expected, tuple) and isinstance(expected[0], ScaledTensor) and isinstance(expected[-1], torch.Tensor)
    pairs = list(zip(tensors(result), tensors(expected), strict=True))
    for i, (a, b) in enumerate(pairs):
        if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            continue
        if not (summed and i == len(pairs) - 1):
            sys.exit(f"sweep_swiglu.py: tensor {i} of the result differs from the default's")
        note = f"prob's gradient differs by {float((a - b).abs().max() / b.abs().max()):.1e}"
    return note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="directory for swiglu_sweep.csv")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sweep_swiglu.py needs a CUDA GPU")
    start, table = time.time(), []
    for make in (dense_cases, expert_cases, routing_cases):
        for op, nbytes, calls, settings in make():
            expected = calls[0]()
            notes = {name: difference(under(patches, calls[0]), expected) for name, patches in settings.items()}
            contenders = {"default": calls} | {name: [partial(under, patches, c) for c in calls] for name, patches in settings.items()}
            times = measure({"copy": copy_calls(nbytes), **contenders}, args.rounds)
            copy = times.pop("copy")
            for name, us in times.items():
                table.append({"op": op, "setting": name, "us": round(us, 2), "of_copy": round(copy / us, 3), "note": notes.get(name, "")})
                print(f"{op:<22} {name:<26} {us:8.1f} us {copy / us:5.0%} of copy  {notes.get(name, '')}", flush=True)
    if args.csv:
        write(table, args.csv / "swiglu_sweep.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
