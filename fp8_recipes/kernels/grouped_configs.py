"""Which tile the grouped products use: a static choice, as in `gemm_configs`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from .common import cdiv
from .gemm_configs import BLOCK_K, GemmConfig


@dataclass(frozen=True)
class GroupedConfig(GemmConfig):
    """`GemmConfig` with one more. resident: programs per multiprocessor; with two, one computes while the other writes its tile."""

    resident: int = 1


WIDE = GroupedConfig(128, 256, stages=3, subtiles=1, store="atomic")
SMALL = GroupedConfig(128, 128, stages=5, subtiles=2, store="atomic")
SHARED = 226 << 10
"""Bytes of shared memory that a program can have on Hopper, less 1 KiB for barriers."""
_RATE = {WIDE: 1.0, SMALL: 0.9}
"""Speed of each tile while the device is full, relative to the best; scripts/bench_grouped.py --sweep measures it."""


@functools.cache
def select_config(m: int, n: int, programs: int) -> GroupedConfig:
    """The tile with the smallest estimated time for ``m`` rows of results, ``n`` wide, of all experts together: waves * tile area / rate."""

    def time(config: GroupedConfig) -> float:
        waves = cdiv(cdiv(m, config.block_m) * cdiv(n, config.block_n), programs)
        return waves * config.block_m * config.block_n / _RATE[config]

    return min(_RATE, key=time)


def storing(config: GroupedConfig, out_bytes: int, adds: bool) -> GroupedConfig:
    """For results of ``out_bytes`` per element that TMA writes, or loads and writes (``adds``): as few slices as shared memory has room for.

    One took 1 to 2 % less time than two.
    """
    while config.shared_bytes(out_bytes, adds) > SHARED:
        config = replace(config, subtiles=2 * config.subtiles)
    return config


def adding(config: GroupedConfig) -> GroupedConfig:
    """For wgrad into fp32 main_grads (but for promoted long groups: `grouped_promoted`), which takes longer than the products do. Additions from registers, not
    by TMA, whose slices would wait for one another in shared memory; that leaves room for one more stage, if the slices are small. 4 to 14 % less time than
    TMA's in all six shapes of scripts/bench_grouped.py. Slower still: asking L2 for the tile ahead (7 to 14 %), and a tile that leaves by TMA as a whole while
    the next one is computed (23 %, the pipeline then has two stages, or 11 % with four of half the depth).
    """
    return replace(config, stages=4, subtiles=4) if config is WIDE else config


def promoting(config: GroupedConfig) -> GroupedConfig:
    """For sums that are promoted in registers: what the second accumulator spills lives in the cache that shared memory leaves, so narrow slices."""
    return replace(config, subtiles=4) if config is WIDE else config


def in_gluon(config: GroupedConfig, promote: int, device: torch.device) -> bool:
    """Does `grouped_promoted` compute what TMA writes? Promoted sums with the wide tile as it is, but for the group and fewer stages."""
    wide = 2 <= config.stages <= WIDE.stages and replace(config, stages=WIDE.stages, group=WIDE.group) == WIDE
    return wide and promote > BLOCK_K and has_gluon(device)


def better_swapped(n: int, k: int) -> bool:
    """Do fewer wide tiles cover the transpose of an [n, k] result? Of 2048 x 1408, V2-Lite's second weight, 88 instead of 96. No box of TMA may cross n."""
    return n % WIDE.block_n == 0 and cdiv(k, WIDE.block_m) * cdiv(n, WIDE.block_n) < cdiv(n, WIDE.block_m) * cdiv(k, WIDE.block_n)


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """Can `grouped_promoted`, written in Triton's experimental Gluon, run on ``device``? On Hopper, with the version of Triton that it was written for."""
    return device.type == "cuda" and triton.__version__.startswith("3.6.") and torch.cuda.get_device_capability(device)[0] == 9
