"""--fp8-recipe through Megatron's real parser, and every refusal."""

from __future__ import annotations

import pytest

from fp8_recipes import RecipeError
from fp8_recipes.megatron import arguments

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")


@pytest.mark.parametrize("value", ["moss", "row", "moss:interval=200,grad=e5m2", "tensorwise", "blockwise", "delayed", "custom", "bf16"])
def test_flag_takes_our_recipes_and_the_stock_ones(parse, value):
    assert parse(f"--fp8-recipe {value}").fp8_recipe == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("mos", ["unknown recipe 'mos'", "did you mean moss", "tensorwise"]),
        ("tensorwisee", ["did you mean Megatron's tensorwise"]),
        ("moss:intervall=3", ["no key 'intervall'", "interval"]),
        ("moss:interval=0", ["at least 1 step"]),
        ("blockwise:interval=3", ["takes none"]),
        ("missing.yaml", ["missing.yaml"]),
    ],
)
def test_flag_refuses_with_near_misses(parse, capsys, value, words):
    with pytest.raises(SystemExit):
        parse(f"--fp8-recipe {value}")
    message = capsys.readouterr().err
    assert "argument --fp8-recipe" in message
    for word in words:
        assert word in message


def test_a_recipe_file_that_is_broken_is_one_sentence(parse, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: [a\n")
    with pytest.raises(SystemExit):
        parse(f"--fp8-recipe {path}")
    assert f"argument --fp8-recipe: {path} is not YAML: while parsing" in capsys.readouterr().err


def test_help_can_be_printed(parse, capsys):
    """Megatron's own cannot: a percent sign of one flag's help is not escaped."""
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--fp8-metrics-interval N" in shown and "moss_exact" in shown and "%%" not in shown


def test_recipe_from_yaml_with_overrides(parse, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: moss\ninterval: 100\n")
    spec = f"{path}:grad=e5m2"
    assert parse(f"--fp8-recipe {spec}").fp8_recipe == spec
    resolved = arguments.resolve(spec)
    assert (resolved.interval, resolved.grad) == (100, "e5m2")


def prepared(parse, flags):
    args = parse(flags)
    return args, arguments.prepare(args)


def test_format_defaults_to_e4m3_for_ours(parse):
    args, notes = prepared(parse, "--fp8-recipe moss")
    assert (args.fp8, args.fp8_recipe, notes) == ("e4m3", "moss", [])


def test_hybrid_means_e5m2_gradients(parse):
    args, notes = prepared(parse, "--fp8-recipe moss --fp8-format hybrid")
    assert args.fp8_recipe == "moss:grad=e5m2" and "E5M2" in notes[0]
    args, notes = prepared(parse, "--fp8-recipe moss:grad=e4m3 --fp8-format hybrid")
    assert args.fp8_recipe == "moss:grad=e4m3" and notes == []
    args, _ = prepared(parse, "--fp8-recipe moss:interval=7 --fp8-format hybrid")
    resolved = arguments.resolve(args.fp8_recipe)
    assert (resolved.interval, resolved.grad) == (7, "e5m2")


def test_bf16_recipe_turns_fp8_off(parse):
    args, notes = prepared(parse, "--fp8-recipe bf16 --fp8-format e4m3")
    assert args.fp8 is None and args.fp8_recipe == "delayed" and "bf16" in notes[0]


def test_custom_with_our_factory_is_our_recipe(parse):
    args, _ = prepared(parse, "--fp8-recipe custom --fp8-format e4m3 --fp8-quantizer-factory fp8_recipes.megatron.factories.moss")
    assert (args.fp8_recipe, args.fp8_quantizer_factory) == ("moss", None)
    args, _ = prepared(parse, "--fp8-recipe custom --fp8-format e4m3 --fp8-quantizer-factory other.factory")
    assert (args.fp8_recipe, args.fp8_quantizer_factory) == ("custom", "other.factory")


def test_stock_recipe_without_format_is_announced(parse):
    args, notes = prepared(parse, "--fp8-recipe tensorwise")
    assert args.fp8 is None and "does nothing without --fp8-format" in notes[0]
    assert prepared(parse, "--fp8-recipe tensorwise --fp8-format hybrid")[1] == []
    assert prepared(parse, "")[1] == []


REFUSALS = {
    "--num-experts 8": "--num-experts 8",
    "--fp8-param-gather": "--fp8-param-gather",
    "--fp4-format e2m1": "--fp4-format",
    "--fp8-output-proj": "--fp8-output-proj",
    "--no-fp8-wgrad": "--no-fp8-wgrad",
    "--fp8-quantizer-factory a.b": "--fp8-quantizer-factory",
    "--tp-comm-overlap": "--tp-comm-overlap",
    "--cuda-graph-impl local": "--cuda-graph-impl local",
    "--optimizer-cuda-graph": "--optimizer-cuda-graph",
    "--use-transformer-engine-op-fuser": "--use-transformer-engine-op-fuser",
    "--transformer-impl local": "--transformer-impl local",
    "--use-megatron-fsdp": "--use-megatron-fsdp",
    "--use-torch-fsdp2": "--use-torch-fsdp2",
    "--cpu-offloading-num-layers 2": "--cpu-offloading-num-layers",
    "--fine-grained-activation-offloading": "--fine-grained-activation-offloading",
    "--hidden-size 260": "--hidden-size is 260",
    "--ffn-hidden-size 520": "--ffn-hidden-size",
    "--ffn-hidden-size 528 --tensor-model-parallel-size 2": "--ffn-hidden-size / TP 2 is 264",
    "--seq-length 20 --micro-batch-size 1": "tokens of a microbatch",
    "--seq-length 24 --micro-batch-size 4 --tensor-model-parallel-size 4 --sequence-parallel": "tokens of a microbatch",
    "--kv-channels 10": "--kv-channels",
    "--adam-beta1 0.99 --adam-beta2 0.95": "--adam-beta1 0.99",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_refusals_name_the_flag(parse, flags):
    args, _ = prepared(parse, f"--fp8-recipe moss {flags}")
    problems = arguments.validate(args)
    assert any(REFUSALS[flags] in p for p in problems), problems
    with pytest.raises(RecipeError, match="cannot be honoured"):
        arguments.check(args)


def test_fp16_is_refused(parse, base_flags):
    args = parse("--fp8-recipe moss --fp16", base=base_flags.replace("--bf16", ""))
    arguments.prepare(args)
    assert any("--bf16 is missing" in p for p in arguments.validate(args))


@pytest.mark.parametrize(
    "flags",
    [
        "--first-last-layers-bf16",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--context-parallel-size 2",
        "--optimizer sgd",
        "--multi-latent-attention --kv-channels 10",
    ],
)
def test_supported_combinations_pass(parse, flags):
    args, _ = prepared(parse, f"--fp8-recipe moss {flags}")
    assert arguments.validate(args) == []


def test_measured_weights_need_no_bound_on_adam(parse):
    args, _ = prepared(parse, "--fp8-recipe moss:weight_scale=measured --adam-beta1 0.99 --adam-beta2 0.95")
    assert arguments.validate(args) == []


def test_stock_recipes_are_never_refused(parse):
    args, _ = prepared(parse, "--fp8-recipe blockwise --fp8-format e4m3 --num-experts 8 --hidden-size 260")
    assert arguments.validate(args) == []
