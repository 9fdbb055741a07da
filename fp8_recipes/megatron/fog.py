"""FOG's architectures and their baselines (`fp8_recipes.architecture`) out of Megatron's own modules: a layer spec per architecture.

    --fog flash        -> layer_spec: the stock decoder's specs with norms, bounds and activation exchanged

What an architecture does not change stays Megatron's: linears, attention, experts, parallelism, checkpoints. What it adds is small: parameters of one value
per feature or per layer, replicated over tensor-parallel ranks. How their gradients meet, which differs by where the parameter sits:

    post-norm, LayerScale   see this rank's tokens under sequence parallelism: ``weight.sequence_parallel`` = Megatron's sum over ranks, as for its own norms
    alpha of queries/keys   see this rank's heads: they are called q_layernorm and k_layernorm, whose gradients Megatron sums
    alphas of xIELU         see this rank's features of the FFN: summed in backward by `copy_to_tensor_model_parallel_region`
    the same of experts     one pair for all experts of a layer, replicated over all ranks: see the tokens of this rank's experts. Over tensor-parallel ranks as
                            the post-norm's; over the others by data parallelism as the router's, which contains the expert-parallel ranks
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from ..architecture import Architecture
from ..nn import fog as parts
from .fog_attention import BoundedSelfAttention


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """``--spec fp8_recipes.megatron.fog layer_spec``: the decoder's specs on this stage under the architecture that the command line asks for."""
    from megatron.training import get_args

    from .fog_arguments import architecture_of

    architecture = architecture_of(get_args())
    if architecture is None:
        raise ValueError("--spec fp8_recipes.megatron.fog layer_spec needs an architecture: --fog max, opt or flash, or --arch NAME")
    return block_spec(architecture, config.transformer, vp_stage)


def block_spec(architecture: Architecture, config: Any, vp_stage: int | None = None) -> Any:
    """TransformerBlockSubmodules of this stage's layers. Sets in `config` (a TransformerConfig) what Megatron reads from there: softmax scale, initialisation
    of the projections onto the residual stream, the embeddings' multiplier."""
    apply_to_config(architecture, config)
    use_te = config.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm, vp_stage=vp_stage
    )
    changed = {id(layer): _layer(architecture, config, layer) for layer in spec.layer_specs}
    final = (TENorm if use_te else RMSNorm) if architecture.final_norm else None
    return replace(spec, layer_specs=[changed[id(layer)] for layer in spec.layer_specs], layer_norm=final)


def apply_to_config(architecture: Architecture, config: Any) -> None:
    """Softmax scale, ``qk_layernorm`` (without it Megatron builds nothing at that place), ``embedding_multiplier`` (read by `shims.embedding_multiplier`).

    A post-norm undoes any scale of the projection in front of it, so that projection is initialised as every other matrix; GPT-2's division by sqrt(2 L) would
    only bring the branch nearer to the norm's eps.
    """
    config.softmax_scale = architecture.softmax_scale(config.kv_channels)
    config.qk_layernorm = architecture.qk != "none"
    std = config.embedding_init_method_std if config.embedding_init_method_std is not None else config.init_method_std
    config.embedding_multiplier = architecture.embedding_multiplier(std)
    if architecture.post_norm:
        config.output_layer_init_method = config.init_method


def _layer(architecture: Architecture, config: Any, spec: ModuleSpec) -> ModuleSpec:
    """One layer's spec with the architecture's parts."""
    use_te = config.transformer_impl == "transformer_engine"
    backend = TESpecProvider() if use_te else LocalSpecProvider()
    old = spec.submodules
    attention = old.self_attention.submodules
    bound = {"none": IdentityOp, "rmsnorm": TENorm if use_te else RMSNorm, "rmsnorm_frozen": FrozenTENorm if use_te else FrozenRMSNorm, "tanh": TanhBound}
    bound_of = bound[architecture.qk]
    if architecture.qk == "tanh":
        bound_of = partial(TanhBound, alpha=architecture.tanh_alpha)
    attention = replace(attention, q_layernorm=bound_of, k_layernorm=bound_of)
    changes: dict[str, Any] = {}
    mlp, moe = old.mlp, config.num_moe_experts is not None and not _is_dense(old.mlp)
    if not architecture.pre_norm:
        attention = replace(attention, linear_qkv=backend.column_parallel_linear())
        changes |= {"input_layernorm": IdentityOp, "pre_mlp_layernorm": IdentityOp, "sharded_state_dict_keys_map": {}}
    if not moe:
        fc1 = old.mlp.keywords["submodules"].linear_fc1 if architecture.pre_norm else backend.column_parallel_linear()
        kind = {"xielu": XieluMLP, "smooth_swiglu": SmoothMLP}.get(architecture.activation, MLP)
        mlp = partial(kind.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=backend.row_parallel_linear()))
    elif architecture.activation == "xielu":
        mlp = with_xielu(old.mlp)
    if architecture.post_norm or architecture.layer_scale:
        changes |= {"self_attn_bda": _branch(architecture, config), "mlp_bda": _branch(architecture, config)}
    self_attention = replace(old.self_attention, submodules=attention)
    if architecture.qk == "tanh" and old.self_attention.module is SelfAttention:
        self_attention = replace(self_attention, module=BoundedSelfAttention)
    return replace(spec, submodules=replace(old, self_attention=self_attention, mlp=mlp, **changes))


