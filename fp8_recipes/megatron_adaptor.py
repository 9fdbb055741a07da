"""For people with their own ``pretrain_gpt.py``: ``import fp8_recipes.megatron_adaptor`` as its first line, nothing else, and ``--fp8-recipe moss`` works.

Importing this module installs the shims of `fp8_recipes.megatron.shims` (that is its whole purpose); stock values of every flag keep their meaning.
"""

from __future__ import annotations

from .megatron.shims import install

install()
