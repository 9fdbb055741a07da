"""Shims: idempotent, version-guarded, and each does what it says."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

from fp8_recipes import RecipeError  # noqa: E402
from fp8_recipes.megatron import shims  # noqa: E402


def patched():
    """Everything that install() replaces."""
    from megatron.core import fp8_utils
    from megatron.core.datasets import utils
    from megatron.training import arguments, checkpointing, training

    return {
        "add_megatron_arguments": arguments.add_megatron_arguments,
        "validate_args": arguments.validate_args,
        "get_fp8_recipe": fp8_utils.get_fp8_recipe,
        "_get_custom_recipe": fp8_utils._get_custom_recipe,
        "compile_helpers": utils.compile_helpers,
        "get_megatron_optimizer": training.get_megatron_optimizer,
        "training.save_checkpoint": training.save_checkpoint,
        "training.load_checkpoint": training.load_checkpoint,
        "checkpointing.save_checkpoint": checkpointing.save_checkpoint,
        "checkpointing.load_checkpoint": checkpointing.load_checkpoint,
        "generate_state_dict": checkpointing.generate_state_dict,
        "_load_base_checkpoint": checkpointing._load_base_checkpoint,
    }


def test_install_is_idempotent_and_keeps_the_originals():
    shims.install()
    first = patched()
    shims.install()
    assert patched() == first
    for name, function in first.items():
        wrappers = function._fp8_recipes_wrappers
        assert len(wrappers) == len(set(wrappers)) > 0, f"{name} is wrapped twice by one of {wrappers}"
        assert function._fp8_recipes_original is not None and not hasattr(inspect.unwrap(function), "_fp8_recipes_original")


@pytest.mark.parametrize(("version", "words"), [("0.16.1", "0.16.1"), ("0.20.0", "megatron-core>=0.19,<0.20")])
def test_untested_megatron_is_refused_with_the_way_out(monkeypatch, version, words):
    monkeypatch.setattr(shims, "_megatron_version", lambda: version)
    with pytest.raises(RuntimeError, match="untested") as error:
        shims.install()
    assert words in str(error.value) and version in str(error.value)


def test_missing_megatron_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ImportError, match="pip install 'megatron-core>=0.19,<0.20'"):
        shims.require_megatron()


def test_a_checkout_shadows_the_wheels_version(monkeypatch, tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 21\nPATCH = 3\n")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "megatron")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec)
    assert shims._megatron_version() == "0.21.3"


def test_compile_helpers_does_not_run_make_in_the_wheel(monkeypatch):
    import subprocess

    from megatron.core.datasets import utils

    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("make was called"))
    shims.install()
    utils.compile_helpers()


def test_compile_helpers_still_builds_where_a_makefile_is(monkeypatch, tmp_path):
    from megatron.core.datasets import utils

    shims.install()
    called = []
    original = utils.compile_helpers._fp8_recipes_original
    monkeypatch.setattr(utils, "compile_helpers", original)
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    (tmp_path / "Makefile").write_text("default:\n")
    monkeypatch.setattr("subprocess.run", lambda command: called.append(command) or types.SimpleNamespace(returncode=0))
    shims.dataset_helpers()
    utils.compile_helpers()
    assert called == [["make", "-C", str(tmp_path)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stand_in_accumulates_the_weight_gradient(dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(24, 8, dtype=torch.bfloat16), torch.randn(24, 6, dtype=torch.bfloat16)
    main_grad = torch.randn(6, 8).to(dtype)
    expected = main_grad.double() + dy.double().t() @ x.double()
    storage = main_grad.data_ptr()
    shims.accumulate_weight_gradient(x, dy, main_grad)
    assert main_grad.data_ptr() == storage and main_grad.dtype == dtype
    error = (main_grad.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 2**-8)


def test_stand_in_names_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(5, 6\)"):
        shims.accumulate_weight_gradient(torch.zeros(4, 8), torch.zeros(5, 6), torch.zeros(6, 8))


def test_stand_in_is_what_megatron_calls():
    from megatron.core.tensor_parallel import layers

    shims.install()
    module = sys.modules["fused_weight_gradient_mlp_cuda"]
    if not hasattr(module.wgrad_gemm_accum_fp32, "__module__") or module.wgrad_gemm_accum_fp32.__module__ != shims.__name__:
        pytest.skip("a real apex is installed; it is left alone")
    assert layers._grad_accum_fusion_available and layers.fused_weight_gradient_mlp_cuda is module


def test_stand_in_inside_megatrons_own_linear():
    """The LM head's autograd function with gradient accumulation fusion, forward and backward, against the plain gradient."""
    from megatron.core.tensor_parallel import layers

    shims.install()
    torch.manual_seed(1)
    x = torch.randn(12, 2, 16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(8, 16))
    weight.main_grad = torch.full((8, 16), 0.5)
    y = layers.linear_with_grad_accumulation_and_async_allreduce(
        input=x, weight=weight, bias=None, gradient_accumulation_fusion=True, allreduce_dgrad=False, sequence_parallel=False
    )
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = 0.5 + torch.einsum("sbo,sbi->oi", dy.double(), x.detach().double())
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, dy @ weight.detach())


def test_our_recipes_by_dotted_path():
    from megatron.core import fp8_utils

    from fp8_recipes import te
    from fp8_recipes.megatron import factories

    shims.install()
    assert fp8_utils._get_custom_recipe("fp8_recipes.megatron.factories.moss") is te.recipe("moss")
    assert factories.moss is te.recipe("moss").qfactory
    assert factories.recipe_name("fp8_recipes.megatron.factories.bf16") is None
    with pytest.raises(AttributeError, match="no recipe 'mosss'"):
        _ = factories.mosss


def test_foreign_factories_still_go_upstream():
    from megatron.core import fp8_utils

    shims.install()
    with pytest.raises(ValueError, match="nowhere"):
        fp8_utils._get_custom_recipe("nowhere.factory")


def test_wrong_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(RecipeError, match=r"A100 has compute capability 8.0.*Hopper"):
        shims.refuse_wrong_device()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    shims.refuse_wrong_device()
