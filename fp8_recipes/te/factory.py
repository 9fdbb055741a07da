"""A `Recipe` as TransformerEngine sees it: a CustomRecipe whose factory hands one quantizer to every role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformer_engine.common.recipe import CustomRecipe, DelayedScaling
from transformer_engine.common.recipe import Format as TEFormat
from transformer_engine.pytorch import IdentityQuantizer, QuantizerRole
from transformer_engine.pytorch.quantization import DelayedScalingRequest

from .. import ops
from ..recipe import Recipe, RecipeError, from_name
from .attention import cudnn_version, wrong
from .quantizers import FP8Quantizer
from .shims import install

LINEAR_TENSORS = ("input", "weight", "grad_output")
HISTORY = 1024
"""Steps whose maxima the delayed scales of FP8 attention look at, as in FOG (arXiv 2505.20524)."""


@dataclass(frozen=True)
class Factory:
    """``qfactory`` of a CustomRecipe. Two factories of one recipe are equal, so TransformerEngine keeps its quantizers from call to call."""

    recipe: Recipe

    def __call__(self, role: QuantizerRole | None) -> Any:
        if self.recipe.attention == "fp8" and role is not None and _of_attention(role):
            return DelayedScalingRequest(fp8_format=TEFormat.HYBRID, amax_history_len=HISTORY, amax_compute_algo="max", reduce_amax=True)
        if role is None or role.tensor_type not in LINEAR_TENSORS:
            return IdentityQuantizer()  # module outputs and input gradients stay bf16
        if role.module_type == "grouped_linear":
            raise RecipeError(
                f"recipe {self.recipe.name!r} is for dense layers: TransformerEngine's GroupedLinear has no path for a custom product. "
                "Leave the experts outside this autocast, or choose a recipe for MoE."
            )
        return FP8Quantizer(self.recipe, role.tensor_type)


def _of_attention(role: QuantizerRole) -> bool:
    """Is this slot one of DotProductAttention's? Its output and the gradient of its inputs have a hint for a name only; the kernel wants FP8 quantizers there
    too. On Hopper all of them must be delayed: TransformerEngine takes current scaling in attention from Blackwell on."""
    return role.module_type == "dpa" or (not role.module_type and ("dpa_output" in role.name or "dpa_grad_input" in role.name))


@dataclass(repr=False)
class FP8Recipe(CustomRecipe):
    """CustomRecipe that TransformerEngine treats as stateless: nothing of it is pickled into checkpoints, so they load under any recipe (shims)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward_override is not None:
            raise RecipeError(
                f"backward_override={self.backward_override!r} (NVTE_BACKWARD_OVERRIDE) asks for a backward pass outside FP8; unset it, or use the bf16 recipe"
            )


def build(spec: str | Recipe) -> FP8Recipe | DelayedScaling:
    """One recipe object per recipe value: an FP8Recipe, or TransformerEngine's own where the recipe leaves the linears to it."""
    return _build(replace(from_name(spec) if isinstance(spec, str) else spec, head="bf16"))


@cache
def _build(value: Recipe) -> FP8Recipe | DelayedScaling:
    if not value.quantize:
        raise RecipeError(f"recipe {value.name!r} quantises nothing: run without te.autocast instead")
    fp8_attention, hybrid = value.attention == "fp8", value.grad == "e5m2"
    if fp8_attention and (reason := wrong(cudnn_version())):
        raise RecipeError(f"recipe {value.name!r} with FP8 attention cannot run: {reason}")
    if value.stock:
        return DelayedScaling(
            fp8_format=TEFormat.HYBRID if hybrid else TEFormat.E4M3, amax_history_len=HISTORY, amax_compute_algo="max", fp8_dpa=fp8_attention
        )
    if torch.cuda.is_available():
        ops.refuse_wrong_device("Use one of TransformerEngine's own recipes, or no autocast")
    install()
    return FP8Recipe(
        qfactory=Factory(value),
        fp8_dpa=fp8_attention,
        fp8_format=TEFormat.HYBRID if hybrid or fp8_attention else TEFormat.E4M3,  # of attention; our quantizers know theirs
        quantization_alignment=16,
        backward_override=None,
    )


def weights_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter, Any]]:
    """(name, parameter, process group) of the 2-D weights of every Linear, LayerNormLinear and LayerNormMLP in ``model``.

    The group is that of the tensor-parallel ranks that hold the other shards of the weight, None if it is whole.
    """
    from transformer_engine.pytorch import LayerNormLinear, LayerNormMLP, Linear

    found: list[tuple[str, torch.nn.Parameter, Any]] = []
    for prefix, module in model.named_modules():
        if isinstance(module, (Linear, LayerNormLinear, LayerNormMLP)):
            sharded = module.tp_size > 1 and (isinstance(module, LayerNormMLP) or module.parallel_mode in ("column", "row"))
            group = module.tp_group if sharded else None
            found += [(f"{prefix}.{name}" if prefix else name, p, group) for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
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
