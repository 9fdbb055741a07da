"""What TransformerEngine's modules report, on plain modules with the attributes of TransformerEngine's: its own need a GPU to be built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

from fp8_recipes.metrics import MonitorHooks, Target  # noqa: E402
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
    module.eval()(x)
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
    del module.layer_norm_weight, module.weight  # a grouped linear, attention: no one weight
    module.forward = lambda x: x  # type: ignore[method-assign]
    hooks.active = True
    module(x)
    assert (hooks.end_step(2) or {})["fc.input"].elements == 0
    module.fp8 = False
    hooks.active = True
    module(x)
    assert (hooks.end_step(3) or {})["fc.input"].elements == 0


# --- TransformerEngine's own modules ----------------------------------------------------------------------------------------------------------------------


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()


def steps(module: Any, recipe: Any, count: int, features: int) -> Any:
    """``count`` microbatches; readings of all of them."""
    import transformer_engine.pytorch as te

    hooks = MonitorHooks([Target("layers.1.out", module)])
    observe_modules([("fc", module)], hooks)
    for _ in range(count):
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            y = module(data(256, 512).requires_grad_())
        y.backward(data(256, features, seed=1))
    return hooks.end_step(1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear"])
def test_linear_under_our_recipe(kind: str) -> None:
    import transformer_engine.pytorch as te

    from fp8_recipes.te import recipe

    extra = {"normalization": "RMSNorm"} if kind == "LayerNormLinear" else {}
    module = getattr(te, kind)(512, 384, bias=False, params_dtype=torch.bfloat16, **extra)
    readings = steps(module, recipe("moss"), 3, 384)
    assert sorted(readings) == ["fc.grad", "fc.input", "layers.1.out"]
    assert readings["layers.1.out"].elements == 3 * 256 * 384
    assert readings["fc.input"].elements == 2 * 256 * 512  # quantizers are known from the second microbatch on
    assert readings["fc.grad"].elements == 3 * 256 * 384  # the first backward runs after the first forward
    x = data(256, 512).double()
    assert readings["fc.input"].kurtosis == pytest.approx(float((x.pow(4).mean(1) / x.square().mean(1).square()).mean()), rel=1e-2)
    assert readings["fc.input"].saturated == readings["fc.grad"].saturated == 0
    assert readings["fc.input"].scale_exponent_min <= readings["fc.input"].scale_exponent_max


@pytest.mark.gpu
def test_linear_under_delayed_scaling() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    module = te.Linear(512, 384, bias=False, params_dtype=torch.bfloat16)
    readings = steps(module, DelayedScaling(), 3, 384)
    assert sorted(readings) == ["fc.input", "fc.weight", "layers.1.out"]
    assert readings["fc.input"].elements == 3 * 256 * 512 and readings["fc.weight"].elements == 3 * 512 * 384
    assert readings["fc.input"].scale_exponent_min < 0


@pytest.mark.gpu
def test_bf16_shows_kurtosis_only() -> None:
    import transformer_engine.pytorch as te

    readings = steps(te.Linear(512, 384, bias=False, params_dtype=torch.bfloat16), None, 2, 384)
    assert sorted(readings) == ["layers.1.out"] and readings["layers.1.out"].kurtosis == pytest.approx(3.0, abs=0.1)


@pytest.mark.gpu
def test_fused_mlp_reports_what_it_quantises_and_computes_the_same() -> None:
    from fp8_recipes.te.mlp import Options, norm_swiglu_mlp

    gamma, w1, w2 = (torch.nn.Parameter(t) for t in (torch.ones(512, device="cuda").bfloat16(), data(2048, 512) * 0.04, data(512, 1024) * 0.03))
    hooks, results = MonitorHooks([]), []
    for observer in (None, lambda linear, role, x, q: hooks.observe(f"mlp.{linear}", role, x, q)):
        x = data(256, 512, seed=3).requires_grad_()
        y = norm_swiglu_mlp(x, gamma, w1, w2, Options(from_name("moss"), 1e-5, observer=observer))
        y.backward(data(256, 512, seed=4))
        results.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    readings = hooks.end_step(1)
    assert readings is not None
    assert sorted(readings) == ["mlp.linear_fc1.grad", "mlp.linear_fc1.input", "mlp.linear_fc2.grad", "mlp.linear_fc2.input"]
    assert readings["mlp.linear_fc2.input"].elements == 256 * 1024 and readings["mlp.linear_fc1.grad"].elements == 256 * 2048
