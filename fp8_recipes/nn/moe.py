"""A mixture-of-experts layer in FP8: `moe_experts` from the router's output on, `MoE` with router and shared experts. Neither Megatron nor
TransformerEngine is needed.

    y[t] = sum_k prob[t, k] * w2[e] act(w1[e] x[t])        e = expert_index[t, k]; act: SwiGLU, or without a gate GeLU or xIELU

The dataflow, dtype by dtype, is in docs/recipes.md and `nn.experts`; how tokens travel between ranks in `nn.dispatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..recipe import Recipe, RecipeError, from_name
from ..reference.permute import VECTOR
from ..weight_scaling import ATTRIBUTE, WeightScaling
from .activations import SWIGLU, Activation, activation_of
from .dispatch import Dispatcher, Local
from .experts import Flow, run_experts
from .fog import XIELU
from .linear import Linear
from .mlp import can_fuse, fp8_mlp


def moe_experts(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    prob: torch.Tensor,
    w1: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    *,
    recipe: Recipe,
    activation: str = SWIGLU.name,
    alpha: torch.Tensor | None = None,
    dispatcher: Dispatcher | None = None,
    num_experts: int | None = None,
    observer: Any = None,
) -> torch.Tensor:
    """``y[t] = sum_k prob[t, k] * w2[e] act(w1[e] x[t])``, e = expert_index[t, k], in FP8 from dispatch to combine as `recipe` (moe="flow") says.

    x: [T, H] bf16 (or fp32, fp16). expert_index: [T, K] int32, ids in the whole model, -1 = dropped copy. prob: [T, K] fp32.
    w1: the L experts of this rank, [2F, H] = [gate; up] each, or [F, H] without a gate; w2: [H, F] each; contiguous bf16 or fp32 parameters anywhere in memory.
    activation: "swiglu", "gelu" (exact, no gate) or "xielu" (no gate). alpha: for "xielu", fp32 [2] = its effective alphas (`nn.fog.XIELU.alpha`), the same for
        every expert; its gradient is the sum over the rows of this rank's experts.
    dispatcher: how tokens reach their experts (`nn.dispatch`); None: every expert is on this rank. num_experts: of the whole model; None: L.
    observer: sees every tensor that is quantised (`nn.experts.Flow`), for metrics.
    H and F are multiples of 16; on CUDA an F that is no multiple of 128 costs the fused gradient of SwiGLU.
    Returns [T, H] in x's dtype. Gradients of x, prob and the weights; weights with ``main_grad`` get theirs added there and ``weight.grad`` stays None.
    No tokens: y is empty, the weights' gradients are zero. NaN in a token stays in its row of y, of dx and prob's gradient, and in its experts' gradients,
    alpha's included.
    A recipe without quantisation runs plain torch on one rank. Raises ValueError, TypeError or RecipeError on what does not fit. On CUDA an id outside the
    range is dropped like -1: finding it would wait for the device.
    """
    dispatcher = Local() if dispatcher is None else dispatcher
    num_experts = len(w1) * dispatcher.size if num_experts is None else num_experts
    act = activation_of(activation)
    act.check_alpha(alpha)
    _check_inputs(x, expert_index, prob, w1, w2, act, dispatcher, num_experts)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not recipe.quantize:
        if dispatcher.size > 1:
            raise RecipeError(f"recipe {recipe.name!r} is not quantised and runs on one rank only; use fp8_flow_moe over {dispatcher.size} ranks")
        return plain_experts(x, expert_index, prob, w1, w2, act, alpha)
    if recipe.moe != "flow":
        raise RecipeError(f"recipe {recipe.name!r}: moe={recipe.moe} has no grouped products; use fp8_flow_moe, or {recipe.name}:moe=flow if it folds to rows")
    inputs = (x, prob) if alpha is None else (x, prob, alpha)
    save = torch.is_grad_enabled() and (any(t.requires_grad for t in inputs) or any(t.requires_grad for w in (w1, w2) for t in w))
    flow = Flow(recipe, dispatcher, num_experts, act, save, observer)
    return run_experts(x.contiguous(), prob.contiguous(), alpha, expert_index.contiguous(), flow, w1, w2)


def _check_inputs(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    prob: torch.Tensor,
    w1: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    act: Activation,
    dispatcher: Dispatcher,
    num_experts: int,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, hidden], got shape {tuple(x.shape)}; flatten the leading dimensions")
    if expert_index.dim() != 2 or expert_index.shape[0] != x.shape[0] or expert_index.shape[1] == 0:
        raise ValueError(f"expert_index must be [{x.shape[0]}, K] with K >= 1 for x of shape {tuple(x.shape)}, got shape {tuple(expert_index.shape)}")
    if expert_index.dtype != torch.int32:
        raise TypeError(f"expert_index must be int32, got {expert_index.dtype}; use expert_index.int()")
    if prob.shape != expert_index.shape:
        raise ValueError(f"prob must have expert_index's shape {tuple(expert_index.shape)}, got {tuple(prob.shape)}")
    if prob.dtype != torch.float32:
        raise TypeError(f"prob must be float32, got {prob.dtype}; run the router in fp32, or use prob.float()")
    if len(w1) == 0 or len(w1) != len(w2):
        raise ValueError(f"w1 and w2 must hold one matrix per expert of this rank, at least one; got {len(w1)} and {len(w2)}")
    if num_experts != len(w1) * dispatcher.size:
        raise ValueError(f"num_experts={num_experts} over {dispatcher.size} ranks leaves {num_experts / dispatcher.size:g} here, but w1 holds {len(w1)}")
    hidden, ffn = x.shape[1], w2[0].shape[-1]
    if tuple(w1[0].shape) != (act.parts * ffn, hidden) or tuple(w2[0].shape) != (hidden, ffn):
        wanted = f"for x with H = {hidden} and activation={act.name!r}, w1 must be [{'2F' if act.parts == 2 else 'F'}, H] and w2 [H, F] per expert"
        raise ValueError(f"{wanted}; got {tuple(w1[0].shape)} and {tuple(w2[0].shape)}")
    for name, value in (("hidden", hidden), ("ffn", ffn)):
        if value % VECTOR:
            raise ValueError(f"{name}={value} must be a multiple of {VECTOR}: rows of FP8 start on {VECTOR} bytes; pad the model's {name} size")
    if w1[0].dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"the experts' weights must be bfloat16 or float32, got {w1[0].dtype}; cast them with .to(torch.bfloat16)")
    for name, t in (("expert_index", expert_index), ("prob", prob), ("w1[0]", w1[0]), ("w2[0]", w2[0])):
        if t.device != x.device:
            raise ValueError(f"x is on {x.device} and {name} on {t.device}; move all to one device")


def plain_experts(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    prob: torch.Tensor,
    w1: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    act: Activation = SWIGLU,
    alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `moe_experts` computes, in plain torch in the dtype of the weights, expert by expert: the baseline and, in float64, the truth of the tests."""
    y = torch.zeros(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    for expert, (a, b) in enumerate(zip(w1, w2, strict=True)):
        token, copy = (expert_index == expert).nonzero(as_tuple=True)
        out = F.linear(act.plain(F.linear(x[token].to(a.dtype), a), alpha) * prob[token, copy, None].to(a.dtype), b)
        y = y.index_add(0, token, out.to(y.dtype))
    return y.to(x.dtype)


class Router(nn.Module):
    """Scores in fp32, top-k choice, probabilities. Parameters: ``weight`` [E, H].

    score: "softmax" (over all experts) or "sigmoid". normalize: divide a token's chosen scores by their sum. scaling: times this.
    expert_bias: choose by score + bias, weigh by score alone (DeepSeek-V3's balancing without a loss); `update_expert_bias` moves the bias after a step.
    """

    expert_bias: torch.Tensor | None
    tokens_per_expert: torch.Tensor

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        normalize: bool = True,
        scaling: float = 1.0,
        expert_bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={score!r} must be softmax or sigmoid")
        self.top_k, self.score, self.normalize, self.scaling = top_k, score, normalize, scaling
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        self.register_buffer("expert_bias", torch.zeros(num_experts, device=device) if expert_bias else None)
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, device=device), persistent=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: [T, H] -> (expert_index [T, K] int32, prob [T, K] fp32, every expert's score [T, E] fp32, each token's summing to 1)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(dim=1) if self.score == "softmax" else logits.sigmoid()
        wanted = scores if self.expert_bias is None else scores + self.expert_bias
        index = wanted.detach().topk(self.top_k, dim=1).indices
        prob = scores.gather(1, index)
        if self.normalize:
            prob = prob / prob.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if self.training and self.expert_bias is not None and torch.is_grad_enabled():
            self.tokens_per_expert += _tokens_per_expert(index, scores.shape[1])
        share = scores if self.score == "softmax" else scores / scores.sum(dim=1, keepdim=True)
        return index.int(), prob * self.scaling, share

    @torch.no_grad()
    def update_expert_bias(self, rate: float = 1e-3, group: Any = None) -> None:
        """After a step: every expert with less than the average load since the last call becomes more likely by ``rate``, the others less. group: whose
        tokens count together (a process group)."""
        if self.expert_bias is None:
            raise ValueError("this router has no expert bias; build it with expert_bias=True")
        if group is not None:
            torch.distributed.all_reduce(self.tokens_per_expert, group=group)
        self.expert_bias += rate * torch.sign(self.tokens_per_expert.mean() - self.tokens_per_expert)
        self.tokens_per_expert.zero_()


