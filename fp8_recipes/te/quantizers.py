"""TransformerEngine's quantizer and storage classes over `nn.products`. They carry tensors; they compute nothing.

Two storages, because the two kinds of operand live differently:

* `QuantizedActivation` (x, dy) holds one payload with row scales. TransformerEngine asks for a column-wise form before wgrad; that form is folded and
transposed inside the
  product and never stored, so `update_usage` has nothing to do and one byte per value is all that backward keeps.
* `QuantizedWeight` holds the bf16 parameter and the scale it is cast under. Payloads are made when a product asks; where the module caches the storage over
  microbatches, the recipe's ``weight_cache`` keeps the row-major one in it.

A storage cached over microbatches survives `prepare_for_saving`: the copy that is saved is emptied, never the original.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformer_engine.common.recipe import CustomRecipe
from transformer_engine.pytorch import QuantizedTensorStorage, Quantizer

from .. import ops
from ..nn import products
from ..recipe import Recipe
from ..tensor import ScaledTensor
from ..weight_scaling import ATTRIBUTE

FFN_WEIGHT = "fp8_ffn_weight"
"""Set on the weights of FFNs by whoever knows them (`megatron.mlp`): ``weight_cache=ffn`` keeps theirs where they run as separate modules."""


class _Storage(QuantizedTensorStorage):
    """What TransformerEngine expects of every storage."""

    custom = True

    def __init__(self, quantizer: FP8Quantizer, shape: torch.Size, dtype: torch.dtype) -> None:
        self._quantizer = quantizer
        self.original_shape = shape
        self.dtype = self._dtype = dtype

    def size(self, *dim: int) -> Any:
        return self.original_shape[dim[0]] if dim else self.original_shape

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Nothing: either form is made from what is held when a product asks for it."""

    def get_usages(self) -> dict[str, bool]:
        return {"rowwise": True, "columnwise": True}


