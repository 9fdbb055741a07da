"""Megatron's MoE layer through `nn.moe.moe_experts`: same parameters, same checkpoint, another way from router to combined output.

Router, shared experts, norms and attention stay Megatron's own. The experts' parameters stay in Megatron's grouped MLP (``linear_fc1.weight0`` ...), whose
forward, permutation and dispatcher are not called. The layers that run this way are chosen by configuration alone, printed in the start-up report, and there
is no way back: what a layer cannot honour is refused (`moe_arguments` by flag, `check` by layer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..nn.activations import GELU, SWIGLU, XIELU
from ..nn.dispatch import AllToAll, Dispatcher, Local
from ..nn.moe import moe_experts
from ..nn.routing import chosen_experts
from ..recipe import Recipe, RecipeError
from . import arguments
from .mlp import before_forward

_ATTRIBUTE = "_fp8_recipes_flow"


@dataclass(frozen=True)
class LayerFlow:
    """What one MoE layer needs for its way: made at its first use, when the parameters are where they stay."""

    recipe: Recipe
    dispatcher: Dispatcher
    fc1: Sequence[torch.nn.Parameter]
    """L parameters [2F, H], or [F, H] where the activation has no gate."""
    fc2: Sequence[torch.nn.Parameter]
    """L parameters [H, F]."""
    activation: str
    """As `nn.moe.moe_experts` takes it."""
    linears: tuple[Any, Any]
    xielu: Any = None
    """`fog.XIELU`, which holds the activation's trained pair, or None where it has none."""


def recipe_of(layer: Any) -> Recipe | None:
    """The recipe under which this MoE layer runs its experts in FP8, or None where it stays as Megatron built it (see `stock_reason`)."""
    spec = layer.config.fp8_recipe
    return None if not arguments.is_flow(spec) or stock_reason(layer) is not None else arguments.resolve(str(spec))


