"""RMSNorm + SwiGLU MLP as one autograd function: the way from the residual stream to fc2's output never leaves FP8 except inside a product's output.

    forward    x -[RMSNorm + quantise]-> FP8 -fc1-> h bf16 -[SwiGLU + quantise]-> FP8 -fc2-> y
    backward   dy -[quantise]-> FP8 -fc2 dgrad-> bf16 -[dSwiGLU + quantise]-> FP8 -fc1 dgrad-> bf16 -[dRMSNorm]-> dx      wgrads from the saved payloads

Against the same layers as separate TransformerEngine modules this saves, per layer, writing and reading the norm's output, the SwiGLU's output and the
SwiGLU's input gradient in bf16. Saved for backward: x bf16 (the norm needs it), rstd, the payload of the norm's output (1 byte), h bf16 (4F bytes a token),
the payload of the SwiGLU's output (F bytes); of the weights nothing but what ``weight_cache`` keeps beside them anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the extension that the next line names
import transformer_engine_torch as tex

from .. import ops
from ..nn import products
from ..recipe import Recipe
from ..tensor import ScaledTensor


@dataclass(frozen=True)
class Options:
    """eps, zero_centered_gamma: of the norm. fuse_wgrad: accumulate into ``weight.main_grad`` in the product's epilogue. accumulate: add (True) or overwrite
    (first microbatch). first: of weights that the recipe's ``weight_cache`` keeps: cast them anew (True, at a step's first microbatch), take the payloads kept
    since (False), or neither read nor leave any (None, outside a step, as in evaluation). observer: ``observer(linear, role, x, q)`` sees what is quantised,
    linear "linear_fc1" or "linear_fc2", role "input" or "grad"; x is None where a fused kernel made q."""

    recipe: Recipe
    eps: float
    zero_centered_gamma: bool = False
    fuse_wgrad: bool = False
    accumulate: bool = True
    first: bool | None = None
    observer: Callable[[str, str, torch.Tensor | None, ScaledTensor], None] | None = None


def _pack(q: ScaledTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return q.payload, q.scale, q.tile_exponent


def _unpack(saved: tuple[torch.Tensor, ...]) -> ScaledTensor:
    payload, scale, tile_exponent = saved
    return ScaledTensor(payload, scale, "row", tile_exponent)


def weight_operands(weights: tuple[torch.Tensor, ...], options: Options) -> list[products.Weight]:
    """The FFN's weights, kept over the microbatches of a step where recipe and ``options.first`` say so."""
    recipe, first = options.recipe, options.first
    if recipe.weight_cache == "none" or first is None:
        return [products.weight_operand(w, recipe) for w in weights]
    return [products.kept_operand(w, recipe, first=first) for w in weights]


class _NormSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gamma: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, options: Options) -> torch.Tensor:
        recipe = options.recipe
        granularity, fmt = recipe.activation_granularity, recipe.activation_format
        fold = None if granularity == "row" else "row"
        x2d = x.reshape(-1, x.shape[-1])
        products.check_alignment(x.device, tokens=x2d.shape[0], hidden=x2d.shape[1], ffn=w2.shape[1])
        scale = gamma + 1 if options.zero_centered_gamma else gamma
        xq, rstd = ops.rmsnorm_quantize(x2d, scale, options.eps, granularity, fmt, fold=fold)
        op1, op2 = weight_operands((w1, w2), options)
        h = products.fprop(xq, op1, out_dtype=x.dtype)  # [T, H] @ [H, 2F]
        aq = ops.swiglu_quantize(h, granularity, fmt, fold=fold)
        if options.observer is not None:
            options.observer("linear_fc1", "input", None, xq)
            options.observer("linear_fc2", "input", None, aq)
        y = products.fprop(aq, op2, out_dtype=x.dtype)  # [T, F] @ [F, H]
        ctx.save_for_backward(x2d, rstd, h, *_pack(xq), *_pack(aq), gamma, w1, w2, op1.amax, op2.amax)
        ctx.options, ctx.shape = options, x.shape
        ctx.casts = ((op1.increment, op1.cached), (op2.increment, op2.cached))  # a kept payload is named here, not copied
        ctx.weights = (w1, w2)  # the parameters themselves: saved tensors do not carry main_grad
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        options: Options = ctx.options
        recipe = options.recipe
        x2d, rstd, h, *rest = ctx.saved_tensors
        xq, aq = _unpack(rest[0:3]), _unpack(rest[3:6])
        gamma, w1, w2, amax1, amax2 = rest[6:]
        op1, op2 = (products.Weight(w.detach(), recipe, amax, *cast) for w, amax, cast in zip((w1, w2), (amax1, amax2), ctx.casts, strict=True))
        fold = None if recipe.grad_granularity == "row" else "row"

        dy2d = dy.reshape(-1, dy.shape[-1]).contiguous()
        dyq = products.quantize_grad(dy2d, recipe)
        if options.observer is not None:
            options.observer("linear_fc2", "grad", dy2d, dyq)
        del dy2d
        da = products.dgrad(dyq, op2, out_dtype=dy.dtype)  # [T, H] @ [H, F]
        dw2 = _weight_gradient(dyq, aq, ctx.weights[1], options)
        del dyq, aq
        dhq = ops.swiglu_backward_quantize(da, h, recipe.grad_granularity, recipe.grad_format, fold=fold)
        if options.observer is not None:
            options.observer("linear_fc1", "grad", None, dhq)
        del da, h
        dn = products.dgrad(dhq, op1, out_dtype=dy.dtype)  # [T, 2F] @ [2F, H]
        dw1 = _weight_gradient(dhq, xq, ctx.weights[0], options)
        dx, dgamma = tex.rmsnorm_bwd(dn, x2d, rstd, gamma, 0, options.zero_centered_gamma)
        return dx.view(ctx.shape), dgamma, dw1, dw2, None


def _weight_gradient(dy: ScaledTensor, x: ScaledTensor, weight: Any, options: Options) -> torch.Tensor:
    """wgrad into main_grad with Megatron's protocol (flag set, TransformerEngine's dummy tensor returned as the gradient), or as an ordinary gradient."""
    if not options.fuse_wgrad:
        return products.wgrad(dy, x, options.recipe, out_dtype=weight.dtype)
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    overwrite = getattr(weight, "overwrite_main_grad", False) or not options.accumulate
    products.wgrad(dy, x, options.recipe, out_dtype=weight.main_grad.dtype, out=weight.main_grad, accumulate=not overwrite)
    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))


def norm_swiglu_mlp(x: torch.Tensor, gamma: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, options: Options) -> torch.Tensor:
    """``swiglu(rmsnorm(x) w1^T) w2^T`` under a folded recipe.

    x: [..., H] bf16 CUDA, gamma: [H], w1: [2F, H] = [gate; up], w2: [H, F]. Raises ValueError for dimensions that are not multiples of 16 and for recipes
    without a fold.
    """
    if not options.recipe.folded:
        raise ValueError(f"recipe {options.recipe.name!r} has no fold; the fused MLP needs row scales. Use the separate modules")
    if w1.shape[0] != 2 * w2.shape[1] or w1.shape[1] != x.shape[-1] or w2.shape[0] != x.shape[-1]:
        raise ValueError(f"w1 {tuple(w1.shape)} must be [2F, H] and w2 {tuple(w2.shape)} [H, F] for x with H = {x.shape[-1]}")
    return _NormSwiGLU.apply(x, gamma, w1, w2, options)
