"""Megatron's dense MLP through `te.mlp`, or `te.ungated_mlp` where it has no gate: same module, same parameters, same checkpoint, another forward.

Chosen per call by one rule (`fused_options`), printed in the start-up report, and only an optimisation: what does not qualify (tensor parallelism, biases,
other activations) runs through TransformerEngine's modules under the same recipe, in FP8 too.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from ..te.factory import FP8Recipe
from ..te.mlp import Options, norm_swiglu_mlp
from ..te.quantizers import FFN_WEIGHT
from ..te.ungated_mlp import ungated_mlp


def active_recipe() -> Any:
    """The fp8_recipes `Recipe` of the autocast in force, or None."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    recipe = FP8GlobalStateManager.get_fp8_recipe()
    return recipe.qfactory.recipe if isinstance(recipe, FP8Recipe) else None


def static_reason(mlp: Any, recipe: Any) -> str | None:
    """Why this MLP can never take the fused way under ``recipe``, or None. Looks at configuration only, so the start-up report can print it."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear

    from .fog import SmoothMLP, XieluMLP

    if not recipe.folded:
        return "the recipe keeps its fine scales (fold=none)"
    config, fc1, fc2 = mlp.config, mlp.linear_fc1, mlp.linear_fc2
    gated = config.gated_linear_unit
    first = TELayerNormColumnParallelLinear if gated else TEColumnParallelLinear
    swiglu = gated and config.activation_func is torch.nn.functional.silu and not isinstance(mlp, SmoothMLP)
    ungated = not gated and (isinstance(mlp, XieluMLP) or config.activation_func is torch.nn.functional.gelu)
    pair = "a norm and a linear in one, and a linear" if gated else "two linears without a norm"
    checks = (
        (type(fc1) is first and type(fc2) is TERowParallelLinear, f"its linears are not TransformerEngine's ({pair})"),
        (swiglu or ungated, "its activation is not SwiGLU, GeLU or xIELU"),
        (not config.use_te_activation_func, "--use-te-activation-func"),
        (config.activation_func_clamp_value is None and not config.glu_linear_offset, "a clamped or shifted SwiGLU"),
        (not config.add_bias_linear, "its linears have a bias"),
        (config.normalization == "RMSNorm", f"--normalization {config.normalization}"),
        (config.tensor_model_parallel_size == 1, "tensor parallelism"),
        (not config.delay_wgrad_compute, "--delay-wgrad-compute"),
        (not config.cpu_offloading, "--cpu-offloading"),
        (not config.activation_func_fp8_input_store, "--activation-func-fp8-input-store"),
        (getattr(fc1, "te_quant_params", None) is None and getattr(fc2, "te_quant_params", None) is None, "a per-module precision"),
    )
    return next((reason for ok, reason in checks if not ok), None)


def mark_weights(chunks: list[torch.nn.Module]) -> None:
    """Mark the weights of every MLP, for ``weight_cache=ffn``: where it runs module by module, its linears are to their quantizers like any other."""
    from megatron.core.transformer.mlp import MLP

    for mlp in (module for chunk in chunks for module in chunk.modules() if isinstance(module, MLP)):
        for linear in (mlp.linear_fc1, mlp.linear_fc2):
            if isinstance(getattr(linear, "weight", None), torch.nn.Parameter):
                setattr(linear.weight, FFN_WEIGHT, True)


def weight_cache_note(mlp: Any, recipe: Any) -> str:
    """What the recipe's ``weight_cache`` does to the weights of this MLP, for the start-up report; empty where it asks for nothing."""
    asked = f"; weight_cache={recipe.weight_cache}"
    if recipe.weight_cache == "none":
        return ""
    if mlp.config.disable_parameter_transpose_cache:  # its layers are told nothing of microbatches
        return f"{asked} keeps nothing (disable_parameter_transpose_cache)"
    return f"{asked} keeps their FP8 weights from the first microbatch of a step to the last"


def fused_options(mlp: Any, per_token_scale: Any, kwargs: dict[str, Any]) -> Options | None:
    """`Options` if this call takes the fused way, else None."""
    recipe = active_recipe()
    extra = per_token_scale is not None or any(value is not None for value in kwargs.values())  # the layer passes padding_mask=None
    if recipe is None or extra or static_reason(mlp, recipe) is not None:
        return None
    fc1 = mlp.linear_fc1
    first = None if fc1.disable_parameter_transpose_cache else fc1.is_first_microbatch
    return Options(
        recipe=recipe,
        eps=getattr(fc1, "eps", 0.0),  # of the norm, where there is one
        zero_centered_gamma=getattr(fc1, "zero_centered_gamma", False),
        fuse_wgrad=fc1.fuse_wgrad_accumulation,
        accumulate=not first,
        first=first if mlp.training else None,
        observer=getattr(mlp, "fp8_observer", None),  # set by `metrics`
    )


def before_forward(mlp: Any) -> None:
    """Fire the parts' own pre-forward hooks: DistributedDataParallel waits there for gathered parameters, and the fused way does not call the modules."""
    activation = getattr(mlp, "activation_func", None)  # a module where it has parameters (xIELU), else a function
    parts = [mlp.linear_fc1, mlp.linear_fc2, *([activation] if isinstance(activation, torch.nn.Module) else [])]
    for module in chain.from_iterable(part.modules() for part in parts):
        for hook in module._forward_pre_hooks.values():
            if hook(module, None) is not None:
                raise RuntimeError(f"a pre-forward hook of {type(module).__name__} changes its input, which a fused layer never builds; remove the hook")


def forward(original: Any) -> Any:
    """``MLP.forward`` with the fused way in front of the original."""
    from .fog import XIELU

    def mlp_forward(self: Any, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any) -> Any:
        options = fused_options(self, per_token_scale, kwargs)
        if options is None:
            return original(self, hidden_states, per_token_scale, **kwargs)
        before_forward(self)
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        if self.config.gated_linear_unit:
            y = norm_swiglu_mlp(hidden_states, fc1.layer_norm_weight, fc1.weight, fc2.weight, options)
        else:
            alpha = self.activation_func.alpha() if isinstance(self.activation_func, XIELU) else None
            y = ungated_mlp(hidden_states, fc1.weight, fc2.weight, alpha, options)
        fc1.is_first_microbatch = fc2.is_first_microbatch = False
        return y, None

    return mlp_forward
