"""A linear layer whose three products run in FP8: what is saved, in which precision, and which product gets which fold.

    y  = x w^T      fprop: x quantised once, folded to rows; w under its tensor scale
    dx = dy w       dgrad: dy quantised once, folded to rows; w under the same scale, payload transposed
    dw = dy^T x     wgrad: the two payloads above, folded to column blocks and transposed

Saved for backward: the payload and scales of x (1 byte per value) and references to the weight and its maximum. No bf16 copy of x, no transposed
copy of anything.
The FP8 tensors stay inside the autograd function: what flows between layers is bf16 (or fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..recipe import Recipe, RecipeError, from_name
from ..tensor import ScaledTensor
from ..weight_scaling import ATTRIBUTE, PredictedScale, WeightScaling
from . import products

Observer = Callable[[str, torch.Tensor, ScaledTensor], None]
"""``observer(role, x, q)`` with role "activation", "weight" or "grad": sees each tensor beside its quantised form. See `fp8_recipes.monitor`."""


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    recipe: Recipe,
    predicted: PredictedScale | None = None,
    observer: Observer | None = None,
) -> torch.Tensor:
    """``y = x w^T + bias`` with all three products quantised as `recipe` says.

    x: [..., K] bf16, fp16 or fp32; weight: [N, K]; bias: [N] or None. Returns [..., N] in x's dtype (under autocast: autocast's).
    predicted: the weight's `PredictedScale`; None looks for it on the weight (`WeightScaling.track`). A weight that has none is measured at each use.
    observer: sees every tensor beside its quantised form; with activation checkpointing the recomputed forward is seen again.
    The gradient of a weight that has ``main_grad`` is added there and ``weight.grad`` stays None. No tokens: y is empty, all gradients are zero.
    Raises ValueError on shapes that do not fit and, on CUDA, on extents that are not multiples of 16; TypeError on other dtypes.
    """
    _check_inputs(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not recipe.quantize:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    check_recipe(recipe)
    if recipe.folded:
        products.check_alignment(x.device, tokens=x.shape[:-1].numel(), in_features=weight.shape[1], out_features=weight.shape[0])
    return _Fp8Linear.apply(x, weight, bias, recipe, predicted, observer)


def check_recipe(recipe: Recipe) -> None:
    """RecipeError if plain torch, without TransformerEngine and Megatron, cannot run ``recipe``."""
    theirs = ([f"stock={recipe.stock}"] if recipe.stock else []) + ([f"attention={recipe.attention}"] if recipe.attention != "bf16" else [])
    if theirs:
        raise RecipeError(
            f"recipe {recipe.name!r}: {' and '.join(theirs)} {'are' if len(theirs) > 1 else 'is'} TransformerEngine's and Megatron's to run; "
            "in plain torch use a recipe of this package with attention=bf16, for example moss"
        )
    if recipe.weight_cache != "none":
        raise RecipeError(
            f"recipe {recipe.name!r}: weight_cache={recipe.weight_cache} needs to know where a step begins, which a plain Linear does not; "
            "use weight_cache=none"
        )


def _check_inputs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-D [out_features, in_features], got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} must end in the weight's in_features {weight.shape[1]} (weight {tuple(weight.shape)})")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}; move both to one device")
    if bias is not None and bias.device != weight.device:
        raise ValueError(f"the bias is on {bias.device} and the weight on {weight.device}; move both to one device")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {t.dtype}; cast it with .to(torch.bfloat16)")


class _Fp8Linear(torch.autograd.Function):
    """See `fp8_linear`. Every tensor named T-something has its leading dimensions flattened to T tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe,
        predicted: PredictedScale | None,
        observer: Observer | None,
    ) -> torch.Tensor:
        ctx.recipe, ctx.observer, ctx.x_shape, ctx.dtype = recipe, observer, x.shape, x.dtype
        ctx.parameter = weight  # main_grad is an attribute of this very object; a saved tensor may come back as another one (checkpointing)
        ctx.bias_dtype = None if bias is None else bias.dtype
        y_shape = (*x.shape[:-1], weight.shape[0])
        if x.numel() == 0:
            return x.new_zeros(y_shape)
        x_TK = x.detach().reshape(-1, x.shape[-1]).contiguous()
        ctx.operand = products.weight_operand(weight, recipe, predicted)
        xq = products.quantize_activation(x_TK, recipe)
        if observer is not None:
            observer("activation", x_TK, xq)
            observer("weight", weight.detach(), ctx.operand.row())
        y_TN = products.fprop(xq, ctx.operand, bias=None if bias is None else bias.detach(), out_dtype=x.dtype)
        ctx.granularity = xq.granularity
        # The operand reads the weight again in backward: saving it makes autograd refuse a weight that was changed in between.
        ctx.save_for_backward(weight, xq.payload, xq.scale, xq.tile_exponent, xq.global_scale)
        return y_TN.view(y_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if 0 in ctx.x_shape:
            return (*_zero_gradients(ctx, dy), None, None, None)
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        _, payload, scale, tile_exponent, global_scale = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = dw = dbias = None
        if need_x or need_w:
            dyq = products.quantize_grad(dy_TN, ctx.recipe)
            if ctx.observer is not None:
                ctx.observer("grad", dy_TN, dyq)
        if need_x:
            dx = products.dgrad(dyq, ctx.operand, out_dtype=ctx.dtype).view(ctx.x_shape)
        if need_w:
            dw = _weight_gradient(dyq, ScaledTensor(payload, scale, ctx.granularity, tile_exponent, global_scale), ctx)
        if need_bias:
            dbias = dy_TN.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, dbias, None, None, None


def _weight_gradient(dyq: ScaledTensor, xq: ScaledTensor, ctx: Any) -> torch.Tensor | None:
    """dw [N, K] in the weight's dtype; or None after adding it to ``weight.main_grad`` in the product's epilogue."""
    main_grad = getattr(ctx.parameter, "main_grad", None)
    if main_grad is None:
        return products.wgrad(dyq, xq, ctx.recipe, out_dtype=ctx.parameter.dtype)
    products.wgrad(dyq, xq, ctx.recipe, out=main_grad, accumulate=True)
    return None


def _zero_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw, dbias) of a batch without tokens. main_grad gets nothing added."""
    weight = ctx.parameter
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    dw = torch.zeros_like(weight) if need_w and getattr(weight, "main_grad", None) is None else None
    dbias = dy.new_zeros(weight.shape[0], dtype=ctx.bias_dtype) if need_bias else None
    return dy.new_zeros(ctx.x_shape, dtype=ctx.dtype) if need_x else None, dw, dbias


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` whose products run in FP8 as `recipe` (a `Recipe` or a name such as "moss:grad=e5m2") says. Same parameters, same state dict.

    Under ``weight_scale=predicted`` the weight must be tracked by the optimizer's `WeightScaling`; untracked, its maximum is measured at every use and the
    printed module says so. observer: None, or an `Observer` of every quantised tensor.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, recipe: Recipe | str, device: Any = None, dtype: Any = None) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = from_name(recipe) if isinstance(recipe, str) else recipe
        self.observer: Observer | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight, self.bias, recipe=self.recipe, observer=self.observer)

    def extra_repr(self) -> str:
        untracked = self.recipe.weight_scale == "predicted" and not hasattr(self.weight, ATTRIBUTE)
        note = ", weight_scale=measured (weight not tracked)" if untracked else ""
        return f"{super().extra_repr()}, recipe={self.recipe.name}{note}"


def convert(
    model: torch.nn.Module,
    recipe: Recipe | str,
    skip: Callable[[str, torch.nn.Linear], bool] | None = None,
    scaling: WeightScaling | None = None,
) -> torch.nn.Module:
    """Replace every `torch.nn.Linear` inside `model` by a `Linear` of `recipe` that owns the same parameters. Changes `model`, returns it.

    skip: ``skip(name, module)`` true leaves that layer as it is (embeddings' twin heads, widths that are not multiples of 16).
    scaling: puts each converted weight under automatic scaling, where the recipe predicts scales; the caller attaches the optimizer.
    Subclasses of `torch.nn.Linear` are left alone. Raises RecipeError if plain torch cannot run the recipe, ValueError if nothing was converted.
    """
    recipe = from_name(recipe) if isinstance(recipe, str) else recipe
    check_recipe(recipe)
    chosen = [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear and not (skip is not None and skip(n, m))]
    if not chosen:
        raise ValueError(f"{type(model).__name__} holds no torch.nn.Linear to convert to recipe {recipe.name!r}, or skip rejected every one")
    for name, old in chosen:
        new = Linear(old.in_features, old.out_features, bias=False, recipe=recipe, device="meta")
        new.weight, new.bias = old.weight, old.bias
        new.train(old.training)
        if scaling is not None and recipe.quantize and recipe.weight_scale == "predicted":
            scaling.track(cast(torch.nn.Parameter, old.weight))
        if name == "":
            return new
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model