def stock_reason(layer: Any) -> str | None:
    """Why this layer runs through Megatron's own modules under a recipe with ``moe=flow``: the user said so. None if it does not."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    if is_first_last_bf16_layer(layer.config, int(layer.layer_number or 0) - 1):
        return "bf16 (first / last)"
    linears = (getattr(layer.experts, "linear_fc1", None), getattr(layer.experts, "linear_fc2", None))
    if any(getattr(linear, "te_quant_params", None) is not None for linear in linears):
        return "as the precision file says"
    return None


def activation_of(experts: Any) -> str | None:
    """What these experts (Megatron's module of them) compute, as `nn.moe.moe_experts` calls it, None if it is nothing that it can."""
    from .fog import XIELU as XieluOfMegatron

    config = experts.config
    if isinstance(experts.activation_func, XieluOfMegatron):
        return XIELU.name
    if config.activation_func_clamp_value is not None or config.glu_linear_offset:
        return None
    if config.gated_linear_unit:
        return SWIGLU.name if config.activation_func is torch.nn.functional.silu else None
    exact = config.activation_func is torch.nn.functional.gelu and not config.use_te_activation_func  # TransformerEngine's is the tanh approximation
    return GELU.name if exact else None


def check(layer: Any) -> None:
    """Raise RecipeError if this layer is none that the flow can stand for: the last line behind `moe_arguments`, for models that no flag describes."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    config, experts = layer.config, layer.experts
    grouped = isinstance(experts, TEGroupedMLP)
    linears = grouped and type(experts.linear_fc1) is TEColumnParallelGroupedLinear and type(experts.linear_fc2) is TERowParallelGroupedLinear
    problems = (
        (not grouped or not linears, f"experts of {type(experts).__name__} are not Megatron's TEGroupedMLP (--moe-grouped-gemm)"),
        (grouped and activation_of(experts) is None, "the activation is neither SwiGLU (--swiglu) nor, without a gate, exact GeLU or xIELU"),
        (config.add_bias_linear, "linears with a bias (--disable-bias-linear)"),
        (config.moe_expert_capacity_factor is not None, "a capacity factor (drop and pad)"),
        (config.moe_latent_size, "latent projections (--moe-latent-size)"),
        (config.moe_shared_expert_overlap, "--moe-shared-expert-overlap"),
        (config.moe_apply_probs_on_input, "--moe-apply-probs-on-input"),
        (config.delay_wgrad_compute or config.overlap_moe_expert_parallel_comm, "--delay-wgrad-compute / --overlap-moe-expert-parallel-comm"),
        (config.overlap_dispatch_backward_with_experts_wgrad, "--overlap-dispatch-backward-with-experts-wgrad"),
        (config.moe_single_grouped_weight or config.moe_mlp_glu_interleave_size, "grouped or interleaved expert weights"),
        (config.use_transformer_engine_op_fuser, "--use-transformer-engine-op-fuser"),
        (config.expert_tensor_parallel_size > 1, f"experts split over {config.expert_tensor_parallel_size} ranks (--expert-tensor-parallel-size 1)"),
        (config.tensor_model_parallel_size > 1 and not config.sequence_parallel, "tensor parallelism without --sequence-parallel"),
        (_dispatcher_name(config) is None, f"--moe-token-dispatcher-type {config.moe_token_dispatcher_type} (alltoall, or flex with deepep)"),
    )
    found = [message for wrong, message in problems if wrong]
    if found:
        name = config.fp8_recipe
        raise RecipeError(f"--fp8-recipe {name} cannot run MoE layer {layer.layer_number}: {'; '.join(found)}. Change these, or use Megatron's blockwise")


def describe(layer: Any) -> str:
    """One line of the start-up report. Raises RecipeError for a layer that cannot be honoured."""
    reason = stock_reason(layer)
    if reason is not None:
        return f"Megatron's own modules, {reason}"
    check(layer)
    recipe = _with_recompute(arguments.resolve(str(layer.config.fp8_recipe)), layer.config)
    ranks = layer.ep_group.size()
    travel = f"FP8 dispatch over {ranks} ranks ({_dispatcher_name(layer.config)})" if ranks > 1 else "no dispatch (one rank)"
    way = f"{layer.num_local_experts} local experts as one FP8 function from router to combined output; {travel}; kept for backward: {recipe.moe_saved}"
    activation = activation_of(layer.experts)
    if activation == SWIGLU.name:
        return way
    return f"{way}; {activation} without a gate{', one trained pair for all experts of a layer' if activation == XIELU.name else ''}"


def _dispatcher_name(config: Any) -> str | None:
    kind = config.moe_token_dispatcher_type
    if kind == "flex":
        return "deepep" if config.moe_flex_dispatcher_backend == "deepep" else None
    return "alltoall" if kind == "alltoall" else None


@cache
def _dispatcher(name: str, group: Any) -> Dispatcher:
    """One per process group, shared by the layers: what the ranks must agree on is compared once."""
    if name == "deepep":
        from ..nn.dispatch import DeepEP

        return DeepEP(group)
    return AllToAll(group)


def _with_recompute(recipe: Recipe, config: Any) -> Recipe:
    """``recipe`` with Megatron's selective recompute: "moe_act" makes the activation again, "moe" everything behind the dispatch. What is kept is FP8."""
    modules = config.recompute_modules if config.recompute_granularity == "selective" else ()
    if "moe" in modules:
        return recipe.with_overrides(moe_saved="input")
    if "moe_act" in modules and recipe.moe_saved == "activation":
        return recipe.with_overrides(moe_saved="h")
    return recipe


def flow_of(layer: Any, recipe: Recipe) -> LayerFlow:
    """The layer's `LayerFlow`, checked and made at the first use."""
    flow: LayerFlow | None = getattr(layer, _ATTRIBUTE, None)
    if flow is not None:
        return flow
    check(layer)
    if layer.moe_layer_recompute:
        layer.shared_experts_recompute = True  # "moe" covers them; the experts are recomputed inside their function, from FP8
    experts, config = layer.experts, layer.config
    dispatcher = _dispatcher(str(_dispatcher_name(config)), layer.ep_group) if layer.ep_group.size() > 1 else Local()
    fc1, fc2 = ([getattr(linear, f"weight{i}") for i in range(layer.num_local_experts)] for linear in (experts.linear_fc1, experts.linear_fc2))
    activation = activation_of(experts)
    assert activation is not None, "refused by check"
    xielu = experts.activation_func if activation == XIELU.name else None
    flow = LayerFlow(_with_recompute(recipe, config), dispatcher, fc1, fc2, activation, (experts.linear_fc1, experts.linear_fc2), xielu)
    setattr(layer, _ATTRIBUTE, flow)
    return flow


def routed_experts(layer: Any, flow: LayerFlow, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
    """hidden: [S, B, H] bf16; probs, routing_map: [S * B, E] of the router. Returns the experts' combined output [S, B, H]."""
    index, prob = chosen_experts(probs, routing_map, layer.config.moe_router_topk)
    before_forward(layer.experts)
    fc1, fc2 = flow.linears
    y = moe_experts(
        hidden.reshape(-1, hidden.shape[-1]),
        index,
        prob,
        flow.fc1,
        flow.fc2,
        recipe=flow.recipe,
        activation=flow.activation,
        alpha=None if flow.xielu is None else flow.xielu.alpha(),
        dispatcher=flow.dispatcher,
        num_experts=layer.config.num_moe_experts,
        observer=layer.__dict__.get("fp8_observer"),  # set by `metrics`; a module looks everywhere for a name that it does not have
    )
    fc1.is_first_microbatch = fc2.is_first_microbatch = False
    return y.view(hidden.shape)


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``MoELayer.forward`` with the flow in front of the original."""

    def moe_forward(self: Any, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None) -> Any:
        flow: LayerFlow | None = self.__dict__.get(_ATTRIBUTE)
        if flow is None:  # not asked yet, or a layer that stays as it is
            recipe = recipe_of(self)
            if recipe is None:
                return original(self, hidden_states, intermediate_tensors, padding_mask)
            flow = flow_of(self, recipe)
        if intermediate_tensors is not None:
            raise RuntimeError("a CUDA graph splits this MoE layer into parts, but the flow from router to output is one; use --cuda-graph-impl none")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        shared = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, padding_mask)
        output = routed_experts(self, flow, hidden_states, probs, routing_map)
        return (output if shared is None else output + shared), None

    return moe_forward
