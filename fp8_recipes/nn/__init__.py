"""Layers in FP8 without TransformerEngine or Megatron."""

from .linear import Linear, convert, fp8_linear
from .mlp import fp8_mlp
from .moe import MoE, Router, load_balancing_loss, moe_experts

__all__ = ["Linear", "MoE", "Router", "convert", "fp8_linear", "fp8_mlp", "load_balancing_loss", "moe_experts"]
