"""Which tile the persistent FP8 GEMM uses: a static choice, so that a long job starts at once and every run of it takes the same one.

The choice weighs two things that are known before launch: how fast a tile runs while the device is full (`_RATE`, measured by ``scripts/bench_gemm.py --sweep``
on one H200), and how much of the device its last wave leaves idle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

BLOCK_K = 128
"""Elements of K per pipeline stage: 128 bytes, the widest shared-memory swizzle. Promotion distances are multiples of it."""


@dataclass(frozen=True)
class GemmConfig:
    """One compiled shape of the kernel.

    block_m, block_n: output tile of one program. group: tiles of M that share their columns of B in L2 before the order moves along N. stages: K blocks in
    flight. warps: 8 = two warpgroups. subtiles: column slices in which the epilogue passes the tile through shared memory (bounds its staging buffer).
    store: how an epilogue accumulates into fp32: "reduce" (TMA sends the slice, L2 adds), "atomic" (threads send it, L2 adds) or "add" (load, add, store).
    """

    block_m: int
    block_n: int
    stages: int
    subtiles: int
    group: int = 8
    warps: int = 8
    store: str = "reduce"

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """What a launch of the Triton kernels takes from it."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": BLOCK_K, "GROUP": self.group, "SUBTILES": self.subtiles,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip

    def shared_bytes(self, out_bytes: int, adds: bool = False) -> int:
        """Shared memory of the pipeline and the epilogue's buffer (two where it loads ``out`` to add to it), of the 227 KiB that a Hopper program can have."""
        staging = self.block_m * self.block_n // self.subtiles * out_bytes
        return self.stages * BLOCK_K * (self.block_m + self.block_n) + staging * (2 if adds else 1)


WIDE = GemmConfig(128, 256, stages=3, subtiles=4)
TALL = GemmConfig(256, 128, stages=3, subtiles=2)
SMALL = GemmConfig(128, 128, stages=5, subtiles=2)

_RATE = {WIDE: 1.0, TALL: 0.8, SMALL: 0.98}
"""Speed of each tile while the device is full, relative to the best: sweep of 2026-11-22, wgrad shapes, promotion every 1024."""


def waves(m: int, n: int, config: GemmConfig, programs: int) -> int:
    """Rounds in which `programs` persistent programs cover an [m, n] output."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    return -(-tiles // programs)


def select_config(m: int, n: int, programs: int) -> GemmConfig:
    """The tile with the smallest estimated time for an [m, n] output on `programs` multiprocessors: waves * tile area / rate."""

    def time(config: GemmConfig) -> float:
        return waves(m, n, config, programs) * config.block_m * config.block_n / _RATE[config]

    return min(_RATE, key=time)
