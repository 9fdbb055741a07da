"""A small decoder-only GPT in plain torch: RMSNorm before each block, rotary positions, SwiGLU, no biases, head not tied to the embedding.

The linear layers inside the blocks are `torch.nn.Linear`, for `fp8_recipes.nn.convert` to replace; `is_high_precision` names what stays as it is.
Shapes: B sequences, S positions, D width, H heads, E = D / H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model. ffn: inner width of SwiGLU; 0 means 8/3 of the width, rounded up to a multiple of 128."""

    vocab: int = 256
    layers: int = 2
    width: int = 128
    heads: int = 2
    ffn: int = 0
    seq: int = 128
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * heads={2 * self.heads}: rotary positions turn pairs inside each head")

    @property
    def inner(self) -> int:
        return self.ffn or -(-8 * self.width // (3 * 128)) * 128


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * gamma``, computed in fp32, returned in x's dtype."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xf = x.float()
        return (xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


def rotary_table(seq: int, head: int, base: float) -> torch.Tensor:
    """[2, S, E/2] fp32: cosines and sines of position * base**(-2 i / E)."""
    frequency = base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.arange(seq, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary positions: turn the pairs (x[i], x[i + E/2]) of x [B, H, S, E] by the angles of their position."""
    cos, sin = table[:, : x.shape[2]].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        batch, seq, width = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, E]
        y = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, seq, width))


class MLP(nn.Module):
    """``down(silu(gate) * up)``; gate and up are one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width), MLP(config)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """tokens [B, S] int64 -> logits [B, S, V]; with `targets` [B, S] the mean cross-entropy in nats (fp32 scalar)."""

    rope: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.register_buffer("rope", rotary_table(config.seq, config.width // config.heads, config.rope_base), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) everywhere; the two projections onto the residual stream are smaller by sqrt(2 * layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if tokens.shape[1] > self.config.seq:
            raise ValueError(f"sequence of {tokens.shape[1]} tokens is longer than the model's seq={self.config.seq}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rope)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def is_high_precision(name: str, module: nn.Module) -> bool:
    """The ``skip`` of `convert` for this model: the head stays in high precision, as the embedding does."""
    del module
    return name == "head"
