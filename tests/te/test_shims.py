"""Shims and the TransformerEngine side, as far as they can be tested without a GPU."""

from __future__ import annotations

import builtins
import importlib.util
import pickle
import types
from importlib import metadata

import pytest

from fp8_recipes import RecipeError


def test_missing_transformer_engine_says_what_to_install(monkeypatch):
    from fp8_recipes.te import shims

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    shims.require_transformer_engine.cache_clear()
    with pytest.raises(ImportError, match=r"pip install .*'transformer-engine\[core-cu13,pytorch\]"):
        shims.require_transformer_engine()


@pytest.mark.parametrize("version", ("2.18.0", "2.19.1", "2.21.0", "3.0"))
def test_untested_version_is_refused(monkeypatch, version):
    from fp8_recipes.te import shims

    monkeypatch.setattr(metadata, "version", lambda name: version)
    shims.require_transformer_engine.cache_clear()
    with pytest.raises(RuntimeError, match=f"{version}.*untested"):
        shims.require_transformer_engine()


def test_the_version_is_read_once(monkeypatch):
    """Megatron asks for the recipe at every layer of every microbatch; reading package metadata takes a millisecond."""
    from fp8_recipes.te import shims

    asked = []
    monkeypatch.setattr(metadata, "version", lambda name: asked.append(name) or "2.20.2")
    shims.require_transformer_engine.cache_clear()
    for _ in range(3):
        shims.require_transformer_engine()
    assert asked == ["transformer-engine"]


def test_an_installation_that_does_not_import_is_one_sentence(monkeypatch):
    """As pip leaves it without [pytorch]: the Python files are there, the extension is not, and TransformerEngine raises FileNotFoundError."""
    from fp8_recipes import te
    from fp8_recipes.te import shims

    def broken(name, *rest):
        if name == "transformer_engine.pytorch":
            raise FileNotFoundError("Could not find shared object file for Transformer Engine torch lib.")
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(metadata, "version", lambda name: "2.20.2")
    shims.require_transformer_engine.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=r"does not import \(Could not find .*pip install .*\[core-cu13,pytorch\]") as error:
        te.recipe("moss")
    assert "\n" not in str(error.value)


def test_wrappers_of_one_function_stack_and_are_put_there_once():
    from fp8_recipes.te import shims

    def twice(original):
        return lambda x: 2 * original(x)

    def plus_one(original):
        return lambda x: original(x) + 1

    place = types.SimpleNamespace(f=lambda x: x)
    for wrapper in (twice, plus_one, twice, plus_one):
        shims.replace(place, "f", wrapper)
    assert place.f(5) == 11


def _te_or_skip():
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    try:
        import torch  # noqa: F401
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"TransformerEngine does not import here: {error}")
    return te


def test_recipe_object_is_one_per_value_and_pickles():
    _te_or_skip()
    from fp8_recipes.te import recipe

    assert recipe("moss") is recipe("moss")
    assert recipe("moss:interval=500") is recipe("moss")
    assert recipe("moss") != recipe("row")
    factory = recipe("moss").qfactory
    assert pickle.loads(pickle.dumps(factory)) == factory


def test_bf16_has_no_te_recipe():
    _te_or_skip()
    from fp8_recipes.te import recipe

    with pytest.raises(RecipeError, match="without te.autocast"):
        recipe("bf16")


def test_another_gpu_than_hopper_is_refused_when_the_recipe_is_made(monkeypatch):
    _te_or_skip()
    import torch

    from fp8_recipes.te import recipe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(RecipeError, match=r"B200 has compute capability 10.0; these recipes need Hopper \(9.0\). Use one of TransformerEngine's"):
        recipe("row:interval=77")  # made by no other test: a recipe that exists already has been through this
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert recipe("row:interval=77").custom()


def test_shards_of_a_weight_share_the_scale_of_their_group(monkeypatch):
    """Automatic scaling hands TransformerEngine's tensor-parallel group on, where the module holds a shard."""
    te = _te_or_skip()
    import torch

    from fp8_recipes.te import automatic_scaling
    from fp8_recipes.weight_scaling import ATTRIBUTE

    class Linear(torch.nn.Linear):
        def __init__(self, tp_size, parallel_mode, tp_group):
            super().__init__(16, 16)
            self.tp_size, self.parallel_mode, self.tp_group = tp_size, parallel_mode, tp_group

    class LayerNormMLP(Linear):
        pass

    for cls in (Linear, LayerNormMLP):
        monkeypatch.setattr(te, cls.__name__, cls)
    kinds = [Linear(2, "column", "ranks"), Linear(2, "row", "ranks"), Linear(2, None, "ranks"), Linear(1, "row", "ranks"), LayerNormMLP(2, None, "ranks")]
    model = torch.nn.Sequential(*kinds, torch.nn.LayerNorm(16))
    clock = automatic_scaling(model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)), interval=3)
    assert [getattr(m.weight, ATTRIBUTE).group for m in kinds] == ["ranks", "ranks", None, None, "ranks"]
    assert clock.effective_interval == 3 and not hasattr(kinds[0].bias, ATTRIBUTE) and not hasattr(model[-1].weight, ATTRIBUTE)


