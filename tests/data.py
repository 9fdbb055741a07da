"""Inputs shared by the kernel tests."""

from __future__ import annotations

import torch

GROUPS = {
    "ragged": (2, 0, 1, 1),
    "all to one": (0, 3, 0),
    "first and last empty": (0, 1, 2, 0),
    "one expert": (2,),
    "no tokens": (0, 0),
    "more experts than blocks": (0, 0, 1, 0, 0, 0, 0),
}
"""Blocks of 128 rows per expert."""


def nasty(rows: int, cols: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Heavy tails, an outlier column, tiny rows, zeros, subnormals and, in one row each, NaN and Inf."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=gen) * torch.exp(2 * torch.randn(rows, cols, generator=gen))
    x[:, cols // 3] *= 3000
    x *= torch.exp2(torch.randint(-12, 12, (rows, 1), generator=gen).float())
    x[rows // 2] = 0
    x[rows // 3, : cols // 2] *= 1e-38
    if dtype is torch.float16:
        x = x.clamp(-6e4, 6e4)
    x[0, 1 % cols], x[rows - 1, 2 % cols], x[rows - 1, cols - 1] = float("nan"), float("inf"), float("-inf")
    return x.to(dtype).to(device)


def all_codes() -> torch.Tensor:
    """The 256 FP8 codes, uint8 [256]."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8)


def group_layout(blocks: tuple[int, ...], device: torch.device | str) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(rows, offsets [experts + 1], block_expert [blocks]) of groups of ``blocks`` times 128 rows; one unused block at the end."""
    offsets = torch.tensor([0, *blocks]).cumsum(0).int() * 128
    owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks)).tolist() + [-1]
    return 128 * len(owner), offsets.to(device), torch.tensor(owner, dtype=torch.int32, device=device)
