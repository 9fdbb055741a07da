"""The launcher's configuration path: parse, validate, Megatron's own config objects, datasets."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from fp8_recipes import RecipeError

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")


def test_our_recipe_reaches_transformer_engine(configure):
    from megatron.core import fp8_utils

    args, container = configure("--fp8-recipe moss:interval=200")
    config = container.model.transformer
    assert (config.fp8, config.fp8_recipe) == ("e4m3", "moss:interval=200")
    recipe = fp8_utils.get_fp8_recipe(config)
    assert recipe.custom() and recipe.qfactory.recipe.interval == 200
    assert fp8_utils.get_fp8_recipe(config) is recipe


@pytest.mark.parametrize(("flags", "kind"), [("tensorwise", "Float8CurrentScaling"), ("blockwise", "Float8BlockScaling")])
def test_stock_recipes_keep_their_meaning(configure, flags, kind):
    from megatron.core import fp8_utils

    _, container = configure(f"--fp8-recipe {flags} --fp8-format e4m3")
    assert type(fp8_utils.get_fp8_recipe(container.model.transformer)).__name__ == kind


@pytest.mark.parametrize("flags", ["", "--fp8-recipe bf16"])
def test_bf16(configure, flags):
    _, container = configure(flags)
    assert container.model.transformer.fp8 is None


def test_refusal_comes_before_megatrons_own_checks(configure):
    with pytest.raises(RecipeError, match="--num-experts 4"):
        configure("--fp8-recipe moss --num-experts 4")


def test_flags_of_other_launchers_are_refused(configure):
    with pytest.raises(RecipeError, match="--dataloader-inter-document-masking: not in this launcher"):
        configure("--dataloader-inter-document-masking")


def test_one_clean_line_for_the_user(monkeypatch):
    from fp8_recipes.megatron import pretrain

    def refuse():
        raise RecipeError("--x: no")

    monkeypatch.setattr(pretrain, "configure", refuse)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt"])
    with pytest.raises(SystemExit, match="fp8_recipes: --x: no"):
        runpy.run_module("fp8_recipes.pretrain_gpt", run_name="__main__")


def test_a_missing_file_and_a_missing_gpu_are_one_clean_line(monkeypatch):
    import torch

    from fp8_recipes.megatron import pretrain

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt"])
    monkeypatch.setattr(pretrain, "configure", lambda: Path("nowhere/precision.yaml").read_text())
    with pytest.raises(SystemExit, match="fp8_recipes: nowhere/precision.yaml: No such file"):
        pretrain.main()
    monkeypatch.setattr(pretrain, "configure", lambda: (None, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="fp8_recipes: Megatron trains on CUDA GPUs and torch finds none"):
        pretrain.main()


def test_untested_version_is_one_clean_line(monkeypatch):
    from fp8_recipes.megatron import pretrain, shims

    monkeypatch.setattr(shims, "_megatron_version", lambda: "0.21.0")
    with pytest.raises(SystemExit, match="fp8_recipes: Megatron-Core 0.21.0 is untested"):
        pretrain.main([])


def test_adaptor_installs_on_import():
    import megatron.core.fp8_utils

    import fp8_recipes.megatron_adaptor  # noqa: F401

    assert hasattr(megatron.core.fp8_utils.get_fp8_recipe, "_fp8_recipes_original")


def test_dataset_config_reads_our_text(configure, base_flags, tmp_path):
    from fp8_recipes import data
    from fp8_recipes.megatron import pretrain

    (tmp_path / "a.py").write_text("x = 1\n" * 400)
    data.build_from_roots(tmp_path / "text", [tmp_path])
    base = base_flags.replace("--mock-data", "").replace("--vocab-size 256", "")
    args, _ = configure(f"--data-path {tmp_path / 'text'} --split 99,1,0 {' '.join(data.tokenizer_flags())}", base=base)
    config = pretrain.dataset_config(args)
    assert config.blend == ([str(tmp_path / "text")], None) and config.tokenizer.eod == 256 and not config.mock


@pytest.mark.parametrize("text", [True, False])
def test_datasets_of_the_launcher(configure, base_flags, tmp_path, monkeypatch, text):
    """Megatron's own builder on our text and on mock data: next-token labels, byte tokens, the same sample twice."""
    from megatron.core import parallel_state
    from megatron.training import utils

    from fp8_recipes import data
    from fp8_recipes.megatron import pretrain

    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(utils, "is_first_or_last_pipeline_stage", lambda vp_stage: True)
    flags = "--no-create-attention-mask-in-dataloader"
    if text:
        (tmp_path / "a.py").write_text("".join(f"name_{i} = {i}\n" for i in range(900)))
        data.build_from_roots(tmp_path / "text", [tmp_path])
        base_flags = base_flags.replace("--mock-data", "").replace("--vocab-size 256", "")
        flags += f" --data-path {tmp_path / 'text'} --split 100,0,0 --data-cache-path {tmp_path / 'cache'} {' '.join(data.tokenizer_flags())}"
    configure(flags, base=base_flags)
    train, _, _ = pretrain.datasets_provider([20, 0, 0])
    sample, again = train[3], train[3]
    assert len(train) >= 20 and "attention_mask" not in sample
    assert sample["tokens"].shape == sample["labels"].shape == (128,)
    assert (sample["tokens"][1:] == sample["labels"][:-1]).all() and (sample["tokens"] == again["tokens"]).all()
    assert sample["tokens"].max() < data.VOCAB_SIZE and sample["tokens"].dtype == sample["labels"].dtype
    if text:
        assert "name_" in bytes(sample["tokens"].to(int).clamp(max=255).tolist()).decode("latin-1")


def test_loss_is_the_masked_sum(configure, monkeypatch):
    import torch
    from megatron.training import get_args

    from fp8_recipes.megatron import pretrain

    configure("--no-check-for-nan-in-loss-and-grad")
    assert get_args().check_for_nan_in_loss_and_grad is False
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    loss, tokens, report = pretrain.loss_func(mask, torch.tensor([[2.0, 100.0, 3.0]]))
    assert (loss.item(), tokens.item()) == (5.0, 2) and report["lm loss"].tolist() == [5.0, 2.0]