@pytest.mark.parametrize("kind", ["input", "grad_output"])
def test_quantizers_name_what_they_cannot_take(kind):
    _te_or_skip()
    import torch

    from fp8_recipes import from_name
    from fp8_recipes.te.quantizers import FP8Quantizer

    quantizer = FP8Quantizer(from_name("moss"), kind)
    with pytest.raises(ValueError, match=r"no tokens: .*\(0, 3, 64\).*Skip the layer"):
        quantizer(torch.zeros(0, 3, 64))
    with pytest.raises(TypeError, match="float64"):
        quantizer(torch.zeros(16, 64, dtype=torch.float64))
    x = torch.randn(64, 16).t()
    assert torch.equal(quantizer(x).dequantize(), quantizer(x.contiguous()).dequantize()), "not contiguous: copied, as TransformerEngine's own do"


def test_install_is_idempotent():
    _te_or_skip()
    from transformer_engine.pytorch.cpp_extensions import gemm

    from fp8_recipes.te import install

    install()
    first = gemm.custom_gemm
    install()
    assert gemm.custom_gemm is first


def test_factory_by_role():
    te = _te_or_skip()
    from transformer_engine.pytorch import IdentityQuantizer, QuantizerRole

    from fp8_recipes.te import recipe
    from fp8_recipes.te.quantizers import FP8Quantizer

    factory = recipe("moss").qfactory
    assert te is not None
    for kind in ("input", "weight", "grad_output"):
        q = factory(QuantizerRole(module_type="linear", tensor_type=kind))
        assert isinstance(q, FP8Quantizer) and q.tensor_type == kind
    assert isinstance(factory(None), IdentityQuantizer)
    with pytest.raises(RecipeError, match="GroupedLinear"):
        factory(QuantizerRole(module_type="grouped_linear", tensor_type="input"))


def test_an_untracked_weight_is_announced_and_a_tracked_one_is_not(recwarn):
    """`moss` predicts weight scales; a model that was never put under automatic scaling runs measured, and says so."""
    _te_or_skip()
    import torch

    from fp8_recipes import from_name
    from fp8_recipes.te.quantizers import FP8Quantizer, QuantizedWeight
    from fp8_recipes.weight_scaling import WeightScaling

    quantizer = FP8Quantizer(from_name("moss"), "weight")
    weight = torch.nn.Parameter(torch.randn(32, 32))
    with pytest.warns(UserWarning, match="automatic_scaling"):
        assert isinstance(quantizer.quantize(weight), QuantizedWeight)
    WeightScaling().track(weight)
    recwarn.clear()
    quantizer.quantize(weight)
    FP8Quantizer(from_name("row"), "weight").quantize(torch.nn.Parameter(torch.randn(32, 32)))
    assert not recwarn.list


def test_separate_weights_of_q_k_and_v_have_one_predicted_scale(recwarn):
    """TransformerEngine quantises them joined, in a tensor that no optimizer and no clock has seen."""
    _te_or_skip()
    import torch
    from transformer_engine.pytorch.module import layernorm_linear, linear

    from fp8_recipes import from_name
    from fp8_recipes.te import install
    from fp8_recipes.te.quantizers import FP8Quantizer
    from fp8_recipes.weight_scaling import ATTRIBUTE, WeightScaling

    install()
    parts = [torch.nn.Parameter(torch.full((16, 32), size)) for size in (1.0, 2.0, -3.0)]
    for module in (linear, layernorm_linear):
        assert not hasattr(module.noop_cat(parts), ATTRIBUTE)
    clock = WeightScaling(interval=9, attached=True)
    first, *_ = [clock.track(p) for p in parts]
    quantizer = FP8Quantizer(from_name("moss"), "weight")
    for module in (linear, layernorm_linear):
        joined = module.noop_cat(parts)
        assert joined.shape == (48, 32) and getattr(joined, ATTRIBUTE) is first and module.noop_cat(parts[:1]) is parts[0]
        operand = quantizer.quantize(joined).operand
        assert operand.amax is first.anchor_amax and float(operand.amax) >= 3, "measured over all of them"
        clock.advance(0.5)
    assert first.anchor_step == 0 and operand.increment >= 0.5 and not recwarn.list


def test_storages_survive_being_saved():
    """The saved copy is emptied, the original kept: a weight cached over microbatches is saved by every one of them."""
    _te_or_skip()
    import torch

    from fp8_recipes import from_name, ops
    from fp8_recipes.te.quantizers import FP8Quantizer

    x, w = torch.randn(32, 64), torch.nn.Parameter(torch.randn(16, 64))
    for q in (FP8Quantizer(from_name("row"), "input").quantize(x), FP8Quantizer(from_name("row"), "weight").quantize(w)):
        before = q.dequantize()
        tensors, saved = q.prepare_for_saving()
        assert torch.equal(q.dequantize(), before)
        rest = saved.restore_from_saved([*tensors, before])
        assert len(rest) == 1 and rest[0] is before
        assert torch.equal(saved.dequantize(), before)
    released = FP8Quantizer(from_name("row"), "grad_output").quantize(x)
    payload = released.release()
    assert torch.equal(ops.dequantize(payload), ops.dequantize(ops.quantize(x, "row")))
    with pytest.raises(RuntimeError, match="released"):
        released.operand()
