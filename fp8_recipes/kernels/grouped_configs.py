"""Which tile the grouped products use: a static choice, as in `gemm_configs`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .common import cdiv
from .gemm_configs import GemmConfig


@dataclass(frozen=True)
class GroupedConfig(GemmConfig):
    """`GemmConfig` with two more. resident: programs per multiprocessor; with two, one computes while the other writes its tile. fetch: how wgrad asks L2 for
    the tile that it will add to, so that the additions do not wait for memory: "" not at all, "bulk" 512 bytes a request, "lines" 128.
    """

    resident: int = 1
    fetch: str = ""


# Additions from registers: 2 to 7 % less time than TMA's reduction in all six shapes of bench_grouped.py, whose slices wait for one another in shared memory.
WIDE = GroupedConfig(128, 256, stages=3, subtiles=4, store="atomic")
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
