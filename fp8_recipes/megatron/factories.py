"""Dotted paths for Megatron's per-module precision file and for ``--fp8-quantizer-factory``: ``fp8_recipes.megatron.factories.NAME``.

    configs:
      fp8: {transformer_engine_config_type: TEQuantizationParams,
            training_recipe: {fp8_quantization_recipe: custom, custom_recipe_factory: fp8_recipes.megatron.factories.moss}}

Every recipe name of `fp8_recipes.RECIPES` is an attribute. Overrides do not fit into a dotted path; give them with --fp8-recipe.
"""

from __future__ import annotations

from typing import Any

from ..recipe import RECIPES


def recipe_name(path: str) -> str | None:
    """The recipe that a dotted path of this module names, or None for a path elsewhere."""
    module, _, name = path.rpartition(".")
    return name if module == __name__ and name in RECIPES and RECIPES[name].quantize and not RECIPES[name].stock else None


def __getattr__(name: str) -> Any:
    if name not in RECIPES:
        raise AttributeError(f"{__name__} has no recipe {name!r}; known: {', '.join(RECIPES)}")
    from .. import te

    return te.recipe(name).qfactory
