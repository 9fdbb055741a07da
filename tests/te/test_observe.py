"""What TransformerEngine's modules report, on plain modules with the attributes of TransformerEngine's: its own need a GPU to be built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

from fp8_recipes.metrics import MonitorHooks  # noqa: E402
from fp8_recipes.recipe import from_name  # noqa: E402
from fp8_recipes.te.observe import observe_modules  # noqa: E402
from fp8_recipes.te.quantizers import FP8Quantizer  # noqa: E402


class Linear(torch.nn.Linear):
    """Quantises its input by its quantizer, and its output gradient by hand (``backward_of``)."""

    def __init__(self, quantizers: dict[str, list[Any]], **meta: Any) -> None:
        super().__init__(32, 16, bias=False)
        self.fp8, self.quantizers, self.fp8_meta = True, quantizers, meta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantizers["scaling_fwd"]:
            self.quantizers["scaling_fwd"][0](x)
        return super().forward(x)


def test_our_quantizers_report_input_and_gradient_from_the_second_microbatch_on() -> None:
    recipe = from_name("moss")
    module = Linear({"scaling_fwd": [FP8Quantizer(recipe, "input")], "scaling_bwd": [FP8Quantizer(recipe, "grad_output")]})
    hooks = MonitorHooks([])
    assert observe_modules([("layers.1.fc", module), ("layers.1.norm", torch.nn.LayerNorm(4))], hooks) == 1
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        module(x)
    module.quantizers["scaling_bwd"][0](torch.ones(4, 16))
    readings = hooks.end_step(1)
    assert readings is not None and sorted(readings) == ["layers.1.fc.grad", "layers.1.fc.input"]
    assert readings["layers.1.fc.input"].elements == 2 * 4 * 32 and readings["layers.1.fc.grad"].elements == 4 * 16
    assert readings["layers.1.fc.input"].amax == float(x.abs().max())
    hooks.active = False
    module(x)
    hooks.active = True
    readings = hooks.end_step(2)
    assert readings is not None and readings["layers.1.fc.input"].elements == 0


def test_two_linears_in_one_module_are_told_apart() -> None:
    recipe = from_name("moss")
    forward = [FP8Quantizer(recipe, t) for t in ("input", "weight")] + [object()] + [FP8Quantizer(recipe, t) for t in ("input", "weight")] + [object()]
    backward = [FP8Quantizer(recipe, "grad_output"), object(), FP8Quantizer(recipe, "grad_output"), object()]
    module = Linear({"scaling_fwd": forward, "scaling_bwd": backward})
    hooks = MonitorHooks([])
    observe_modules([("mlp", module)], hooks)
    module(torch.ones(4, 32))
    for q in (forward[0], forward[3], backward[0], backward[2]):
        q(torch.ones(4, 32))
    readings = hooks.end_step(1)
    assert readings is not None and sorted(readings) == ["mlp.fc1.grad", "mlp.fc1.input", "mlp.fc2.grad", "mlp.fc2.input"]


def test_delayed_scaling_counts_from_the_scale_in_force() -> None:
    recipe = SimpleNamespace(delayed=lambda: True, fp8_format=SimpleNamespace(name="HYBRID"))
    encode = torch.tensor([2.0**8, 2.0**3, 1.0])  # input: up to 448 / 256 = 1.75
    module = Linear({"scaling_fwd": [], "scaling_bwd": []}, recipe=recipe, scaling_fwd=SimpleNamespace(scale=encode))
    hooks = MonitorHooks([])
    observe_modules([("fc", module)], hooks)
    x = torch.full((2, 32), 1.75)
    x[0, 0], x[1, 1] = 1.8, 2.0**-20
    module(x)
    readings = hooks.end_step(1)
    assert readings is not None and sorted(readings) == ["fc.input", "fc.weight"]
    read = readings["fc.input"]
    assert (read.saturated, read.flushed, read.scale_exponent_min, read.scale_exponent_max) == (1, 1, -8, -8)
    assert readings["fc.weight"].scale_exponent_max == -3
    module.layer_norm_weight = torch.ones(32)  # a fused norm: its output is not at hand
    hooks.active = True
    module(x)
    readings = hooks.end_step(2)
    assert readings is not None and readings["fc.input"].elements == 0
    module.fp8 = False
    hooks.active = True
    module(x)
    assert (hooks.end_step(3) or {})["fc.input"].elements == 0
