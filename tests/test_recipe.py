"""Recipes are validated values: every refusal has a message that names the value and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import fp8_recipes
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.recipe import RECIPES, Recipe, RecipeError, from_name, from_yaml


@pytest.mark.parametrize("name", ["moss", "moss_exact", "tile", "row", "bf16", "fp8_flow_moe"])
def test_named_recipes_exist_and_carry_their_name(name: str) -> None:
    assert from_name(name) is not None
    assert from_name(name).name == name
    assert from_name(name) == RECIPES[name]


def test_what_the_named_recipes_are() -> None:
    moss = from_name("moss")
    assert (moss.activation_granularity, moss.grad_granularity, moss.weight_granularity) == ("micro", "micro", "tensor")
    assert (moss.weight_scale, moss.interval, moss.folded, moss.global_scale) == ("predicted", 500, True, "unit")
    assert (moss.activation_format, moss.weight_format, moss.grad_format) == (E4M3, E4M3, E4M3)
    exact = from_name("moss_exact")
    assert (exact.folded, exact.global_scale, exact.activation_granularity) == (False, "measured", "micro")
    tile = from_name("tile")
    assert (tile.activation_granularity, tile.grad_granularity, tile.weight_granularity, tile.folded) == ("tile", "tile", "block", False)
    assert not from_name("bf16").quantize
    flow = from_name("fp8_flow_moe")
    assert (flow.moe, flow.dense, flow.moe_saved, flow.weight_scale, flow.folded) == ("flow", "moss", "h", "predicted", True)
    assert all(recipe.moe == "none" and recipe.dense_recipe is recipe for name, recipe in RECIPES.items() if name != "fp8_flow_moe")


def test_dense_recipe_shares_the_clock() -> None:
    layers = from_name("moss:head=bf16")  # the head is none of the other layers
    assert from_name("fp8_flow_moe").dense_recipe == layers
    assert from_name("fp8_flow_moe:interval=7").dense_recipe == from_name("moss:head=bf16,interval=7")
    assert from_name("fp8_flow_moe:dense=bf16").dense_recipe.quantize is False
    assert from_name("fp8_flow_moe:weight_cache=ffn").dense_recipe == layers, "it speaks of the experts"
    alone = from_name("fp8_flow_moe:dense=")
    assert alone.dense_recipe is alone


def test_head_runs_what_the_other_layers_run_with_e5m2_gradients() -> None:
    moss = from_name("moss:head=bf16,grad=e5m2")
    assert {name: recipe.head_recipe for name, recipe in RECIPES.items() if recipe.head_recipe} == {"moss": moss, "fp8_flow_moe": moss}
    assert from_name("moss:interval=7").head_recipe == dataclasses.replace(moss, interval=7)
    assert from_name("fp8_flow_moe:interval=7,weight_cache=row").head_recipe == dataclasses.replace(moss, interval=7)
    assert from_name("moss:weight_cache=row").head_recipe == moss, "the head keeps nothing"
    assert from_name("fp8_flow_moe:dense=row").head_recipe == from_name("row:head=fp8").head_recipe == from_name("row:grad=e5m2")
    assert from_name("moss:attention=fp8").head_recipe == dataclasses.replace(moss, attention="fp8")
    assert from_name("fp8_flow_moe:attention=fp8").dense_recipe == from_name("moss:attention=fp8,head=bf16")
    assert from_name("moss:head=bf16").head_recipe is from_name("fp8_flow_moe:head=bf16").head_recipe is None


def test_other_layers_in_bf16_take_the_head_along(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="pyyaml is needed to read recipes from files")
    alone = from_name("fp8_flow_moe:dense=bf16")
    assert (alone.head, alone.head_recipe, alone.moe) == ("bf16", None, "flow")
    assert from_name("fp8_flow_moe:dense=bf16,head=bf16") == alone == from_name("fp8_flow_moe").with_overrides(dense="bf16")
    assert from_yaml(write(tmp_path / "mine.yaml", "base: fp8_flow_moe\ndense: bf16\nname: fp8_flow_moe\n")) == alone
    assert from_yaml(write(tmp_path / "flow.yaml", "base: fp8_flow_moe\n"), "dense=bf16") == alone
    assert from_name("fp8_flow_moe:dense=tile").head == "fp8", "other layers in FP8 leave it where it is"
    assert (from_name("moss:quantize=false").head, from_name("moss:quantize=true").head) == ("bf16", "fp8")


def test_overrides_are_typed() -> None:
    recipe = from_name("moss:interval=200,grad=e5m2, promote = 0 ,quantize=true")
    assert (recipe.interval, recipe.promote, recipe.quantize) == (200, 0, True)
    assert recipe.grad_format is E5M2
    assert recipe == dataclasses.replace(RECIPES["moss"], interval=200, promote=0, grad="e5m2")
    assert from_name("moss:") == RECIPES["moss"]
    assert from_name("row:quantize=False").quantize is False


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mos", r"unknown recipe 'mos'; known: moss, moss_exact, tile, row, bf16, fp8_flow_moe, fog \(did you mean moss"),
        ("zzz", r"unknown recipe 'zzz'; known: .*fog$"),
        ("moss:intervall=3", r"recipe 'moss' has no key 'intervall' \(did you mean interval.*\); keys: name, activation"),
        ("moss:interval", r"'moss:interval': override 'interval' must be key=value"),
        ("moss:interval=often", r"recipe 'moss': interval='often' must be an integer"),
        ("moss:interval=0", r"interval=0 must be at least 1 step; use weight_scale=measured"),
        ("moss:promote=100", r"promote=100 must be 0 \(never\) or a multiple of 128"),
        ("moss:promote=-128", r"promote=-128 must be 0 \(never\) or a multiple of 128"),
        ("moss:quantize=yes", r"quantize='yes' must be true or false"),
        ("moss:grad=e5m3", r"grad='e5m3' is not one of e4m3, e5m2 \(did you mean e5m2 or e4m3\?\)"),
        ("moss:activation=fp8", r"activation='fp8' is not one of e4m3, e5m2"),
        ("moss:weight=fp4", r"weight='fp4' is not one of e4m3, e5m2"),
        ("row:activation_granularity=tensor", r"activation_granularity='tensor' is not one of micro, tile, row"),
        ("row:grad_granularity=block", r"grad_granularity='block' is not one of micro, tile, row"),
        ("row:weight_granularity=row", r"weight_granularity='row' is not one of tensor, block"),
        ("row:fold=rows", r"fold='rows' is not one of row, none \(did you mean row\?\)"),
        ("row:wgrad_fold=columns", r"wgrad_fold='columns' is not one of column_block, column, tensor, none \(did you mean column or column_block\?\)"),
        ("moss_exact:global_scale=mesured", r"global_scale='mesured' is not one of unit, measured \(did you mean measured\?\)"),
        ("row:weight_scale=delayed", r"weight_scale='delayed' is not one of predicted, measured"),
        ("row:weight_cache=all", r"weight_cache='all' is not one of none, ffn, row"),
        ("row:weight_granularity=block", r"weight_granularity=block changes along K; use fold=none with it"),
        ("moss:global_scale=measured", r"an FP32 global scale cannot be folded; use global_scale=unit, or fold=none"),
        ("row:fold=none,global_scale=measured", r"global_scale=measured belongs to micro granularity; set activation_granularity=micro"),
        ("moss:moe=flows", r"moe='flows' is not one of none, flow \(did you mean flow\?\)"),
        ("fp8_flow_moe:moe_saved=all", r"moe_saved='all' is not one of activation, h, input"),
        ("moss_exact:moe=flow", r"moe=flow folds every operand of its grouped products; it needs fold=row, or use moe=none"),
        ("fp8_flow_moe:wgrad_fold=tensor", r"it needs wgrad_fold=column_block, or use moe=none"),
        ("bf16:moe=flow", r"it needs quantize=True, or use moe=none"),
        ("bf16:attention=fp8", r"attention=fp8 runs inside an FP8 recipe; use quantize=true, or attention=bf16"),
        ("fp8_flow_moe:dense=bf16,attention=fp8", r"attention=fp8 runs inside the other layers' FP8 recipe, and dense=bf16 has none; use dense=moss"),
        ("fp8_flow_moe:dense=fog", r"dense=fog leaves its layers to TransformerEngine's own scaling; use dense=moss,attention=fp8"),
        ("fog:interval=200", r"interval=200 belongs to this package's quantisation, and stock=delayed leaves the linear layers to TransformerEngine's"),
        ("moss:head=fp16", r"head='fp16' is not one of bf16, fp8 \(did you mean"),
        ("bf16:head=fp8", r"head=fp8 takes the other layers' quantisation, and quantize=false has none; use moss:head=fp8, or head=bf16"),
        ("fp8_flow_moe:dense=bf16,head=fp8", r"head=fp8 takes the other layers' quantisation, and dense=bf16 has none; use .* or head=bf16"),
        ("moss:quantize=false,head=fp8", r"head=fp8 takes the other layers' quantisation, and quantize=false has none; use .* or head=bf16"),
        ("fog:head=fp8", r"head=fp8 belongs to this package's quantisation, and stock=delayed leaves the linear layers to TransformerEngine's"),
        ("fp8_flow_moe:dense=mos", r"dense='mos' is not one of moss, .* \(did you mean moss"),
        ("moss:dense=fp8_flow_moe", r"dense='fp8_flow_moe' is itself a recipe for experts; name the one for the other layers"),
        ("tile:weight_scale=predicted", r"weight_scale=predicted gives one scale per tensor; use weight_granularity=tensor"),
    ],
)
def test_refusals(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_name(spec)


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(RecipeError, ValueError)


def test_frozen_hashable_and_printable() -> None:
    recipe = from_name("moss")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.interval = 3  # type: ignore[misc]
    assert len({recipe, from_name("moss"), from_name("moss:interval=3")}) == 2
    text = str(from_name("moss:interval=3"))
    assert text.startswith("moss(activation=e4m3")
    for field in dataclasses.fields(Recipe):
        assert field.name == "name" or f"{field.name}={getattr(from_name('moss:interval=3'), field.name)}" in text


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_yaml_round_trip_of_every_named_recipe(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="pyyaml is needed to read recipes from files")
    for recipe in RECIPES.values():
        path = write(tmp_path / f"{recipe.name}.yaml", yaml.safe_dump(dataclasses.asdict(recipe)))
        assert from_yaml(path) == recipe


def test_yaml_base_name_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: moss:promote=512\nname: mine\ninterval: 100\n")
    assert from_yaml(path) == dataclasses.replace(RECIPES["moss"], name="mine", promote=512, interval=100)
    assert from_yaml(str(path), "interval=7").interval == 7
    bare = from_yaml(write(tmp_path / "bare.yaml", "activation_granularity: tile\n"))
    assert (bare.name, bare.activation_granularity) == ("bare", "tile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- moss\n", "expected a mapping of recipe fields, got list"),
        ("", "expected a mapping of recipe fields, got NoneType"),
        ("1: moss\n", r"recipe keys must be words, got \[1\]"),
        ("base: 3\n", "unknown recipe '3'"),
        ("name: [a\n", "is not YAML: while parsing a flow sequence"),
        ("name: [a]\n", r"name=\['a'\] must be a word"),
        ("name: \x00\n", "is not YAML: .*special characters are not allowed"),
        ("base: moss\nintervals: 3\n", r"has no key 'intervals' \(did you mean interval"),
        ("base: moss\ninterval: 1.5\n", "interval=1.5 must be an integer"),
        ("base: moss\ninterval: true\n", "interval=True must be an integer"),
        ("base: moss\nfold: [row]\n", r"fold=\"\['row'\]\" is not one of row, none"),
    ],
)
def test_yaml_refusals(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_yaml(write(tmp_path / "recipe.yaml", text))


def test_a_file_that_is_no_text_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not YAML: .*codec can't decode"):
        from_yaml(path)
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        from_yaml(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothere.yaml cannot be read: No such file"):
        from_yaml(tmp_path / "nothere.yaml")


def test_public_names() -> None:
    exported: dict[str, Any] = {name: getattr(fp8_recipes, name) for name in fp8_recipes.__all__}
    assert exported["from_name"] is from_name
    assert exported["RECIPES"] is RECIPES
