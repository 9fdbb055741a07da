"""fp8_recipes in Megatron-LM: flags, launcher, optimizer hook, shims. No arithmetic. Guide: docs/megatron.md."""

from __future__ import annotations


def install() -> None:
    """Install the Megatron and TransformerEngine shims (idempotent). Call it before Megatron parses its arguments."""
    from .shims import install as install_shims

    install_shims()
