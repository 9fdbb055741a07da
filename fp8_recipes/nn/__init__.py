"""Layers in FP8 without TransformerEngine or Megatron."""

from .linear import Linear, convert, fp8_linear
from .moe import MoE, Router, load_balancing_loss, moe_experts

__all__ = ["Linear", "MoE", "Router", "convert", "fp8_linear", "load_balancing_loss", "moe_experts"]
