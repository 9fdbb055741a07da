"""Inputs shared by the kernel tests."""

from __future__ import annotations

import torch


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
