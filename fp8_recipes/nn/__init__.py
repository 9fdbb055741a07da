"""Layers in FP8 without TransformerEngine or Megatron."""

from .linear import Linear, convert, fp8_linear

__all__ = ["Linear", "convert", "fp8_linear"]
