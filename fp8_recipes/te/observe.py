"""What TransformerEngine's modules quantise, handed to the metrics.

Under a recipe of this package the module's own quantizers report every tensor beside its payload. Under TransformerEngine's delayed scaling the scales are
known before the cast, so what they saturate and flush is counted from the bf16 tensor and the scale: input and weight of `Linear` (the fused-norm modules
never build their input in bf16). Other stock recipes show their kurtosis only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ..formats import E4M3, E5M2
from ..metrics.hooks import MonitorHooks, first_tensor, in_backward


def observe_modules(named: Iterable[tuple[str, torch.nn.Module]], hooks: MonitorHooks) -> int:
    """Report from every TransformerEngine module among ``named`` under its name; returns how many. They are recognised by their ``quantizers``.

    Quantizers exist from a module's first forward pass on, so of the very first microbatch only kurtosis is seen.
    """
    count = 0
    for name, module in named:
        if isinstance(getattr(module, "quantizers", None), dict):
            hooks.also(module.register_forward_hook(partial(_after_forward, name, hooks), with_kwargs=True))
            count += 1
    return count


def _after_forward(name: str, hooks: MonitorHooks, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not (hooks.active and module.training and getattr(module, "fp8", False)):
        return
    ours = [(key, i, q) for key, found in module.quantizers.items() for i, q in enumerate(found) if hasattr(q, "observer")]
    for key, i, quantizer in ours:
        if quantizer.observer is None:
            part = f".fc{i // (3 if key == 'scaling_fwd' else 2) + 1}" if len(ours) > 3 else ""  # LayerNormMLP holds two linears
            quantizer.observer = partial(_report, hooks, module, name + part)
    if not ours and not in_backward():
        _delayed(name, hooks, module, first_tensor((*args, *kwargs.values())))


def _report(hooks: MonitorHooks, module: Any, name: str, tensor_type: str, x: torch.Tensor | None, q: Any) -> None:
    if module.training:  # evaluation runs between two steps
        hooks.observe(name, "grad" if tensor_type == "grad_output" else tensor_type, x, q)


def _delayed(name: str, hooks: MonitorHooks, module: Any, x: torch.Tensor | None) -> None:
    """Input and weight of a `Linear` under the delayed scales in force."""
    recipe = module.fp8_meta.get("recipe")
    if recipe is None or not recipe.delayed() or hasattr(module, "layer_norm_weight") or x is None:
        return
    if not isinstance(getattr(module, "weight", None), torch.Tensor):  # grouped linears and attention, whose scales are laid out otherwise
        return
    fmt = E5M2 if str(getattr(recipe.fp8_format, "name", "")) == "E5M2" else E4M3
    decode = module.fp8_meta["scaling_fwd"].scale.reciprocal()  # TransformerEngine keeps the factor that encodes
    hooks.table.add(f"{name}.input", x, scale=decode[0], fmt=fmt)
    hooks.table.add(f"{name}.weight", module.weight, scale=decode[1], fmt=fmt)
