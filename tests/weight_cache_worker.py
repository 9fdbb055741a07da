"""`pretend_gpu`, and how often this process cast a weight: the last line it prints is a JSON object with the number of calls.

rows: row-major casts from the parameter, transposed: transposed ones, turned: transposes of a payload under one scale.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import pretend_gpu


def count(calls: Counter[str]) -> None:
    """Count what `products.Weight` asks of `ops`."""
    from fp8_recipes import ops

    cast, turn = ops.quantize_weight, ops.fold_transpose

    def quantize_weight(w: Any, *rest: Any, transpose: bool = False, **kwargs: Any) -> Any:
        calls["transposed" if transpose else "rows"] += 1
        return cast(w, *rest, transpose=transpose, **kwargs)

    def fold_transpose(q: Any, *rest: Any) -> Any:
        calls["turned"] += q.granularity == "tensor"
        return turn(q, *rest)

    ops.quantize_weight, ops.fold_transpose = quantize_weight, fold_transpose


if __name__ == "__main__":
    sys.path.insert(0, str(pretend_gpu.ROOT))
    calls: Counter[str] = Counter(rows=0, transposed=0, turned=0)
    count(calls)
    pretend_gpu.main(*sys.argv[1:])
    print(json.dumps(calls))