def _is_dense(mlp: Any) -> bool:
    return isinstance(mlp, partial) and getattr(mlp.func, "__self__", None) is MLP


def with_xielu(moe: Any) -> Any:
    """A builder of MoE layers, `moe`, with xIELU in experts and shared experts. Raises ValueError for a layer that is not built as Megatron's GPT builds it."""
    submodules: Any = moe.keywords["submodules"] if isinstance(moe, partial) and moe.func is MoELayer else None
    experts, shared = getattr(submodules, "experts", None), getattr(submodules, "shared_experts", None)
    if not (isinstance(experts, partial) and experts.func is TEGroupedMLP and isinstance(shared, partial)):
        raise ValueError("xIELU in experts needs Megatron's MoE layer with its grouped MLP; use --moe-grouped-gemm and --transformer-impl transformer_engine")
    parts_of = {"experts": partial(XieluGroupedMLP, **experts.keywords), "shared_experts": partial(XieluSharedExpertMLP, **shared.keywords)}
    return partial(MoELayer, submodules=replace(submodules, **parts_of))


def _branch(architecture: Architecture, config: Any) -> ModuleSpec:
    return ModuleSpec(module=Branch, params={"config": config, "gain": architecture.branch_gain(config.num_layers), "norm": architecture.post_norm})


