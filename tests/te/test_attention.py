"""FP8 attention in the recipe objects that TransformerEngine gets. That cuDNN then runs it is tested in tests/megatron/test_fog_training.py."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

import torch  # noqa: E402
from transformer_engine.common.recipe import Format  # noqa: E402
from transformer_engine.pytorch import IdentityQuantizer, QuantizerRole  # noqa: E402
from transformer_engine.pytorch.quantization import CustomRecipeState  # noqa: E402
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer  # noqa: E402

from fp8_recipes import te  # noqa: E402
from fp8_recipes.te.quantizers import FP8Quantizer  # noqa: E402


def role(kind, tensor):
    return QuantizerRole(module_type=kind, tensor_type=tensor, name="layer")


FORWARD = [role("dpa", "qkv")] * 3 + [QuantizerRole(name="layer.dpa_output")] * 3 + [role("dpa", "s")] * 3
BACKWARD = [QuantizerRole(name="layer.dpa_grad_input")] * 2 + [role("dpa", "do")] * 2 + [role("dpa", "dp")] * 2


@pytest.mark.parametrize(("mode", "roles"), [("forward", FORWARD), ("backward", BACKWARD)])
def test_every_slot_of_attention_is_delayed_and_the_linears_stay_ours(mode, roles):
    recipe = te.recipe("moss:attention=fp8")
    assert recipe.fp8_dpa and not recipe.fp8_mha and recipe.fp8_format == Format.HYBRID
    state = CustomRecipeState(recipe, mode=mode, num_quantizers=len(roles), device=torch.device("cpu"), roles=roles)
    quantizers = state.make_quantizers()
    assert all(type(q) is Float8Quantizer for q in quantizers), "current scaling would leave Hopper without a kernel"
    assert len({q.scale.data_ptr() for q in quantizers}) == len(quantizers) and state.amax_history.shape == (1024, len(roles))
    assert all(isinstance(recipe.qfactory(role("linear", tensor)), FP8Quantizer) for tensor in ("input", "weight", "grad_output"))


def test_without_fp8_attention_its_slots_are_left_alone():
    recipe = te.recipe("moss")
    assert not recipe.fp8_dpa
    assert all(isinstance(recipe.qfactory(r), IdentityQuantizer) for r in FORWARD + BACKWARD)


@pytest.mark.parametrize(("spec", "formats", "attention"), [("fog", Format.HYBRID, True), ("fog:attention=bf16,grad=e4m3", Format.E4M3, False)])
def test_fog_is_transformer_engines_own_delayed_scaling(spec, formats, attention):
    recipe = te.recipe(spec)
    assert recipe.delayed() and recipe.fp8_format == formats and recipe.fp8_dpa == attention and not recipe.fp8_mha
    assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.margin) == (1024, "max", 0)
