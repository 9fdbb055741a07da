"""The three products of a linear layer under a recipe: which operand is quantised how, and which fold each product takes.

    fprop   y[T, N]  = x[T, K] w[N, K]^T      rows of x and one scale of w
    dgrad   dx[T, K] = dy[T, N] w^T[K, N]^T   rows of dy and one scale of w
    wgrad   dw[N, K] = dy^T[N, T] x^T[K, T]^T column blocks of dy and x: the transposed folds, made here and dropped after the product

x and dy are quantised once each; the payload of x made for fprop is what backward keeps. `nn.linear` and `te` both stand on these functions and add no
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import ops
from ..recipe import Recipe
from ..tensor import ScaledTensor
from ..weight_scaling import ATTRIBUTE, PredictedScale, measure_amax

ALIGNMENT = 16
"""FP8 operands of Hopper's matrix units start every row on 16 bytes: all of T, K and N must be multiples of this on a GPU."""
_KEPT = "fp8_kept_operand"
"""A parameter whose payload is kept over the microbatches of a step carries its `_Kept` under this name."""


def check_alignment(device: torch.device, **dims: int) -> None:
    """Raise unless every named dimension is a multiple of 16 (CUDA only)."""
    if device.type != "cuda":
        return
    for name, value in dims.items():
        if value % ALIGNMENT:
            raise ValueError(
                f"FP8 products need {name} to be a multiple of {ALIGNMENT}, got {value}; "
                "pad it (tokens: sequence length x micro batch), or leave this layer in bf16"
            )


def _quantize(x: torch.Tensor, granularity: str, fmt_name: str, recipe: Recipe) -> ScaledTensor:
    fmt = getattr(recipe, f"{fmt_name}_format")
    fold = "row" if recipe.folded and granularity != "row" else None
    measured = "measured" if granularity == "micro" and recipe.global_scale == "measured" else None
    return ops.quantize(x, granularity, fmt, fold=fold, global_scale=measured)


def quantize_activation(x: torch.Tensor, recipe: Recipe) -> ScaledTensor:
    """x: [T, K] bf16 -> the payload that fprop reads and backward keeps."""
    return _quantize(x, recipe.activation_granularity, "activation", recipe)


def quantize_grad(dy: torch.Tensor, recipe: Recipe) -> ScaledTensor:
    """dy: [T, N] bf16 -> the payload that dgrad and wgrad read."""
    return _quantize(dy, recipe.grad_granularity, "grad", recipe)


@dataclass
class Weight:
    """A weight as an operand: the bf16 parameter and the scale under which it is cast whenever a product needs it.

    weight: [N, K]. amax: 0-dim fp32, increment: float; both fixed when the operand is made, so fprop and dgrad see one scale.
    cached: row-major payload, held by operands that serve several microbatches (keep); dgrad's payload is then its transpose, not another cast.
    """

    weight: torch.Tensor
    recipe: Recipe
    amax: torch.Tensor | None
    increment: float = 0.0
    cached: ScaledTensor | None = None
    keep: bool = False

    def row(self) -> ScaledTensor:
        """[N, K] payload for fprop."""
        if self.cached is not None:
            return self.cached
        if self.recipe.weight_granularity == "block":
            q = ops.quantize(self.weight, "block", self.recipe.weight_format)
        else:
            q = ops.quantize_weight(self.weight, self.amax, self.increment, self.recipe.weight_format)
        if self.keep:
            self.cached = q
        return q

    def transposed(self) -> ScaledTensor:
        """[K, N] payload for dgrad, of the same values as `row`. Never held: one byte per parameter while dgrad runs."""
        if self.recipe.weight_granularity == "block":
            q = self.row()
            return ScaledTensor(q.payload.t().contiguous(), q.scale.t().contiguous(), "block")
        if self.cached is not None:
            q = ops.fold_transpose(self.cached)  # 1 byte read and 1 written, where a cast reads 2
            return ScaledTensor(q.payload, q.scale[0], "tensor", row_scale=q.scale)
        return ops.quantize_weight(self.weight, self.amax, self.increment, self.recipe.weight_format, transpose=True)


