"""What the LM head in FP8 refuses, with the way out for a user who never heard of it, and what the start report says of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import head_worker  # noqa: E402
from meta_model import reports  # noqa: E402

from fp8_recipes import te  # noqa: E402
from fp8_recipes.megatron import arguments  # noqa: E402
from fp8_recipes.recipe import RecipeError, from_name  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--defer-embedding-wgrad-compute", "--defer-embedding-wgrad-compute: it keeps the LM head's operands in bf16"),
        ("--mtp-num-layers 1", "--mtp-num-layers 1: multi-token prediction shares the LM head"),
        ("--hybrid-layer-pattern MMMM", "--hybrid-layer-pattern: the LM head runs in FP8 in Megatron's GPTModel only"),
        ("--hybrid-override-pattern MMMM", "--hybrid-layer-pattern: the LM head runs in FP8 in Megatron's GPTModel only"),
        ("--make-vocab-size-divisible-by 8 --vocab-size 264", "264 rows of the vocabulary on each of 1 ranks"),
        ("--make-vocab-size-divisible-by 1 --vocab-size 272 --tensor-model-parallel-size 2", "136 rows of the vocabulary on each of 2 ranks"),
    ],
)
@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ("moss", "moss:head=bf16"),
        ("moss:head=fp8,interval=7", "moss:interval=7,head=bf16"),
        ("row:head=fp8", "row:head=bf16"),
        (str(ROOT / "configs" / "recipes" / "moss.yaml"), str(ROOT / "configs" / "recipes" / "moss.yaml") + ":head=bf16"),
    ],
)
def test_by_flag(parse, flags, words, recipe, remedy):
    """A user who never heard of the head is told that the recipe runs it, and given the value that does not, which then is taken."""
    args = parse(f"--fp8-recipe {recipe} {flags}")
    arguments.prepare(args)
    problems = [p for p in arguments.validate(args) if words in p]
    assert len(problems) == 1, arguments.validate(args)
    assert problems[0].endswith(f"{recipe} runs the LM head in FP8 too: use --fp8-recipe {remedy} to leave it in bf16")
    args = parse(f"--fp8-recipe {remedy} {flags}")
    arguments.prepare(args)
    assert not any(words in p for p in arguments.validate(args)), "the head in bf16 takes it"


@pytest.mark.parametrize("flags", ["", "--make-vocab-size-divisible-by 1 --vocab-size 272", "--tensor-model-parallel-size 2 --sequence-parallel"])
def test_what_passes(parse, flags):
    args = parse(f"--fp8-recipe moss:head=fp8 {flags}")
    arguments.prepare(args)
    assert arguments.validate(args) == []


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("moss", "drop it (moss runs the LM head in FP8 already)"),
        ("moss:interval=7,head=bf16", "drop it and use --fp8-recipe moss:interval=7,head=fp8"),
        ("row", "drop it and use --fp8-recipe row:head=fp8"),
        ("fp8_flow_moe", "drop it (fp8_flow_moe runs the LM head in FP8 already)"),
    ],
)
def test_megatrons_own_flag_names_ours(parse, recipe, words):
    args = parse(f"--fp8-recipe {recipe} --fp8-output-proj")
    arguments.prepare(args)
    assert any(p.startswith("--fp8-output-proj") and p.endswith(words) for p in arguments.validate(args)), arguments.validate(args)


def test_megatrons_own_flag_where_no_other_layer_is_in_fp8(parse):
    args = parse("--fp8-recipe fp8_flow_moe:dense=bf16 --fp8-output-proj")
    arguments.prepare(args)
    assert any(p.startswith("--fp8-output-proj") and p.endswith("drop it") for p in arguments.validate(args)), "it could not be honoured"


def test_vocabulary_that_only_the_tokenizer_knew(groups):
    way_out = "moss runs the LM head in FP8 too: use --fp8-recipe moss:head=bf16"
    with pytest.raises(RecipeError, match=f"72 rows on 1 ranks are 72; use --make-vocab-size-divisible-by 16.*{way_out}"):
        head_worker.build("moss", vocab=72)
    assert head_worker.build("moss:head=bf16", vocab=72).output_layer.weight.shape[0] == 72


@pytest.mark.parametrize(
    ("recipe", "attribute", "value", "words"),
    [
        ("moss", "bias", torch.zeros(1), "has no bias"),
        ("moss", "gtp_remat_size", 2, "hold its rows of the vocabulary whole"),
        ("moss_exact:head=fp8", "sequence_parallel", True, "global_scale=measured is one scale for all; use global_scale=unit"),
    ],
)
def test_output_layer_that_it_cannot_run(groups, recipe, attribute, value, words):
    from fp8_recipes.megatron import head

    in_bf16 = f"{recipe.partition(':')[0]}:head=bf16"
    model = head_worker.build(in_bf16)
    model.config.fp8, model.config.fp8_recipe = "e4m3", recipe
    layer = model.output_layer
    delattr(layer, attribute)
    setattr(layer, attribute, value)
    with pytest.raises(RecipeError, match=f"{words}.*, or: {recipe} runs the LM head in FP8 too: use --fp8-recipe {in_bf16} to leave it"):
        head.install(model)
    assert model.output_layer is layer and type(layer).__name__ == "ColumnParallelLinear"


def test_output_layer_of_another_kind(groups):
    from fp8_recipes.megatron import head

    model = torch.nn.Module()
    model.output_layer = torch.nn.Linear(4, 4)
    asked = argparse.Namespace(fp8="e4m3", fp8_recipe="moss")
    with pytest.raises(RecipeError, match=r"output_layer \(Linear\) would stay in bf16; .* GPTModel only.* use --fp8-recipe moss:head=bf16 to leave it"):
        head.check(asked, [model])
    head.check(argparse.Namespace(fp8="e4m3", fp8_recipe="moss:head=bf16"), [model])
    head.check(asked, [head_worker.build("moss")])


def test_transformer_engine_has_no_head():
    assert te.recipe("moss") is te.recipe("moss:head=bf16") is te.recipe(from_name("moss").head_recipe.with_overrides(grad="e4m3"))
    assert te.recipe("moss").qfactory.recipe.head == "bf16"
    assert te.recipe(arguments.layers_recipe("moss:interval=7")) is te.recipe("moss:interval=7")
    assert arguments.layers_recipe("fp8_flow_moe") == arguments.layers_recipe("moss") == from_name("moss:head=bf16")


def test_start_report_names_the_head(base_flags):
    tied = base_flags.replace("--untie-embeddings-and-output-weights", "")
    recipes = ("moss", "moss:head=bf16", "moss_exact:head=fp8")
    second, first, third, exact = reports(f"{tied} --fp8-recipe moss", *(f"{base_flags} --fp8-recipe {recipe}" for recipe in recipes))
    assert "output_layer - 256x256 FP8 moss, dy e5m2" in first and "embedding.word_embeddings - 256x256 bf16" in first
    assert "TRACKED 17" in first, "four linears in each of four layers, and the head"
    assert "output_layer (weight of the embedding) - 256x256 FP8 moss, dy e5m2" in second and "TRACKED 17" in second
    assert "output_layer - 256x256 bf16" in third and "TRACKED 16" in third
    assert "head=fp8" in first[1] and "head=bf16" in third[1]
    told = "LM head: products in FP8, cross-entropy in one pass each way, its gradient made in FP8 (head=bf16: both Megatron's, in bf16)"
    assert first[-2] == second[-2] == told and not any(line.startswith("LM head") for line in third)
    assert "LM head: products in FP8, cross-entropy Megatron's (head=bf16: both Megatron's, in bf16)" in exact