class QuantizedActivation(_Storage):
    """x or dy: a `ScaledTensor` [tokens, features]."""

    def __init__(self, q: ScaledTensor | None, quantizer: FP8Quantizer, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__(quantizer, shape, dtype)
        self.q = q

    @property
    def device(self) -> torch.device:
        return self.operand().device

    def operand(self) -> ScaledTensor:
        if self.q is None:
            raise RuntimeError("this FP8 activation was released already: TransformerEngine cleared it and then asked for it")
        return self.q

    def release(self) -> ScaledTensor:
        """`operand`, given up: nothing asks for dy after wgrad, and its payload is freed there as soon as the transposed form exists."""
        q, self.q = self.operand(), None
        return q

    def prepare_for_saving(self) -> tuple[list[torch.Tensor | None], QuantizedActivation]:
        q, saved = self.operand(), copy.copy(self)
        saved.q, saved._granularity = None, q.granularity  # type: ignore[attr-defined]
        return [q.payload, q.scale, q.tile_exponent, q.global_scale], saved

    def restore_from_saved(self, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        payload, scale, tile_exponent, global_scale, *rest = tensors
        assert payload is not None and scale is not None
        self.q = ScaledTensor(payload, scale, self._granularity, tile_exponent, global_scale)  # type: ignore[attr-defined]
        return rest

    def get_data_tensors(self) -> tuple[torch.Tensor, ...]:
        return () if self.q is None else (self.q.payload, self.q.scale)

    def clear(self) -> None:
        self.q = None

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        return ops.dequantize(self.operand(), dtype or self.dtype).view(self.original_shape)


class QuantizedWeight(_Storage):
    """A weight and its scale: a `products.Weight`."""

    def __init__(self, weight: products.Weight | None, quantizer: FP8Quantizer, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__(quantizer, shape, dtype)
        self.operand = weight

    @property
    def device(self) -> torch.device:
        assert self.operand is not None
        return self.operand.weight.device

    def prepare_for_saving(self) -> tuple[list[torch.Tensor | None], QuantizedWeight]:
        assert self.operand is not None
        operand, saved = self.operand, copy.copy(self)
        saved.operand, saved._increment, saved._cached = None, operand.increment, operand.cached  # type: ignore[attr-defined]
        return [operand.weight, operand.amax], saved

    def restore_from_saved(self, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        weight, amax, *rest = tensors
        assert weight is not None
        self.operand = products.Weight(weight, self._quantizer.recipe, amax, self._increment, self._cached)  # type: ignore[attr-defined]
        return rest

    def get_data_tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def clear(self) -> None:
        """Nothing to release: the parameter is not ours, payloads are transient."""

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert self.operand is not None
        return ops.dequantize(self.operand.row(), dtype or self.dtype).view(self.original_shape)


class FP8Quantizer(Quantizer):
    """Quantises one role ("input", "weight" or "grad_output") of a linear module by a `Recipe`. Stateless and deterministic: the same tensor gives the same
    bits."""

    custom = True

    def __init__(self, recipe: Recipe, tensor_type: str) -> None:
        super().__init__(rowwise=True, columnwise=True)
        self.internal = True
        self.recipe = recipe
        self.tensor_type = tensor_type
        self.needs_bias_gradient = False
        """Set by the shims on LayerNormMLP's quantizers: does the layer add a bias before its activation?"""
        self.observer: Callable[[str, torch.Tensor | None, ScaledTensor], None] | None = None
        """``observer(tensor_type, x, q)`` sees every input and output gradient beside its quantised form; x is None where a fused kernel made q
        (`te.observe`)."""

    def copy(self) -> FP8Quantizer:
        return copy.copy(self)

    def is_requantization_safe(self) -> bool:
        return True

    def _get_compatible_recipe(self) -> type[CustomRecipe]:
        return CustomRecipe

    def quantize(self, tensor: Any, *, out: Any = None, dtype: torch.dtype | None = None) -> Any:
        """bf16 tensor [..., features] -> storage. A storage (from the fused SwiGLU) passes through."""
        if isinstance(tensor, _Storage):
            return tensor
        if out is not None:
            return self.update_quantized(tensor, out)
        if self.tensor_type == "weight":
            if self.recipe.weight_scale == "predicted" and not hasattr(tensor, ATTRIBUTE):
                warnings.warn(
                    f"recipe {self.recipe.name}: this weight is not under automatic scaling, so its maximum is measured at every use; "
                    "call fp8_recipes.te.automatic_scaling(model, optimizer) once, or choose weight_scale=measured",
                    stacklevel=2,
                )
            cached = not self.internal  # TransformerEngine says so for the storage that its module will keep, and for no other
            operand = products.weight_operand(tensor, self.recipe, keep=cached and self._keeps(tensor))
            return QuantizedWeight(operand, self, tensor.shape, dtype or tensor.dtype)
        if tensor.numel() == 0:
            raise ValueError(f"no tokens: a tensor of shape {tuple(tensor.shape)} has no scale. Skip the layer, or run it outside te.autocast")
        x = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
        cast = products.quantize_grad if self.tensor_type == "grad_output" else products.quantize_activation
        products.check_alignment(x.device, tokens=x.shape[0], features=x.shape[1])
        q = cast(x, self.recipe)
        if self.observer is not None:
            self.observer(self.tensor_type, x, q)
        return QuantizedActivation(q, self, tensor.shape, dtype or tensor.dtype)

    def update_quantized(self, src: torch.Tensor, dst: Any, *, noop_flag: torch.Tensor | None = None) -> Any:
        """Refresh a cached weight at the first microbatch of a step."""
        if noop_flag is not None:
            raise RuntimeError(
                "fp8_recipes does not support skipping the weight update by a device flag (CUDA graphs with weight caching); "
                "capture without FP8 weight caching, or turn CUDA graphs off"
            )
        if not isinstance(dst, QuantizedWeight):
            raise TypeError(f"only weights are updated in place, got {type(dst).__name__}")
        dst.operand = products.weight_operand(src, self.recipe, keep=self._keeps(src))
        return dst

    def _keeps(self, weight: torch.Tensor) -> bool:
        """Does ``weight_cache`` keep the payload of this weight?"""
        return self.recipe.weight_cache == "row" or (self.recipe.weight_cache == "ffn" and hasattr(weight, FFN_WEIGHT))

    def swiglu(self, h: torch.Tensor) -> QuantizedActivation:
        """silu(gate) * up of ``h`` [..., 2F], quantised in the same kernel."""
        h2d = h.detach().reshape(-1, h.shape[-1])
        products.check_alignment(h.device, tokens=h2d.shape[0], features=h2d.shape[1] // 2)
        r, fold = self.recipe, None if self.recipe.activation_granularity == "row" else "row"
        q = ops.swiglu_quantize(h2d, r.activation_granularity, r.activation_format, fold=fold)
        return QuantizedActivation(q, self, torch.Size((*h.shape[:-1], q.shape[1])), h.dtype)

    def swiglu_backward(self, dy: torch.Tensor, h: torch.Tensor) -> QuantizedActivation:
        """Gradient of `swiglu` [..., 2F], quantised in the same kernel."""
        r, fold = self.recipe, None if self.recipe.grad_granularity == "row" else "row"
        q = ops.swiglu_backward_quantize(dy.reshape(-1, dy.shape[-1]), h.reshape(-1, h.shape[-1]), r.grad_granularity, r.grad_format, fold=fold)
        if self.observer is not None:
            self.observer(self.tensor_type, None, q)
        return QuantizedActivation(q, self, h.shape, dy.dtype)
