"""The FFN without a gate (GeLU, xIELU; FOG's) as one autograd function under Megatron's protocol of gradients: `fp8_recipes.nn.mlp` with TransformerEngine's
parameters, as `mlp` is for SwiGLU.

    forward    x -[quantise]-> FP8 -fc1-> h bf16 -[activation + quantise]-> FP8 -fc2-> y
    backward   dy -[quantise]-> FP8 -fc2 dgrad-> bf16 -[activation' + quantise]-> FP8 -fc1 dgrad-> dx            wgrads from the saved payloads

Saved for backward, per token: the payload of x (H bytes), h bf16 (2F), the payload of the activation (F).
"""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..nn import products
from .mlp import Options, _pack, _unpack, _weight_gradient, weight_operands


class _Ungated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, alpha: torch.Tensor | None, options: Options) -> torch.Tensor:
        recipe = options.recipe
        choices = (recipe.activation_granularity, recipe.activation_format)
        fold = None if recipe.activation_granularity == "row" else "row"
        x2d = x.reshape(-1, x.shape[-1]).contiguous()
        products.check_alignment(x.device, tokens=x2d.shape[0], hidden=x2d.shape[1], ffn=w2.shape[1])
        op1, op2 = weight_operands((w1, w2), options)
        xq = products.quantize_activation(x2d, recipe)
        h = products.fprop(xq, op1, out_dtype=x.dtype)  # [T, H] @ [H, F]
        aq = ops.gelu_quantize(h, *choices, fold=fold) if alpha is None else ops.xielu_quantize(h, alpha, *choices, fold=fold)
        if options.observer is not None:
            options.observer("linear_fc1", "input", x2d, xq)
            options.observer("linear_fc2", "input", None, aq)
        y = products.fprop(aq, op2, out_dtype=x.dtype)  # [T, F] @ [F, H]
        ctx.save_for_backward(h, alpha, *_pack(xq), *_pack(aq), w1, w2, op1.amax, op2.amax)
        ctx.options, ctx.shape = options, x.shape
        ctx.casts = ((op1.increment, op1.cached), (op2.increment, op2.cached))  # a kept payload is named here, not copied
        ctx.weights = (w1, w2)  # the parameters themselves: saved tensors do not carry main_grad
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        options: Options = ctx.options
        recipe = options.recipe
        h, alpha, *rest = ctx.saved_tensors
        xq, aq = _unpack(rest[0:3]), _unpack(rest[3:6])
        w1, w2, amax1, amax2 = rest[6:]
        op1, op2 = (products.Weight(w.detach(), recipe, amax, *cast) for w, amax, cast in zip((w1, w2), (amax1, amax2), ctx.casts, strict=True))
        choices = (recipe.grad_granularity, recipe.grad_format)
        fold = None if recipe.grad_granularity == "row" else "row"

        dy2d = dy.reshape(-1, dy.shape[-1]).contiguous()
        dyq = products.quantize_grad(dy2d, recipe)
        if options.observer is not None:
            options.observer("linear_fc2", "grad", dy2d, dyq)
        del dy2d
        da = products.dgrad(dyq, op2, out_dtype=dy.dtype)  # [T, H] @ [H, F]
        dw2 = _weight_gradient(dyq, aq, ctx.weights[1], options)
        del dyq, aq, rest
        dalpha = None
        if alpha is None:
            dhq = ops.gelu_backward_quantize(da, h, *choices, fold=fold).h
        else:
            gradients = ops.xielu_backward_quantize(da, h, alpha, *choices, fold=fold)
            dhq, dalpha = gradients.h, gradients.alpha
        if options.observer is not None:
            options.observer("linear_fc1", "grad", None, dhq)
        del da, h
        dx = products.dgrad(dhq, op1, out_dtype=dy.dtype)  # [T, F] @ [F, H]
        dw1 = _weight_gradient(dhq, xq, ctx.weights[0], options)
        return dx.view(ctx.shape), dw1, dw2, dalpha, None


def ungated_mlp(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, alpha: torch.Tensor | None, options: Options) -> torch.Tensor:
    """``activation(x w1^T) w2^T`` under a folded recipe.

    x: [..., H] bf16 CUDA, w1: [F, H], w2: [H, F]. alpha: fp32 [2], effective alphas of xIELU, or None for GeLU; its gradient is returned. Raises ValueError for
    dimensions that are not multiples of 16, shapes that do not fit, and recipes without a fold.
    """
    if not options.recipe.folded:
        raise ValueError(f"recipe {options.recipe.name!r} has no fold; the fused MLP needs row scales. Use the separate modules")
    if w1.shape != w2.shape[::-1] or w1.shape[1] != x.shape[-1]:
        raise ValueError(f"w1 {tuple(w1.shape)} must be [F, H] and w2 {tuple(w2.shape)} [H, F] for x with H = {x.shape[-1]}")
    return _Ungated.apply(x, w1, w2, alpha, options)
