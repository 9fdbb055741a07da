"""Work-arounds for TransformerEngine, all of them, in one place. Each says what it replaces, why, for which versions, and when it can go.

Tested with 2.20.2. `require_transformer_engine` refuses versions outside [2.20, 2.21) before anything is patched.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

SUPPORTED = ((2, 20), (2, 21))
_INSTALL = "pip install --no-build-isolation 'transformer-engine[core-cu13,pytorch]>=2.20,<2.21'"
_MARK, _WRAPPERS = "_fp8_recipes_original", "_fp8_recipes_wrappers"


@functools.cache
def require_transformer_engine() -> None:
    """ImportError if TransformerEngine is missing, RuntimeError if its version is outside the tested range. Looked up once: reading a package's metadata takes
    longer than many a layer, and Megatron asks for the recipe at every layer."""
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        raise ImportError(f"fp8_recipes.te needs TransformerEngine: {_INSTALL}") from None
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not SUPPORTED[0] <= found < SUPPORTED[1]:
        raise RuntimeError(
            f"TransformerEngine {version} is untested with fp8_recipes (tested: 2.20.2); "
            "install 'transformer-engine>=2.20,<2.21' or run with a stock recipe"
        )


def require_import() -> None:
    """`require_transformer_engine`; and ImportError in one sentence where it is there and does not import, as pip leaves it without its PyTorch extension."""
    require_transformer_engine()
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, AssertionError) as error:
        raise ImportError(
            f"TransformerEngine is installed but does not import ({error}). Its PyTorch extension is a package of its own: {_INSTALL}. "
            "For errors that name cuDNN see docs/megatron.md"
        ) from error


def install() -> None:
    """Apply every shim once."""
    require_import()
    _own_products()
    _bias_gradient()
    _fused_swiglu()
    _scale_of_joined_weights()
    _stateless_checkpoint()
    delayed_maxima()


def replace(module: Any, name: str, wrapper: Any) -> None:
    """Put ``wrapper(original)`` in place of ``module.name`` unless this wrapper was there before; several wrappers of one function stack."""
    original = getattr(module, name)
    key, before = f"{wrapper.__module__}.{wrapper.__qualname__}", getattr(original, _WRAPPERS, ())
    if key in before:
        return
    replacement = functools.wraps(original)(wrapper(original))
    setattr(replacement, _MARK, original)
    setattr(replacement, _WRAPPERS, (*before, key))
    setattr(module, name, replacement)


def _own_products() -> None:
    """``cpp_extensions.gemm.custom_gemm``: products of our storages.

    Upstream's version (2.9 to 2.20) drops ``out`` and ``accumulate``, so that with fused wgrad accumulation main_grad is silently not written, and takes a
    layout "NT" call without ``grad=True`` (LayerNormMLP's fc1 wgrad) for a forward product. Ours takes the product from the layout alone and writes where it
    is told. Calls with foreign storages go to upstream unchanged. Can go when upstream's custom_gemm forwards out, accumulate and layout to ``qgemm``.
    """
    from transformer_engine.pytorch.cpp_extensions import gemm

    from ..nn import products
    from .quantizers import QuantizedActivation, QuantizedWeight

    def wrapper(original: Any) -> Any:
        def custom_gemm(  # noqa: PLR0913 - upstream's signature
            A: Any,
            B: Any,
            workspace: Any,
            out_dtype: Any = None,
            quantization_params: Any = None,
            gelu: bool = False,
            gelu_in: Any = None,
            accumulate: bool = False,
            layout: str = "TN",
            out: Any = None,
            bias: Any = None,
            use_split_accumulator: bool = False,
            grad: bool = False,
        ) -> tuple[Any, None, None, None]:
            ours = (QuantizedActivation, QuantizedWeight)
            if not isinstance(A, ours) and not isinstance(B, ours):
                return original(A, B, workspace, out_dtype, quantization_params, gelu, gelu_in, accumulate, layout, out, bias, use_split_accumulator, grad)
            if gelu or gelu_in is not None:
                raise RuntimeError("fp8_recipes has no GEMM with fused GELU; this is a call that TransformerEngine 2.20 does not make under a custom recipe")
            dtype = out_dtype or B.dtype
            if layout == "NT":  # dw = dy^T x
                y = products.wgrad(B.release(), A.operand(), B._quantizer.recipe, out_dtype=dtype, out=out, accumulate=accumulate)
            elif layout == "TN":  # y = x w^T
                y = _into(products.fprop(B.operand(), A.operand, bias=bias, out_dtype=dtype), out, accumulate)
            else:  # "NN": dx = dy w
                y = _into(products.dgrad(B.operand(), A.operand, out_dtype=dtype), out, accumulate)
            return y, None, None, None

        return custom_gemm

    replace(gemm, "custom_gemm", wrapper)


def _into(y: Any, out: Any, accumulate: bool) -> Any:
    if out is None:
        return y
    return out.add_(y) if accumulate else out.copy_(y)


def _bias_gradient() -> None:
    """``tex.bgrad_quantize``: bias gradient and cast of dy for Python quantizers.

    The C++ function matches quantizers by exact type and throws on any other ("Unexpected type for quantizer"), so every layer with a bias fails in backward.
    Can go when grad_output_preprocess treats custom quantizers like Float8BlockQuantizer (sum, then quantise).
    """
    import transformer_engine_torch as tex

    from .quantizers import FP8Quantizer

    def wrapper(original: Any) -> Any:
        def bgrad_quantize(grad_output: Any, quantizer: Any) -> Any:
            if not isinstance(quantizer, FP8Quantizer):
                return original(grad_output, quantizer)
            return grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0), quantizer(grad_output)

        return bgrad_quantize

    replace(tex, "bgrad_quantize", wrapper)


def _fused_swiglu() -> None:
    """``layernorm_mlp._act_func``: SwiGLU and its backward with the quantisation fused, as TransformerEngine has for its own delayed scaling.

    For custom recipes upstream runs the activation in bf16, sums a bias gradient nobody asked for over dY [T, 2F], and casts afterwards: three more passes.
    Its table of activations has a slot for a fused backward, which we fill; the slot is not told whether the layer has a bias, so ``_get_quantizers`` tells
    the quantizer. Can go when the table can be extended by recipes.
    """
    from transformer_engine.pytorch.module import layernorm_mlp

    from .quantizers import FP8Quantizer

    def wrapper(original: Any) -> Any:
        def _act_func(activation: str, recipe: Any = None) -> Any:
            from .factory import fused_swiglu

            unfused = original(activation, recipe)
            return (fused_swiglu(recipe, unfused) or unfused) if activation == "swiglu" else unfused

        return _act_func

    def tell_bias(original: Any) -> Any:
        def _get_quantizers(self: Any, *args: Any, **kwargs: Any) -> Any:
            quantizers = original(self, *args, **kwargs)
            for quantizer in quantizers:
                if isinstance(quantizer, FP8Quantizer):
                    quantizer.needs_bias_gradient = self.use_bias
            return quantizers

        return _get_quantizers

    replace(layernorm_mlp, "_act_func", wrapper)
    replace(layernorm_mlp.LayerNormMLP, "_get_quantizers", tell_bias)


def _scale_of_joined_weights() -> None:
    """``noop_cat`` in ``linear`` and ``layernorm_linear``: separate weights of Q, K and V, joined, carry the predicted scale of the first of them.

    A module with several weights (``fuse_qkv_params=False``, MultiheadAttention's default) quantises them as one tensor, made anew at every forward pass, which
    would know of no automatic scaling. The parts are never quantised alone, so the scale of the first is measured over all of them. Stays: it is about our own
    attribute.
    """
    from transformer_engine.pytorch.module import layernorm_linear, linear

    from ..weight_scaling import ATTRIBUTE

    def wrapper(original: Any) -> Any:
        def noop_cat(tensors: Any, dim: int = 0) -> Any:
            joined = original(tensors, dim)
            if len(tensors) > 1 and hasattr(tensors[0], ATTRIBUTE):
                setattr(joined, ATTRIBUTE, getattr(tensors[0], ATTRIBUTE))
            return joined

        return noop_cat

    for module in (linear, layernorm_linear):
        replace(module, "noop_cat", wrapper)


def _stateless_checkpoint() -> None:
    """``_extra_state._RECIPE_POLICIES``: our recipe carries no state.

    Without the entry TransformerEngine pickles the recipe object into every module's extra state and then refuses to load it. Can go when CustomRecipe
    subclasses can declare it.
    """
    from transformer_engine.pytorch import _extra_state

    _extra_state._RECIPE_POLICIES[("fp8_recipes.te.factory", "FP8Recipe")] = _extra_state.CheckpointExtraStatePolicy.STATELESS


def delayed_maxima() -> None:
    """``autocast.__exit__``, ``FP8GlobalStateManager.reduce_and_update_fp8_tensors`` and ``is_first_fp8_module``, ``_CheckpointFunction``: the history of
    delayed scaling moves on once per microbatch and direction.

    Each move drops the oldest row, so extra moves shorten the window of 1024 steps. Upstream (2.20) moves forward maxima again at the end of every recomputed
    segment, whose own region is an outermost one, and backward maxima whenever a "first" module ends its backward pass: the first of every nested region,
    because leaving that region undoes the note that the first module is past, and every module of a recomputed segment. With these four, a run with
    recompute or nested regions has the history of a run without. Can go when upstream counts regions, not entries.
    """
    from transformer_engine.pytorch import distributed, quantization

    manager = quantization.FP8GlobalStateManager
    replace(quantization.autocast, "__exit__", _keep_first_module_past)
    replace(manager, "reduce_and_update_fp8_tensors", _no_move_in_recompute)
    replace(manager, "is_first_fp8_module", _first_of_recomputed_segment)
    replace(distributed._CheckpointFunction, "forward", _note_first_segment)
    replace(distributed._CheckpointFunction, "backward", _recall_first_segment)


_first_in_segment = [False]
"""Is the next module of the segment being recomputed the first of its region?"""


def _keep_first_module_past(original: Any) -> Any:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    def __exit__(self: Any, *exception: Any) -> None:
        state = FP8GlobalStateManager.quantization_state
        past = state.autocast_depth > 1 and not state.is_first_fp8_module
        original(self, *exception)
        if past:
            state.is_first_fp8_module = False

    return __exit__


def _no_move_in_recompute(original: Any) -> Any:
    from transformer_engine.pytorch.distributed import in_fp8_activation_recompute_phase

    def reduce_and_update_fp8_tensors(forward: bool = True) -> None:
        if not (forward and in_fp8_activation_recompute_phase()):
            original(forward=forward)

    return reduce_and_update_fp8_tensors


def _first_of_recomputed_segment(original: Any) -> Any:
    from transformer_engine.pytorch.distributed import in_fp8_activation_recompute_phase

    def is_first_fp8_module() -> bool:
        if not in_fp8_activation_recompute_phase():
            return bool(original())
        first, _first_in_segment[0] = _first_in_segment[0], False
        return first

    return is_first_fp8_module


def _note_first_segment(original: Any) -> Any:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    def forward(ctx: Any, *values: Any) -> Any:
        state = FP8GlobalStateManager.quantization_state
        ctx.first_segment = state.is_first_fp8_module and any(ctx.needs_input_grad)
        outputs = original(ctx, *values)  # without gradients: its modules do not say that they are first
        if ctx.first_segment:
            state.is_first_fp8_module = False
        return outputs

    return forward


def _recall_first_segment(original: Any) -> Any:
    def backward(ctx: Any, *gradients: Any) -> Any:
        _first_in_segment[0] = ctx.first_segment
        return original(ctx, *gradients)

    return backward