def _tokens_per_expert(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Copies of each expert, [E] fp32, without a wait of the host (bincount has one)."""
    ones = torch.ones((), device=index.device).expand(index.numel())
    return torch.zeros(num_experts, device=index.device).scatter_add_(0, index.reshape(-1).long(), ones)


def load_balancing_loss(share: torch.Tensor, expert_index: torch.Tensor) -> torch.Tensor:
    """``E * sum_e f_e P_e``: f_e the share of the copies that expert e got, P_e its mean score; 1 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4).

    share: [T, E] fp32, expert_index: [T, K]. Returns a 0-dim fp32 tensor, differentiable through share.
    """
    tokens, experts = share.shape
    got = _tokens_per_expert(expert_index, experts) / max(expert_index.numel(), 1)
    return experts * (got * share.sum(dim=0) / max(tokens, 1)).sum()


class SharedExperts(nn.Module):
    """A dense FFN that every token passes, with the experts' activation, in the recipe for dense layers. Parameters: gate_up.weight [2F, H] (without a gate
    up.weight [F, H]), down.weight [H, F]; xIELU's, if it is the activation."""

    def __init__(self, hidden: int, ffn: int, recipe: Recipe, activation: str = SWIGLU.name, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.act = activation_of(activation)
        first = Linear(hidden, self.act.parts * ffn, bias=False, recipe=recipe, device=device, dtype=dtype)
        self.add_module("gate_up" if self.act.parts == 2 else "up", first)
        self.down = Linear(ffn, hidden, bias=False, recipe=recipe, device=device, dtype=dtype)
        self.xielu = XIELU().to(device=device, dtype=dtype) if self.act.has_alpha else None

    @property
    def first(self) -> Linear:
        return cast(Linear, self.gate_up if self.act.parts == 2 else self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha = None if self.xielu is None else self.xielu.alpha()
        if self.act.parts == 1 and can_fuse(self.first, self.down):
            return fp8_mlp(x, self.first.weight, self.down.weight, alpha, recipe=self.down.recipe, observer=self.down.observer)
        return self.down(self.act.plain(self.first(x), alpha))


class MoE(nn.Module):
    """Router, experts and shared experts: a drop-in for the MLP of a transformer block. x [..., H] -> y [..., H].

    recipe: a `Recipe` or a name; experts run it, shared experts run its dense recipe ("bf16": everything in plain torch). ffn: inner width of one expert.
    activation: "swiglu", or "gelu" or "xielu" without a gate, of experts and shared experts; xIELU's pair is trained, one for the routed experts together
        (every rank has it, and its gradient holds the rows of that rank's experts: sum it over the ranks as the router's) and one for the shared.
    shared_ffn: inner width of the shared experts together, 0 = none.
    dispatcher: `nn.dispatch`; with E experts over S ranks each holds E / S, this rank's.
    aux_loss: coefficient of `load_balancing_loss`. After a forward ``self.aux_loss`` is that loss times the coefficient (0-dim fp32), to be added to the
        training loss.
    Other keywords: see `Router`. Parameters: router.weight [E, H], w1.0, w1.1, ... [2F, H] ([F, H] without a gate), w2.0, ... [H, F]; xielu.alpha_p,
    xielu.alpha_n (`nn.fog.XIELU`) if it is the activation.
    Under ``weight_scale=predicted`` call `track`, or the experts' weights are measured at each use.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        top_k: int,
        *,
        recipe: Recipe | str = "fp8_flow_moe",
        activation: str = SWIGLU.name,
        shared_ffn: int = 0,
        aux_loss: float = 0.0,
        dispatcher: Dispatcher | None = None,
        device: Any = None,
        dtype: Any = None,
        **router: Any,
    ) -> None:
        super().__init__()
        self.recipe = from_name(recipe) if isinstance(recipe, str) else recipe
        self.dispatcher: Dispatcher = Local() if dispatcher is None else dispatcher
        if num_experts % self.dispatcher.size:
            raise ValueError(f"num_experts={num_experts} must be a multiple of the {self.dispatcher.size} ranks that share them")
        local = num_experts // self.dispatcher.size
        self.router = Router(hidden, num_experts, top_k, device=device, dtype=dtype, **router)
        act = activation_of(activation)
        self.xielu = XIELU().to(device=device, dtype=dtype) if act.has_alpha else None
        self.w1 = nn.ParameterList(_expert_weight(act.parts * ffn, hidden, device, dtype) for _ in range(local))
        self.w2 = nn.ParameterList(_expert_weight(hidden, ffn, device, dtype) for _ in range(local))
        self.shared = SharedExperts(hidden, shared_ffn, self.recipe.dense_recipe, activation, device=device, dtype=dtype) if shared_ffn else None
        self.num_experts, self.activation, self.coefficient = num_experts, activation, aux_loss
        self.aux_loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        index, prob, share = self.router(tokens)
        self.aux_loss = self.coefficient * load_balancing_loss(share, index) if self.coefficient else None
        how: dict[str, Any] = {"recipe": self.recipe, "activation": self.activation, "dispatcher": self.dispatcher, "num_experts": self.num_experts}
        alpha = None if self.xielu is None else self.xielu.alpha()
        y = moe_experts(tokens, index, prob, list(self.w1), list(self.w2), alpha=alpha, **how).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def track(self, scaling: WeightScaling) -> None:
        """Put every expert's weights, and the shared experts', under automatic scaling; the caller attaches the optimizer."""
        shared = [] if self.shared is None else [self.shared.first.weight, self.shared.down.weight]
        for weight in (*self.w1, *self.w2, *shared):
            scaling.track(cast(nn.Parameter, weight))

    def extra_repr(self) -> str:
        untracked = self.recipe.weight_scale == "predicted" and not hasattr(self.w1[0], ATTRIBUTE)
        note = ", weight_scale=measured (experts not tracked)" if untracked else ""
        act = "" if self.activation == SWIGLU.name else f", activation={self.activation}"
        return f"experts={self.num_experts}, here={len(self.w1)}{act}, recipe={self.recipe.name}{note}"


def _expert_weight(rows: int, cols: int, device: Any, dtype: Any) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, cols, device=device, dtype=dtype))
    nn.init.normal_(weight, std=0.02)
    return weight
