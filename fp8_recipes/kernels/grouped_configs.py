"""Which tile the grouped products use: a static choice, as in `gemm_configs`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from .common import cdiv
from .gemm_configs import BLOCK_K, GemmConfig


@dataclass(frozen=True)
class GroupedConfig(GemmConfig):
    """`GemmConfig` with two more. resident: programs per multiprocessor; with two, one computes while the other writes its tile. block_k: elements of the
    contraction per stage, a divisor of 128."""

    resident: int = 1
    block_k: int = BLOCK_K

    def shared_bytes(self, out_bytes: int, adds: bool = False) -> int:
        return super().shared_bytes(out_bytes, adds) - self.stages * (BLOCK_K - self.block_k) * (self.block_m + self.block_n)


WIDE = GroupedConfig(128, 256, stages=3, subtiles=2, store="atomic")
SMALL = GroupedConfig(128, 128, stages=5, subtiles=2, store="atomic")
_RATE = {WIDE: 1.0, SMALL: 0.9}
"""Speed of each tile while the device is full, relative to the best; scripts/bench_grouped.py --sweep measures it."""


@functools.cache
def select_config(m: int, n: int, programs: int) -> GroupedConfig:
    """The tile with the smallest estimated time for ``m`` rows of results, ``n`` wide, of all experts together: waves * tile area / rate."""

    def time(config: GroupedConfig) -> float:
        waves = cdiv(cdiv(m, config.block_m) * cdiv(n, config.block_n), programs)
        return waves * config.block_m * config.block_n / _RATE[config]

    return min(_RATE, key=time)


def adding(config: GroupedConfig) -> GroupedConfig:
    """For wgrad into fp32 main_grads, which takes longer than the products do. Additions from registers, not by TMA, whose slices would wait for one another in
    shared memory; that leaves room for one more stage, if the slices are small. 4 to 14 % less time than TMA's in all six shapes of scripts/bench_grouped.py.
    Asking L2 for the tile ahead, which sounds helpful, made it 7 to 14 % slower.
    """
    return replace(config, stages=4, subtiles=4) if config is WIDE else config


def promoting(config: GroupedConfig) -> GroupedConfig:
    """For sums that are promoted in registers: what the second accumulator spills lives in the cache that shared memory leaves, so narrow slices."""
    return replace(config, subtiles=4) if config is WIDE else config
