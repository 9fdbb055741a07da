"""What the compiler makes of a kernel for Hopper, which needs no GPU. Triton's interpreter, chosen when triton is imported, rules it out in the process of the
tests: `listings` runs a script in another one, and the script calls `show` for each kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

MARK = "KERNEL "
has_compiler = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")


def show(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    other: str = "i32",
    multiples: Iterable[str] | None = None,
    **facts: Any,
) -> None:
    """Compile for sm_90 and print ``facts``, registers, shared memory and the listing. types: of the run-time arguments; ``other`` where they say nothing.
    options: num_warps and others of Triton. multiples: arguments that are multiples of 16, all but floats unless given."""
    import triton
    from triton.backends.compiler import GPUTarget

    if type(kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, other) for n in names}
    multiples = [n for n in names if signature[n] != "fp32"] if multiples is None else multiples
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples if n not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, listing = (
            subprocess.run([str(tools / tool), flag, str(path)], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    print(MARK + json.dumps({**facts, "registers": int(found.group(1)), "shared": compiled.metadata.shared}))
    print(listing)


def listings(script: str) -> list[tuple[dict[str, Any], list[str]]]:
    """(what `show` was told and found, lines of the listing) of every kernel that the script shows."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), str(Path(__file__).parents[1]), env.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as cache:  # what was compiled before, without this tree's passes perhaps, is no evidence
        env["TRITON_CACHE_DIR"] = cache
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    parts = (part.splitlines() for part in done.stdout.split(MARK)[1:])
    return [(json.loads(head), lines) for head, *lines in parts]


def wide_loads(lines: list[str]) -> list[int]:
    """Where 16 bytes at a time are asked for from memory."""
    return [i for i, line in enumerate(lines) if "LDG.E" in line and ".128" in line]


def wide_stores(lines: list[str]) -> int:
    return sum("STG.E.128" in line for line in lines)


def spills(lines: list[str]) -> list[str]:
    return [line for line in lines if "LDL" in line or "STL" in line]