def weight_operand(weight: torch.Tensor, recipe: Recipe, predicted: PredictedScale | None = None, *, keep: bool = False) -> Weight:
    """Fix the scale of ``weight`` [N, K] for one forward and backward: predicted if the parameter is under automatic scaling, else measured now.

    keep: the operand holds on to its row payload; for callers that use it until the weight changes (`kept_operand`, TransformerEngine's cached weights).
    """
    data = weight.detach()
    if recipe.weight_granularity == "block":
        return Weight(data, recipe, None, keep=keep)
    predicted = predicted or getattr(weight, ATTRIBUTE, None)
    if recipe.weight_scale == "predicted" and predicted is not None:
        amax, increment = predicted.amax_and_increment(data)
        return Weight(data, recipe, amax, increment, keep=keep)
    return Weight(data, recipe, measure_amax(data), keep=keep)


@dataclass(frozen=True)
class _Kept:
    """An operand and the state of its parameter when it was made."""

    operand: Weight
    state: tuple[Any, ...]


def kept_operand(weight: torch.Tensor, recipe: Recipe, *, first: bool) -> Weight:
    """`weight_operand`, and with it the row payload, kept beside the parameter over the microbatches of a step.

    first: is this the first microbatch of a step? The weight is then cast anew. Later ones take what was kept, unless the parameter has changed since by
    anything that can be seen: an optimizer step or a new anchor of its predicted scale, a change in place, other memory. A change that shows nowhere (of a
    weight with a measured scale, through ``.data``, as Megatron's optimizer writes) has to be followed by a call with ``first=True``.
    """
    owner: Any = weight
    kept: _Kept | None = getattr(owner, _KEPT, None)
    state = _state(weight)
    if kept is None or first or kept.state != state or kept.operand.recipe is not recipe:
        kept = None
        setattr(owner, _KEPT, None)  # the old payload is freed before the new one is made
        kept = _Kept(weight_operand(weight, recipe, keep=True), state)
        setattr(owner, _KEPT, kept)
        predicted: PredictedScale | None = getattr(weight, ATTRIBUTE, None)
        if predicted is not None:
            predicted.clock.close_step()  # any optimizer that steps from here on may change this weight, so it has to count
    return kept.operand


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    """Differs from what it was whenever the parameter is known to have changed."""
    memory = (weight.data_ptr(), weight._version)
    predicted: PredictedScale | None = getattr(weight, ATTRIBUTE, None)
    return memory if predicted is None else (*memory, predicted.clock.generation, predicted.clock.steps, predicted.clock.travel)


def fprop(x: ScaledTensor, weight: Weight, *, bias: torch.Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """``y = x w^T + bias`` [T, N]."""
    product = ops.gemm if weight.recipe.folded else ops.gemm_exact
    return product(x, weight.row(), bias=bias, out_dtype=out_dtype)


def dgrad(dy: ScaledTensor, weight: Weight, *, out_dtype: torch.dtype = torch.bfloat16, promote: int = 0) -> torch.Tensor:
    """``dx = dy w`` [T, K]. promote: longest sum over N in the fast accumulator, 0 = no limit."""
    if not weight.recipe.folded:
        return ops.gemm_exact(dy, weight.transposed(), out_dtype=out_dtype)
    return ops.gemm(dy, weight.transposed(), out_dtype=out_dtype, promote=promote)


def wgrad(
    dy: ScaledTensor,
    x: ScaledTensor,
    recipe: Recipe,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """``dw = dy^T x`` [N, K], written or added into ``out`` (main_grad) if given.

    wgrad is the last reader of both payloads: a caller that keeps no reference lets each be freed as soon as its transposed form exists.
    """
    if recipe.folded and recipe.wgrad_fold != "none":
        a = ops.fold_transpose(dy, recipe.wgrad_fold)  # [N, T]
        del dy
        b = ops.fold_transpose(x, recipe.wgrad_fold)  # [K, T]
        del x
        return ops.gemm(a, b, out_dtype=out_dtype, out=out, accumulate=accumulate, promote=recipe.promote)
    operand = torch.bfloat16 if dy.device.type == "cuda" else torch.float32
    dw = _local(dy, operand).t() @ _local(x, operand)  # [N, T] @ [T, K]
    dw = dw.float()
    for q in (dy, x):
        if q.global_scale is not None:
            dw = dw * q.global_scale
    if out is None:
        return dw.to(out_dtype)
    return out.copy_(out.float() + dw if accumulate else dw)


def _local(q: ScaledTensor, dtype: torch.dtype) -> torch.Tensor:
    """Payload times its power-of-two scales, exact in bf16; an FP32 global scale is left to the result."""
    return ops.dequantize(replace(q, global_scale=None), dtype)
