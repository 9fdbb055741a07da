"""The FFN without a gate (GeLU, xIELU) as one autograd function: between its two products nothing exists in bf16 except what the products write.

    forward    x -[quantise]-> FP8 -up-> h bf16 -[activation + quantise]-> FP8 -down-> y
    backward   dy -[quantise]-> FP8 -down dgrad-> bf16 -[activation' + quantise]-> FP8 -up dgrad-> dx           wgrads from the saved payloads

FOG has no norm in front of the FFN, so x is the residual stream itself. Saved for backward, per token: the payload of x (H bytes), h bf16 (2F), the payload of
the activation (F). Separate modules keep as much, and move 16F bytes where this moves 8F: activation and gradient are written in bf16 and read again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import ops
from ..recipe import Recipe, RecipeError
from ..reference.gelu import gelu, gelu_backward
from ..reference.xielu import xielu, xielu_backward
from ..tensor import ScaledTensor
from . import products
from .linear import Linear, Observer


def can_fuse(up: torch.nn.Module, down: torch.nn.Module) -> bool:
    """Are these two layers FP8 `Linear` layers of one recipe (and one observer) that `fp8_mlp` takes?"""
    if not (isinstance(up, Linear) and isinstance(down, Linear) and up.bias is None and down.bias is None):
        return False
    if up.recipe != down.recipe or up.observer != down.observer:
        return False
    return up.recipe.quantize and up.recipe.folded and up.recipe.weight_cache == "none"


def fp8_mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    alpha: torch.Tensor | None = None,
    *,
    recipe: Recipe,
    observer: Observer | None = None,
) -> torch.Tensor:
    """``activation(x up^T) down^T`` with all six products quantised as `recipe`, which must fold to rows, says.

    x: [..., H] bf16, fp16 or fp32; up: [F, H]; down: [H', F]. alpha: fp32 [2] = effective alphas of xIELU (`XIELU.alpha`), or None for GeLU.
    Weight scales as in `fp8_linear`; a weight with ``main_grad`` has its gradient added there. observer: sees every tensor beside its quantised form.
    Raises ValueError on shapes that do not fit and, on CUDA, on extents that are not multiples of 16.
    """
    if up.dim() != 2 or down.dim() != 2 or x.shape[-1] != up.shape[1] or down.shape[1] != up.shape[0]:
        raise ValueError(f"x {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} must be [..., H], [F, H] and [H', F]")
    if not (recipe.quantize and recipe.folded and recipe.weight_cache == "none"):
        raise RecipeError(f"recipe {recipe.name!r}: the fused FFN needs quantize=true, fold=row and weight_cache=none; use separate Linear layers")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    products.check_alignment(x.device, tokens=x.shape[:-1].numel(), hidden=up.shape[1], ffn=up.shape[0], out_features=down.shape[0])
    return _Fp8Mlp.apply(x, up, down, alpha, recipe, observer)


class _Fp8Mlp(torch.autograd.Function):
    """See `fp8_mlp`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        alpha: torch.Tensor | None,
        recipe: Recipe,
        observer: Observer | None,
    ) -> torch.Tensor:
        ctx.recipe, ctx.observer, ctx.x_shape, ctx.dtype = recipe, observer, x.shape, x.dtype
        ctx.weights = (up, down)  # main_grad is an attribute of these very objects; saved tensors may come back as others (checkpointing)
        y_shape = (*x.shape[:-1], down.shape[0])
        if x.numel() == 0:
            ctx.save_for_backward(alpha)
            return x.new_zeros(y_shape)
        x_TH = x.detach().reshape(-1, x.shape[-1]).contiguous()
        ctx.operands = products.weight_operand(up, recipe), products.weight_operand(down, recipe)
        options = (recipe.activation_granularity, recipe.activation_format)
        fold = None if recipe.activation_granularity == "row" else "row"
        xq = products.quantize_activation(x_TH, recipe)
        h_TF = products.fprop(xq, ctx.operands[0], out_dtype=x.dtype)
        aq = ops.gelu_quantize(h_TF, *options, fold=fold) if alpha is None else ops.xielu_quantize(h_TF, alpha, *options, fold=fold)
        if observer is not None:
            observer("activation", x_TH, xq)
            observer("activation", gelu(h_TF) if alpha is None else xielu(h_TF, alpha), aq)
            for weight, operand in zip(ctx.weights, ctx.operands, strict=True):
                observer("weight", weight.detach(), operand.row())
        y_TH = products.fprop(aq, ctx.operands[1], out_dtype=x.dtype)
        saved = (t for q in (xq, aq) for t in (q.payload, q.scale, q.tile_exponent))
        ctx.save_for_backward(alpha, up, down, h_TF, *saved)  # the weights, so that autograd refuses one that was changed in between
        return y_TH.view(y_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if 0 in ctx.x_shape:
            return (*_zero_gradients(ctx, dy), None, None)
        alpha, _, _, h_TF, *rest = ctx.saved_tensors
        xq, aq = (ScaledTensor(payload, scale, "row", tile_exponent) for payload, scale, tile_exponent in (rest[:3], rest[3:]))
        recipe, observer = ctx.recipe, ctx.observer
        need_x, need_up, need_down, need_alpha = ctx.needs_input_grad[:4]
        dx = dup = ddown = dalpha = None
        dy_TH = dy.reshape(-1, dy.shape[-1]).contiguous()
        dyq = products.quantize_grad(dy_TH, recipe)
        if observer is not None:
            observer("grad", dy_TH, dyq)
        if need_down:
            ddown = _weight_gradient(dyq, aq, ctx.weights[1], recipe)
        del aq, rest
        if need_x or need_up or need_alpha:
            da_TF = products.dgrad(dyq, ctx.operands[1], out_dtype=ctx.dtype)
            del dyq
            dhq, dalpha = _activation_gradient(da_TF, h_TF, alpha, recipe)
            if observer is not None:
                observer("grad", gelu_backward(da_TF, h_TF) if alpha is None else xielu_backward(da_TF, h_TF, alpha), dhq)
            del da_TF
            if need_x:
                dx = products.dgrad(dhq, ctx.operands[0], out_dtype=ctx.dtype).view(ctx.x_shape)
            if need_up:
                dup = _weight_gradient(dhq, xq, ctx.weights[0], recipe)
        return dx, dup, ddown, dalpha if need_alpha else None, None, None


def _activation_gradient(da: torch.Tensor, h: torch.Tensor, alpha: torch.Tensor | None, recipe: Recipe) -> tuple[ScaledTensor, torch.Tensor | None]:
    """(quantised dh, dalpha)."""
    options = (recipe.grad_granularity, recipe.grad_format)
    fold = None if recipe.grad_granularity == "row" else "row"
    if alpha is None:
        return ops.gelu_backward_quantize(da, h, *options, fold=fold).h, None
    gradients = ops.xielu_backward_quantize(da, h, alpha, *options, fold=fold)
    return gradients.h, gradients.alpha


def _weight_gradient(dy: ScaledTensor, x: ScaledTensor, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor | None:
    """In the weight's dtype; or None after adding it to ``weight.main_grad`` in the product's epilogue."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return products.wgrad(dy, x, recipe, out_dtype=weight.dtype)
    products.wgrad(dy, x, recipe, out=main_grad, accumulate=True)
    return None


def _zero_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """(dx, dup, ddown, dalpha) of a batch without tokens. main_grad gets nothing added."""
    need_x, *need_weights, need_alpha = ctx.needs_input_grad[:4]
    weights = (
        torch.zeros_like(w) if need and getattr(w, "main_grad", None) is None else None for w, need in zip(ctx.weights, need_weights, strict=True)
    )
    dx = dy.new_zeros(ctx.x_shape, dtype=ctx.dtype) if need_x else None
    return dx, *weights, torch.zeros_like(ctx.saved_tensors[0]) if need_alpha else None