class Branch(torch.nn.Module):
    """Megatron's bias-dropout-add with a norm or LayerScale on the branch's output: ``residual + dropout(post(x + bias))``.

    gain: initial gain. norm: RMSNorm, else LayerScale. Called as Megatron calls such builders: ``(training, fused)`` gives the function to apply. A norm
    without bias and dropout is one operation with the addition, in fp32 up to the residual's dtype (``--fp32-residual-connection``: fp32); otherwise Megatron's
    operation follows it.
    """

    def __init__(self, config: Any, gain: float, norm: bool) -> None:
        super().__init__()
        self.post: Any = (PostNorm if norm else LayerScale)(config, gain)

    def forward(self, training: bool, fused: bool) -> Any:
        add, norm = get_bias_dropout_add(training, fused), isinstance(self.post, PostNorm)

        def apply(x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
            x, bias = x_with_bias
            # Megatron turns gradients on around this call even in passes without them (evaluation, the first pass under recompute), where x needs none: the
            # gains would begin a graph there that keeps the input of every norm until the pass ends.
            trained = x.requires_grad
            if norm and bias is None and not (training and dropout):
                return self.post(x, residual, train_gain=trained)
            with torch.set_grad_enabled(trained):
                x = x if bias is None else x + bias
                x = self.post(x, torch.zeros_like(x)) if norm else self.post(x)
            return add((x, None), residual, dropout)

        return apply


def share_tokens(weight: Any, config: Any) -> None:
    """Have Megatron sum this weight's gradient over the ranks that share a sequence, if they do."""
    weight.sequence_parallel = config.sequence_parallel


class PostNorm(parts.PostNorm):
    """`nn.fog.PostNorm` with its gradient summed over the ranks that share a sequence. Its gains are stored as they are: zero-centred ones are refused."""

    def __init__(self, config: Any, gain: float) -> None:
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma=True (--apply-layernorm-1p): a post-norm's gains are stored as they are; leave it False")
        super().__init__(config.hidden_size, gain, config.layernorm_epsilon)
        share_tokens(self.weight, config)


class RMSNorm(parts.RMSNorm):
    """`nn.fog.RMSNorm` where Megatron builds a norm; the local implementation's, which under sequence parallelism has none of its own."""

    def __init__(self, *, config: Any, hidden_size: int, eps: float, trained: bool = True) -> None:
        super().__init__(hidden_size, trained, eps)
        if self.weight is not None:
            share_tokens(self.weight, config)


FrozenRMSNorm = partial(RMSNorm, trained=False)


def FrozenTENorm(*, config: Any, hidden_size: int, eps: float) -> Any:  # noqa: N802 - stands where a class is expected
    """TransformerEngine's RMSNorm with gains that stay one."""
    norm: Any = TENorm(config, hidden_size, eps=eps)
    norm.weight.requires_grad_(False)
    return norm


class LayerScale(parts.LayerScale):
    """`nn.fog.LayerScale` with its gradient summed over the ranks that share a sequence."""

    def __init__(self, config: Any, gain: float) -> None:
        super().__init__(config.hidden_size, gain)
        share_tokens(self.weight, config)


class TanhBound(parts.TanhBound):
    """`nn.fog.TanhBound` as Megatron builds what bounds queries or keys. alpha: [1], so that neither weight decay nor checkpoints meet a 0-dim parameter."""

    def __init__(self, *, config: Any, hidden_size: int, eps: float, alpha: float) -> None:
        del config, hidden_size, eps
        super().__init__(alpha)
        self.alpha = torch.nn.Parameter(self.alpha.detach().view(1))

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """``tanh(alpha x)``. Without x: alpha, 0-dim, for `BoundedSelfAttention`, which calls the module so that its hooks run."""
        alpha = self.alpha.view(())
        return alpha if x is None else parts._Tanh.apply(x, alpha)


class XIELU(parts.XIELU):
    """`nn.fog.XIELU` of an FFN. alpha_p, alpha_n: [1], for the reason given at `TanhBound`.

    tp_group: ranks with the same pair and the same tokens or parts of one sequence. experts: of an MoE layer, where each of them sees other tokens; else each
    sees some of the FFN's features.
    """

    def __init__(self, config: Any, tp_group: Any, experts: bool = False) -> None:
        super().__init__()
        self.tp_group, self.experts = tp_group, experts
        self.alpha_p, self.alpha_n = (torch.nn.Parameter(a.detach().view(1)) for a in (self.alpha_p, self.alpha_n))
        if experts:
            for alpha in (self.alpha_p, self.alpha_n):
                share_tokens(alpha, config)

    def alpha(self) -> torch.Tensor:
        raw = torch.cat((self.alpha_p, self.alpha_n)).float()
        if self.tp_group.size() > 1 and not self.experts:
            raw = copy_to_tensor_model_parallel_region(raw, group=self.tp_group)
        soft = torch.nn.functional.softplus(raw)
        return torch.stack((soft[0], soft[1] + parts.BETA))  # no constant to be copied to the device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (_CompiledXielu if x.is_cuda else parts._Xielu).apply(x, self.alpha())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """For checkpoints. Without it Megatron's FFN would forget the tensor-parallel ranks, and its experts take the experts' own: several ranks would each be
        told to write the one pair."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets, **groups)


class _CompiledXielu(torch.autograd.Function):
    """`nn.fog.XIELU` in one pass each way, for layers whose quantisation is not this package's: x and dy are as wide as the FFN, and eager fp32 would write ten
    such tensors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, alpha)
        return _compiled(_xielu_forward)(x.view(-1, x.shape[-1]), alpha).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, alpha = ctx.saved_tensors
        dx, dalpha = _compiled(_xielu_backward)(dy.reshape(-1, x.shape[-1]), x.view(-1, x.shape[-1]), alpha)
        return dx.view(x.shape), dalpha


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)  # for one number of tokens; if another comes (experts), once more for any


def _xielu_forward(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return parts.xielu(x, alpha).to(x.dtype)


def _xielu_backward(dy: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return parts.xielu_backward(dy, x, alpha).to(x.dtype), parts.xielu_alpha_gradient(dy, x)


def _set_activation(mlp: Any, xielu: XIELU) -> None:
    del mlp.activation_func  # a function from the config, which no module may replace
    mlp.activation_func = xielu


class XieluMLP(MLP):
    """Megatron's MLP with xIELU between its linears."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _set_activation(self, XIELU(self.config, self.tp_group))


class XieluSharedExpertMLP(SharedExpertMLP):
    """Megatron's shared experts with xIELU between their linears, under a pair of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _set_activation(self, XIELU(self.config, self.tp_group))


class XieluGroupedMLP(TEGroupedMLP):
    """Megatron's experts with xIELU between their linears, under one pair for all experts of the layer, on every rank that has some of them."""

    def __init__(self, num_local_experts: int, config: Any, submodules: Any, pg_collection: Any = None, name: str | None = None) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection=pg_collection, name=name)
        _set_activation(self, XIELU(config, pg_collection.tp, experts=True))


class SmoothMLP(MLP):
    """The Smooth-SwiGLU baseline's FFN (`nn.fog.smooth_swiglu`), with one factor per token over this rank's features: each rank multiplies its own part of
    the output back before the parts are added, so tensor parallelism is refused (`fog_arguments`)."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if per_token_scale is not None:
            raise RuntimeError("smooth_swiglu is a dense FFN: it takes no probabilities of experts")
        h, bias = self.linear_fc1(hidden_states)
        gate, up = (h if bias is None else h + bias).chunk(2, dim=-1)
        y, s = parts.smooth_swiglu(gate, up)
        y, bias = self.linear_fc2(y)
        return y * s, bias
