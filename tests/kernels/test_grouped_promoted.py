"""The specialised kernel of `grouped_promoted`, compiled for Hopper without a GPU. (What it computes is tested in test_grouped_gemm.py.)"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fp8_recipes.kernels.grouped_promoted import PROMOTED as c, _promoted_wgrad_kernel as kernel
types = dict(a_desc=f"tensordesc<fp8e4nv[{c.block_m},128]>", b_desc=f"tensordesc<fp8e4nv[{c.block_n},128]>", scale_a_ptr="*fp32", scale_b_ptr="*fp32",
             offsets_ptr="*i32", table_ptr="*i64")
names = kernel.arg_names
for out, stages, order in (("*bf16", c.stages, 1), ("*bf16", c.stages, 0), ("*fp32", 4, -1)):
    constants = dict(PROGRAMS=132, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=128, GROUP=c.group, PROMOTE=1024, ACCUMULATE=out == "*bf16", ORDER=order,
                     ALIGNED=True, SPECIALISE=True) | ({"table_ptr": None} if order else {})
    signature = {n: "constexpr" if n in constants else types.get(n, out if n == "out_ptr" else "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and (n.endswith("_ptr") or n in ("N", "K"))}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=c.warps, num_stages=stages))
    ptx = compiled.asm["ptx"]
    print("KERNEL", compiled.metadata.num_warps, compiled.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("setmaxnreg.inc"), ptx.count(".local"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_warps_are_specialised_and_nothing_spills() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [[int(word) for word in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("KERNEL")]
    assert len(found) == 3
    for warps, shared, products, grown, local in found:
        assert warps == 12, "one group of four warps loads, two multiply"
        assert shared <= 227 * 1024
        assert products == 8, "four per K block for each of the two groups"
        assert grown >= 2, "the groups that multiply take over registers of the one that loads"
        assert local == 0
