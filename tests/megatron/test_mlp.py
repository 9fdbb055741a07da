"""Which calls of Megatron's MLP take the fused way. What they compute is tested on the GPU (tests/te/test_mlp.py, tests/megatron/test_training.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fp8_recipes import from_name

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")
mlp_module = pytest.importorskip("fp8_recipes.megatron.mlp", reason="TransformerEngine does not import here", exc_type=ImportError)


def fake_mlp(first=True, training=True, told=True):
    fc1 = SimpleNamespace(
        disable_parameter_transpose_cache=not told, is_first_microbatch=first, eps=1e-5, zero_centered_gamma=False, fuse_wgrad_accumulation=True
    )
    return SimpleNamespace(linear_fc1=fc1, training=training, config=SimpleNamespace(disable_parameter_transpose_cache=not told))


@pytest.fixture
def active(monkeypatch):
    def set_recipe(name):
        monkeypatch.setattr(mlp_module, "active_recipe", lambda: None if name is None else from_name(name))
        monkeypatch.setattr(mlp_module, "static_reason", lambda mlp, recipe: None if recipe.folded else "recipe")

    return set_recipe


@pytest.mark.parametrize("kwargs", ({}, {"padding_mask": None}))
def test_the_call_that_transformer_layer_makes_is_fused(active, kwargs):
    """Megatron's layer always passes padding_mask, None for dense models: taking that for an unknown argument would silently unfuse every layer."""
    active("moss")
    options = mlp_module.fused_options(fake_mlp(), None, kwargs)
    assert options is not None and options.recipe == from_name("moss") and options.fuse_wgrad


def test_first_microbatch_overwrites_and_later_ones_add(active):
    active("moss")
    assert not mlp_module.fused_options(fake_mlp(first=True), None, {}).accumulate
    assert mlp_module.fused_options(fake_mlp(first=False), None, {}).accumulate


@pytest.mark.parametrize("spec", ("moss", "moss:weight_cache=ffn", "moss:weight_cache=row"))
def test_weights_are_kept_within_a_step_only(active, spec):
    """Evaluation, and modules that Megatron tells nothing of microbatches, neither read nor leave a payload."""
    active(spec)
    for first in (True, False):
        assert mlp_module.fused_options(fake_mlp(first), None, {}).first is first
        assert mlp_module.fused_options(fake_mlp(first, training=False), None, {}).first is None
        assert mlp_module.fused_options(fake_mlp(first, told=False), None, {}).first is None


@pytest.mark.parametrize(
    ("spec", "told", "words"),
    (
        ("moss", True, ""),
        ("moss:weight_cache=ffn", True, "; weight_cache=ffn keeps their FP8 weights from the first microbatch of a step to the last"),
        ("moss:weight_cache=row", True, "; weight_cache=row keeps their FP8 weights from the first microbatch of a step to the last"),
        ("moss:weight_cache=ffn", False, "; weight_cache=ffn keeps nothing (disable_parameter_transpose_cache)"),
    ),
)
def test_report_says_what_is_kept(spec, told, words):
    assert mlp_module.weight_cache_note(fake_mlp(told=told), from_name(spec)) == words


@pytest.mark.parametrize(
    ("recipe", "scale", "kwargs"),
    (
        (None, None, {}),
        ("moss_exact", None, {}),
        ("moss", object(), {}),
        ("moss", None, {"padding_mask": object()}),
    ),
)
def test_what_does_not_qualify_goes_through_the_modules(active, recipe, scale, kwargs):
    active(recipe)
    assert mlp_module.fused_options(fake_mlp(), scale, kwargs) is None


def test_hooks_of_the_linears_fire(monkeypatch):
    """DistributedDataParallel's pre-forward hook waits for gathered parameters; one that changes its input cannot be honoured."""
    import torch

    fired = []
    mlp = SimpleNamespace(linear_fc1=torch.nn.Linear(2, 2), linear_fc2=torch.nn.Linear(2, 2))
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        linear.register_forward_pre_hook(lambda module, _: fired.append(module))
    mlp_module.before_forward(mlp)
    assert fired == [mlp.linear_fc1, mlp.linear_fc2]
    mlp.linear_fc2.register_forward_pre_hook(lambda module, _: torch.zeros(1))
    with pytest.raises(RuntimeError, match="changes its input"):
        mlp_module.before_forward(mlp)
