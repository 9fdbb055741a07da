"""Work-around for Triton on Hopper: the first product of a tile overwrites the accumulator instead of adding to zeros.

The persistent products keep one accumulator across tiles and set it to zero after each epilogue. The matrix unit can do without: an operand of its instruction
says whether to add. Triton has a pass that finds such zeros and sets that operand (OptimizeAccumulatorInit), but up to 3.6 runs it for Blackwell only. Without
it a tile of 128 x 256 takes 250 instructions more per thread, half of an epilogue in which no product runs.

`compiling` adds the pass behind Triton's own for Hopper, through Triton's hook for compiler stages, while one of these kernels is compiled and only then. Ends
when Triton runs the pass on Hopper itself. A Triton without the hook or the pass compiles the kernels as they are: the same results, a little later.
Triton 3.6 does not see the pass in its cache's key, so a kernel that something else has compiled without it (never `launch`) is taken from there as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton._C.libtriton import ir, passes

_lock = threading.Lock()
_KNOWN = hasattr(knobs.runtime, "add_stages_inspection_hook") and hasattr(passes.ttgpuir, "add_optimize_accumulator_init")
KERNELS = ("_gemm_kernel", "_grouped_gemm_kernel", "_grouped_wgrad_kernel")
HOPPER = 90
_KEY = "fp8_recipes.first_product"


def _optimized(stage: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``stage``, which makes Triton's GPU dialect, followed by the pass."""

    def run(source: Any, metadata: Any) -> Any:
        module = stage(source, metadata)
        manager = ir.pass_manager(module.context)
        passes.ttgpuir.add_optimize_accumulator_init(manager)
        passes.common.add_canonicalizer(manager)
        manager.run(module, "first_product")
        return module

    return run


def _add_pass(*asked: Any) -> tuple[str, str] | None:
    """The hook. asked: backend, stages, options, language, capability; a Triton newer than 3.6 also asks with nothing, for a part of its cache's key."""
    if not asked:
        return _KEY, _KEY
    _, stages, _, _, capability = asked
    if capability == HOPPER and "ttgir" in stages:
        stages["ttgir"] = _optimized(stages["ttgir"])
    return None


@contextmanager
def compiling(kernel: Any, constants: dict[str, Any]) -> Iterator[None]:
    """While this lasts, Triton compiles ``kernel`` with the pass if it is one of `KERNELS`. A hook that somebody else has set stays, and the pass is left out.

    Not for an epilogue that adds to its result (ACCUMULATE): with it wgrad into main_grad took 2 % longer on average, and 7 % for many small experts.

    (Whatever another thread compiles for Hopper at the same moment gets the pass too. It changes no result.)
    """
    if not _KNOWN or kernel.__name__ not in KERNELS or constants.get("ACCUMULATE"):
        yield
        return
    with _lock:
        theirs = knobs.runtime.add_stages_inspection_hook
        knobs.runtime.add_stages_inspection_hook = theirs or _add_pass
        try:
            yield
        finally:
            knobs.runtime.add_stages_inspection_hook = theirs
