"""Our recipes as values of Megatron's ``--fp8-recipe``, and everything that is refused before training.

    --fp8-recipe moss                         a recipe of this package
    --fp8-recipe moss:interval=200,grad=e5m2  with overrides
    --fp8-recipe configs/recipes/moss.yaml    from a file
    --fp8-recipe bf16                         no quantisation, whatever --fp8-format says
    --fp8-recipe tensorwise                   Megatron's own values keep their meaning

Megatron keeps `args.fp8_recipe` as a string; ours stays the specification, so it reaches `get_fp8_recipe` (see `shims`), checkpoints and logs unchanged.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from functools import cache
from typing import Any

from .. import recipe as recipes
from ..recipe import Recipe, RecipeError
from ..weight_scaling import adam_update_bound
from . import attention_arguments, fog_arguments, moe_arguments

STOCK = ("delayed", "tensorwise", "mxfp8", "blockwise", "custom")
"""Values of --fp8-recipe that belong to Megatron 0.19."""
ALIGNMENT = 16
"""Every matrix dimension of an FP8 product is a multiple of this (16-byte rows for TMA and cuBLAS)."""
_FSDP = "weight scales live on the parameters, which FSDP replaces; use --use-distributed-optimizer"
_OFFLOAD = "offloading knows only TransformerEngine's own FP8 tensors; drop the flag"


@cache
def resolve(spec: str) -> Recipe:
    """The `Recipe` of a specification: a name with overrides, or a YAML file with overrides. Raises RecipeError. Read once in a process: every layer asks."""
    path, _, overrides = spec.partition(":")
    if path.endswith((".yaml", ".yml")):
        return recipes.from_yaml(path, overrides)
    return recipes.from_name(spec)


@cache
def layers_recipe(spec: str) -> Recipe:
    """What every layer outside the experts and the LM head runs."""
    return resolve(spec).dense_recipe.with_overrides(head="bf16")


def is_ours(spec: str | None) -> bool:
    """Is this value of --fp8-recipe one of ours (as opposed to Megatron's own)?"""
    return spec is not None and str(getattr(spec, "value", spec)) not in STOCK


def in_force(args: Any) -> str | None:
    """The specification of our recipe that this run trains with, None under Megatron's own recipes and bf16. ``args``: prepared arguments, or a config."""
    spec = getattr(args, "fp8_recipe", None)
    if not is_ours(spec) or not (args.fp8 or is_flow(spec)):
        return None
    return str(spec)


def is_flow(spec: str | None) -> bool:
    """Does this value of --fp8-recipe run MoE layers as one FP8 dataflow (`moe`)?"""
    return spec is not None and is_ours(spec) and resolve(str(spec)).moe == "flow"


def fp8_attention(args: Any) -> bool:
    """Do both products of attention run in FP8? ``args``: prepared arguments."""
    spec = in_force(args)
    return resolve(spec).attention == "fp8" if spec else bool(getattr(args, "fp8_dot_product_attention", False) and args.fp8)


def recipe_type(value: str) -> str:
    """argparse type of --fp8-recipe: stock values and valid specifications pass, anything else is reported with its near misses."""
    if value in STOCK:
        return value
    name = value.partition(":")[0]
    if name in STOCK:
        raise argparse.ArgumentTypeError(f"{value!r}: overrides belong to the recipes of fp8_recipes ({', '.join(recipes.RECIPES)}); {name} takes none")
    try:
        resolve(value)
    except RecipeError as error:
        near = difflib.get_close_matches(name, STOCK, n=1)
        hint = f" (did you mean Megatron's {near[0]}?)" if near else f"; Megatron's own: {', '.join(STOCK)}"
        raise argparse.ArgumentTypeError(str(error) + (hint if name not in recipes.RECIPES else "")) from None
    return value


def extend_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--fp8-recipe`` of a Megatron parser take our recipes and add our own flags. Idempotent."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    if "--fp8-recipe" not in actions:
        raise RuntimeError("this Megatron has no --fp8-recipe flag; install 'megatron-core>=0.19,<0.20'")
    action = actions["--fp8-recipe"]
    action.choices = None
    action.type = recipe_type
    action.metavar = "RECIPE"
    action.help = f"fp8_recipes: {', '.join(recipes.RECIPES)}, NAME:key=value,... or a YAML file; Megatron: {', '.join(STOCK)}"
    if "--fp8-log" not in actions:
        group = parser.add_argument_group("fp8_recipes")
        group.add_argument("--fp8-log", metavar="PATH", default=None, help="append one JSON line per iteration: loss at full precision, time, peak memory")
        every = "every N iterations: kurtosis per layer and, under FP8, saturated and flushed shares and scale ranges (docs/metrics.md); 0 = never"
        group.add_argument("--fp8-metrics-interval", metavar="N", type=int, default=0, help=every)
        group.add_argument("--fp8-metrics-log", metavar="PATH", default=None, help="append the metrics as JSON lines, for fp8-recipes inspect")
        group.add_argument("--fp8-alarm", choices=("warn", "stop"), default="warn", help="an alarm of the metrics warns, or saves and ends the run")
    fog_arguments.extend_parser(parser)
    attention_arguments.extend_parser(parser)
    return parser


def prepare(args: argparse.Namespace, argv: list[str] | None = None) -> list[str]:
    """Fill in what --fp8-recipe implies, in place; returns notes for the user. Runs before Megatron validates.

    ``--fp8-recipe custom`` with a factory of this package becomes that recipe. Ours without --fp8-format: e4m3. With ``--fp8-format hybrid``: gradients in
    E5M2 unless the specification says otherwise. ``bf16``: no FP8 at all.
    """
    from . import factories

    if args.fp8_recipe == "custom" and args.fp8_quantizer_factory:
        name = factories.recipe_name(args.fp8_quantizer_factory)
        if name is not None:  # one way through from here on: the same checks, scales and recipe object
            args.fp8_recipe, args.fp8_quantizer_factory = name, None
    spec = args.fp8_recipe
    if not is_ours(spec):
        given = any(item == "--fp8-recipe" or item.startswith("--fp8-recipe=") for item in (sys.argv if argv is None else argv))
        if given and args.fp8 is None:
            return [f"--fp8-recipe {spec} does nothing without --fp8-format: this run trains in bf16 (add --fp8-format hybrid or e4m3)"]
        return []
    if not resolve(spec).quantize:
        args.fp8, args.fp8_recipe = None, "delayed"
        return [f"--fp8-recipe {spec}: every product in bf16"]
    if not resolve(spec).dense_recipe.quantize:  # Megatron's FP8 layers are off, the experts are not
        args.fp8 = None
        return [f"--fp8-recipe {spec}: every product outside the experts in bf16"]
    if args.fp8 is None:
        args.fp8 = "e4m3"
    elif args.fp8 == "hybrid" and "grad=" not in spec and resolve(spec).grad != "e5m2":
        args.fp8_recipe = with_override(spec, "grad", "e5m2")
        where = "experts' gradients" if resolve(spec).dense else "gradients"
        return [f"--fp8-format hybrid: {where} in E5M2 ({args.fp8_recipe}); leave the flag out for this recipe's own formats"]
    return []


def validate(args: argparse.Namespace) -> list[str]:
    """Everything that our recipe cannot honour in these (parsed, not yet validated) Megatron arguments. One sentence each: flag, reason, way out."""
    if in_force(args) is None:
        return []
    experts = moe_arguments.refused(args) if is_flow(args.fp8_recipe) else []
    return _refused_flags(args) + experts + _refused_head(args) + _refused_optimizer(args) + _misaligned(args)


def _refused_flags(args: argparse.Namespace) -> list[str]:
    spec = args.fp8_recipe
    num_experts, cuda_graph = getattr(args, "num_experts", None), getattr(args, "cuda_graph_impl", "none")
    rules: list[tuple[Any, str]] = [
        (args.transformer_impl != "transformer_engine", f"--transformer-impl {args.transformer_impl}: only transformer_engine has FP8 layers; use it"),
        (not args.bf16, "--bf16 is missing: parameters and outputs are bf16 under these recipes (fp16 and fp32 are untested)"),
        (
            num_experts is not None and not is_flow(spec),
            f"--num-experts {num_experts}: {spec} is a dense recipe and TransformerEngine's GroupedLinear cannot dispatch a custom product; "
            "use --fp8-recipe fp8_flow_moe, or Megatron's blockwise or tensorwise",
        ),
        (args.fp8_param_gather, "--fp8-param-gather: parameters stay bf16 here (FP8 copies of weights are transient); drop the flag"),
        (getattr(args, "fp4", None) is not None, f"--fp4-format {getattr(args, 'fp4', None)}: exclusive with an FP8 recipe; drop one of them"),
        (getattr(args, "fp8_output_proj", False), f"--fp8-output-proj: Megatron's, for mxfp8; drop it{_head_in_fp8(spec)}"),
        (not getattr(args, "fp8_wgrad", True), f"--no-fp8-wgrad: an option of delayed scaling; {spec} has no bf16 wgrad. Drop the flag"),
        (getattr(args, "fp8_quantizer_factory", None) is not None, f"--fp8-quantizer-factory: belongs to --fp8-recipe custom, not to {spec}; drop one of them"),
        (args.tp_comm_overlap, "--tp-comm-overlap: TransformerEngine's userbuffers take no custom quantizers; drop the flag"),
        (
            cuda_graph not in (None, "none") or getattr(args, "enable_cuda_graph", False) or getattr(args, "external_cuda_graph", False),
            f"--cuda-graph-impl {cuda_graph}: a captured graph would freeze the predicted weight scales; use --cuda-graph-impl none",
        ),
        (
            getattr(args, "optimizer_cuda_graph", False),
            "--optimizer-cuda-graph: a replayed optimizer step does not report its learning rate to the weight scales; drop the flag",
        ),
        (
            getattr(args, "use_transformer_engine_op_fuser", False),
            "--use-transformer-engine-op-fuser: te.ops hands our quantizers to C++ kernels that do not know them; drop the flag",
        ),
        (getattr(args, "use_megatron_fsdp", False), f"--use-megatron-fsdp: {_FSDP}"),
        (getattr(args, "use_torch_fsdp2", False), f"--use-torch-fsdp2: {_FSDP}"),
        (getattr(args, "cpu_offloading_num_layers", 0) > 0, f"--cpu-offloading-num-layers: {_OFFLOAD}"),
        (getattr(args, "fine_grained_activation_offloading", False), f"--fine-grained-activation-offloading: {_OFFLOAD}"),
    ]
    return [message for wrong, message in rules if wrong]


def _head_in_fp8(spec: str) -> str:
    """How the LM head runs in FP8 under this specification, to follow "drop the flag"."""
    if resolve(spec).head_recipe is not None:
        return f" ({spec} runs the LM head in FP8 already)"
    return f" and use --fp8-recipe {with_override(spec, 'head', 'fp8')}" if resolve(spec).dense_recipe.quantize else ""


def head_in_bf16(spec: str) -> str:
    """The way out of what an LM head in FP8 cannot do, for users who never asked for one."""
    return f"{spec} runs the LM head in FP8 too: use --fp8-recipe {with_override(spec, 'head', 'bf16')} to leave it in bf16"


def _refused_head(args: argparse.Namespace) -> list[str]:
    """Problems of an LM head in FP8 (`head`)."""
    if resolve(args.fp8_recipe).head_recipe is None:
        return []
    rows, out = vocabulary_rows(args), head_in_bf16(args.fp8_recipe)
    rules = [
        (
            getattr(args, "defer_embedding_wgrad_compute", False),
            f"--defer-embedding-wgrad-compute: it keeps the LM head's operands in bf16 for a later product. Drop the flag, or: {out}",
        ),
        (args.mtp_num_layers, f"--mtp-num-layers {args.mtp_num_layers}: multi-token prediction shares the LM head, which was not tried in FP8. {out}"),
        (
            getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None),
            f"--hybrid-layer-pattern: the LM head runs in FP8 in Megatron's GPTModel only. {out}",
        ),
        (
            rows is not None and rows % ALIGNMENT,
            f"{rows} rows of the vocabulary on each of {args.tensor_model_parallel_size} ranks: the LM head's FP8 products need a multiple of {ALIGNMENT}. "
            f"Use --make-vocab-size-divisible-by {ALIGNMENT} or a multiple of it, or: {out}",
        ),
    ]
    return [message for wrong, message in rules if wrong]


