"""A small decoder-only GPT in plain torch: rotary positions, no biases, head not tied to the embedding; norms, bounds and activation as its `Architecture`
says, by default Llama3's: RMSNorm before each branch, SwiGLU.

The linear layers inside the blocks are `torch.nn.Linear`, for `fp8_recipes.nn.convert` to replace; `is_high_precision` names what stays as it is.
Shapes: B sequences, S positions, D width, H heads of queries, G heads of keys and values, E = D / H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..architecture import LLAMA3, Architecture
from .fog import XIELU, LayerScale, PostNorm, RMSNorm, TanhBound, smooth_swiglu
from .linear import Linear as Fp8Linear
from .mlp import can_fuse, fp8_mlp


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model. ffn: inner width of a gated FFN, 0 means 8/3 of the width, rounded up to a multiple of 128; the architecture widens it where it has
    no gate. kv_heads: heads of keys and values, 0 means as many as of queries. init_std: standard deviation of initial weights.
    embedding_std: the embedding's, 0 means as the others."""

    vocab: int = 256
    layers: int = 2
    width: int = 128
    heads: int = 2
    ffn: int = 0
    seq: int = 128
    rope_base: float = 10_000.0
    kv_heads: int = 0
    init_std: float = 0.02
    embedding_std: float = 0.0
    arch: Architecture = LLAMA3

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * heads={2 * self.heads}: rotary positions turn pairs inside each head")
        if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: each head of keys and values serves equally many of queries")

    @property
    def inner(self) -> int:
        """Width between the FFN's products."""
        return self.arch.ffn_width(self.ffn or -(-8 * self.width // (3 * 128)) * 128)

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Weights of the matrices, embedding and head included."""
        attention = 2 * self.width**2 + 2 * self.width * self.groups * self.head
        return self.layers * (attention + (3 if self.arch.gated else 2) * self.width * self.inner) + 2 * self.vocab * self.width


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


def _qk_bound(config: GPTConfig) -> nn.Module:
    """What bounds queries or keys, [..., E] -> [..., E]."""
    arch = config.arch
    if arch.qk == "tanh":
        return TanhBound(arch.tanh_alpha)
    return nn.Identity() if arch.qk == "none" else RMSNorm(config.head, trained=arch.qk == "rmsnorm")


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head = config.heads, config.groups, config.head
        self.scale = config.arch.softmax_scale(config.head)
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.groups) * config.head, bias=False)
        self.q_norm, self.k_norm = _qk_bound(config), _qk_bound(config)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        batch, seq, width = x.shape
        qkv = self.qkv(x).view(batch, seq, self.heads + 2 * self.groups, self.head)
        q, k, v = qkv.split((self.heads, self.groups, self.groups), dim=2)  # [B, S, H, E] and twice [B, S, G, E]
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        q, k = rotate(q, table), rotate(k, table)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.groups != self.heads)
        return self.proj(y.transpose(1, 2).reshape(batch, seq, width))


class MLP(nn.Module):
    """``down(silu(gate) * up)``; gate and up are one product. `smooth`: see `smooth_swiglu`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.smooth = config.arch.activation == "smooth_swiglu"
        self.gate_up = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.smooth:
            y, s = smooth_swiglu(gate, up)
            return self.down(y) * s
        return self.down(F.silu(gate) * up)


class UngatedMLP(nn.Module):
    """``down(activation(up(x)))`` with GeLU or xIELU: in FP8, under a recipe that folds to rows, as one function (`fp8_mlp`)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.inner, bias=False)
        self.activation = XIELU() if config.arch.activation == "xielu" else nn.GELU()
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.up, Fp8Linear) and can_fuse(self.up, self.down):
            alpha = self.activation.alpha() if isinstance(self.activation, XIELU) else None
            return fp8_mlp(x, self.up.weight, self.down.weight, alpha, recipe=self.up.recipe, observer=self.up.observer)
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Two branches, each ``x + post(branch(pre(x)))``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = _pre_norm(config), Attention(config)
        self.mlp_norm, self.mlp = _pre_norm(config), (MLP if config.arch.gated else UngatedMLP)(config)
        self.attention_post, self.mlp_post = _post(config), _post(config)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = _added(x, self.attention(self.attention_norm(x), table), self.attention_post)
        return _added(x, self.mlp(self.mlp_norm(x)), self.mlp_post)


def _pre_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.width) if config.arch.pre_norm else nn.Identity()


def _added(x: torch.Tensor, branch: torch.Tensor, post: nn.Module) -> torch.Tensor:
    return post(branch, x) if isinstance(post, PostNorm) else x + post(branch)


def _post(config: GPTConfig) -> nn.Module:
    """What a branch's output passes on its way to the residual stream; a norm adds to it at once."""
    gain = config.arch.branch_gain(config.layers)
    if config.arch.post_norm:
        return PostNorm(config.width, gain)
    return LayerScale(config.width, gain) if config.arch.layer_scale else nn.Identity()


class GPT(nn.Module):
    """tokens [B, S] int64 -> logits [B, S, V]; with `targets` [B, S] the mean cross-entropy in nats (fp32 scalar)."""

    rope: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.multiplier = config.arch.embedding_multiplier(config.embedding_std or config.init_std)
        self.norm = RMSNorm(config.width) if config.arch.final_norm else nn.Identity()
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.register_buffer("rope", rotary_table(config.seq, config.head, config.rope_base), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, init_std) for every matrix; the two projections onto the residual stream are smaller by sqrt(2 * layers), unless a post-norm follows them:
        it would undo that, and small branches would drown in its eps. The embedding has embedding_std where that is given. Gains keep their values."""
        depth = 1.0 if self.config.arch.post_norm else (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=self.config.init_std / depth if residual else self.config.init_std)
        if self.config.embedding_std:
            nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if tokens.shape[1] > self.config.seq:
            raise ValueError(f"sequence of {tokens.shape[1]} tokens is longer than the model's seq={self.config.seq}")
        x = self.embedding(tokens)
        if self.multiplier != 1.0:
            x = x * self.multiplier
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
