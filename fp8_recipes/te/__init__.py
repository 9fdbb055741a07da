"""Recipes in any TransformerEngine model:

    import fp8_recipes.te
    with te.autocast(recipe=fp8_recipes.te.recipe("moss")):
        y = layer(x)

Weights are measured at every use until automatic scaling is told of the model and its optimizer: ``fp8_recipes.te.automatic_scaling(model, optimizer)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe
    from ..weight_scaling import WeightScaling

__all__ = ["automatic_scaling", "install", "recipe"]


def install() -> None:
    """Install the TransformerEngine shims (idempotent). `recipe` does it for you."""
    from .shims import install as install_shims

    install_shims()


def recipe(spec: str | Recipe) -> Any:
    """A TransformerEngine recipe for ``te.autocast(recipe=...)``: ``"moss"``, ``"moss:interval=200"`` or a `Recipe`. The same spec gives the same object.

    `Recipe.head` has no say here: it is about Megatron's output layer. Raises RecipeError for "bf16" (leave autocast off instead), ImportError or RuntimeError
    when TransformerEngine is missing, broken or of an untested version.
    """
    from .shims import require_import

    require_import()
    from .factory import build

    return build(spec)


def automatic_scaling(model: torch.nn.Module, optimizer: torch.optim.Optimizer, interval: int = 500) -> WeightScaling:
    """Put every TransformerEngine linear weight of ``model`` under automatic weight scaling driven by ``optimizer``'s learning rates.

    Call once, after both exist, and after ``set_tensor_parallel_group``: tensor-parallel shards of a weight share one scale, which their ranks agree on. After
    loading or saving a checkpoint call ``.reanchor()`` on the result, so that a resumed run has the same bits.
    """
    from ..weight_scaling import WeightScaling
    from .factory import weights_of

    scaling = WeightScaling(interval=interval)
    for _, weight, group in weights_of(model):
        scaling.track(weight, group)
    scaling.attach(optimizer)
    return scaling