def vocabulary_rows(args: argparse.Namespace) -> int | None:
    """Rows of the LM head on one rank, padded as Megatron will; None where only the tokenizer knows (`head.install` checks the layer itself)."""
    tp = args.tensor_model_parallel_size
    multiple = args.make_vocab_size_divisible_by * tp
    size, padded = getattr(args, "vocab_size", None), getattr(args, "padded_vocab_size", None)
    if padded is None and size is not None:
        padded = -(-size // multiple) * multiple
    return None if padded is None else padded // tp


def with_override(spec: str, key: str, value: str) -> str:
    """The specification with one field set to another value."""
    name, _, overrides = spec.partition(":")
    kept = [item for item in overrides.split(",") if item.strip() and item.partition("=")[0].strip() != key]
    return f"{name}:{','.join([*kept, f'{key}={value}'])}"


def _refused_optimizer(args: argparse.Namespace) -> list[str]:
    recipe = resolve(args.fp8_recipe)
    if "predicted" not in (recipe.weight_scale, recipe.dense_recipe.weight_scale) or getattr(args, "optimizer", "adam") != "adam":
        return []  # other optimizers are measured at every step and announced by the hook
    try:
        adam_update_bound(args.adam_beta1, args.adam_beta2)
    except ValueError as error:
        return [f"--adam-beta1 {args.adam_beta1} --adam-beta2 {args.adam_beta2}: {error}: {with_override(args.fp8_recipe, 'weight_scale', 'measured')}"]
    return []


def matrix_dimensions(args: argparse.Namespace) -> dict[str, int]:
    """Dimensions of the FP8 products on one rank, by the flags that set them."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    heads = args.num_attention_heads
    ffn = args.ffn_hidden_size or (int(4 * args.hidden_size * 2 / 3) // 64 * 64 if args.swiglu else 4 * args.hidden_size)
    channels = args.kv_channels or args.hidden_size // heads
    groups = args.num_query_groups if args.group_query_attention and args.num_query_groups else heads
    tokens = args.seq_length * args.micro_batch_size // cp // (tp if args.sequence_parallel else 1)
    attention = {
        f"--num-attention-heads * --kv-channels / TP {tp}": heads * channels // tp,
        f"(heads + 2 * groups) * --kv-channels / TP {tp}": (heads + 2 * groups) * channels // tp,
    }
    return {
        "--hidden-size": args.hidden_size,
        f"--ffn-hidden-size / TP {tp}": ffn // tp,
        **({} if getattr(args, "multi_latent_attention", False) else attention),  # MLA has projections of its own, which TransformerEngine checks
        "tokens of a microbatch on one rank (--seq-length * --micro-batch-size / CP / TP with --sequence-parallel)": tokens,
    }


def _misaligned(args: argparse.Namespace) -> list[str]:
    if None in (args.hidden_size, args.num_attention_heads, args.seq_length, args.micro_batch_size):
        return []  # Megatron names the missing flag itself
    return [f"{name} is {size}: FP8 products need multiples of {ALIGNMENT}" for name, size in matrix_dimensions(args).items() if size % ALIGNMENT]


def check(args: argparse.Namespace) -> None:
    """Raise RecipeError with every problem that `validate` finds."""
    problems = validate(args)
    if problems:
        raise RecipeError(f"--fp8-recipe {args.fp8_recipe} cannot be honoured:\n" + "\n".join(f"  - {p}" for p in problems))
