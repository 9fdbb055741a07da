"""FP8 training recipes for Megatron-LM and TransformerEngine: quantise once, fold anywhere. Start with docs/design.md."""

from .recipe import RECIPES, Recipe, RecipeError, from_name, from_yaml
from .tensor import ScaledTensor

__version__ = "0.1.0"

__all__ = ["RECIPES", "Recipe", "RecipeError", "ScaledTensor", "from_name", "from_yaml", "__version__"]
