"""A `Recipe` as TransformerEngine sees it: a CustomRecipe whose factory hands one quantizer to every role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformer_engine.common.recipe import CustomRecipe
from transformer_engine.common.recipe import Format as TEFormat
from transformer_engine.pytorch import IdentityQuantizer, QuantizerRole

from ..recipe import Recipe, RecipeError, from_name
from .quantizers import FP8Quantizer
from .shims import install

LINEAR_TENSORS = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class Factory:
    """``qfactory`` of a CustomRecipe. Two factories of one recipe are equal, so TransformerEngine keeps its quantizers from call to call."""

    recipe: Recipe

    def __call__(self, role: QuantizerRole | None) -> Any:
        if role is None or role.tensor_type not in LINEAR_TENSORS:
            return IdentityQuantizer()  # module outputs and input gradients stay bf16
        if role.module_type == "grouped_linear":
            raise RecipeError(
                f"recipe {self.recipe.name!r} is for dense layers: TransformerEngine's GroupedLinear has no path for a custom product. "
                "Leave the experts outside this autocast, or choose a recipe for MoE."
            )
        return FP8Quantizer(self.recipe, role.tensor_type)


@dataclass(repr=False)
class FP8Recipe(CustomRecipe):
    """CustomRecipe that TransformerEngine treats as stateless: nothing of it is pickled into checkpoints, so they load under any recipe (shims)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward_override is not None:
            raise RecipeError(
                f"backward_override={self.backward_override!r} (NVTE_BACKWARD_OVERRIDE) asks for a backward pass outside FP8; unset it, or use the bf16 recipe"
            )


def build(spec: str | Recipe) -> FP8Recipe:
    """One FP8Recipe object per recipe value."""
    return _build(from_name(spec) if isinstance(spec, str) else spec)


@cache
def _build(value: Recipe) -> FP8Recipe:
    if not value.quantize:
        raise RecipeError(f"recipe {value.name!r} quantises nothing: run without te.autocast instead")
    install()
    grads_e5m2 = value.grad == "e5m2"
    return FP8Recipe(
        qfactory=Factory(value),
        fp8_format=TEFormat.HYBRID if grads_e5m2 else TEFormat.E4M3,
        quantization_alignment=16,
        backward_override=None,
    )


def weights_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of the 2-D weights of every Linear, LayerNormLinear and LayerNormMLP in ``model``."""
    from transformer_engine.pytorch import LayerNormLinear, LayerNormMLP, Linear

    found: list[tuple[str, torch.nn.Parameter]] = []
    for prefix, module in model.named_modules():
        if isinstance(module, (Linear, LayerNormLinear, LayerNormMLP)):
            found += [(f"{prefix}.{name}" if prefix else name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
    return found


def fused_swiglu(recipe: Any, unfused: tuple[Callable[..., Any], ...]) -> tuple[Callable[..., Any], ...] | None:
    """(forward, backward, fused backward) for TransformerEngine's table of activations under a folded recipe of ours, None for any other. See `shims`.

    unfused: upstream's entry, whose backward serves layers with a bias, because the fused kernel does not sum columns.
    """
    if not isinstance(recipe, FP8Recipe) or not recipe.qfactory.recipe.folded:
        return None
    value = recipe.qfactory.recipe

    def forward(h: torch.Tensor, quantizer: Any = None) -> Any:
        return FP8Quantizer(value, "input").swiglu(h)

    def fused_backward(dy: torch.Tensor, h: torch.Tensor, quantizer: FP8Quantizer) -> tuple[torch.Tensor | None, Any]:
        if not quantizer.needs_bias_gradient:
            return None, quantizer.swiglu_backward(dy, h)
        dh = unfused[1](dy, h, None)
        return dh.view(-1, dh.shape[-1]).sum(dim=0), quantizer(dh)

    return forward, unfused[1], fused_backward
