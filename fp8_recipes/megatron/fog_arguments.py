"""Flags of the architectures: one that sets what the paper sets, one for each part, and every contradiction refused before anything is built.

--fog flash                         FOG-flash: everything below as in arXiv 2505.20524
--arch op                           a baseline of that paper, or any name and overrides that `architecture.from_name` takes
--no-pre-norm --post-norm ...       parts, on top of --fog, of --arch, or of the model that Megatron's own flags describe
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

from ..architecture import ARCHITECTURES, UNGATED_WIDTH, Architecture, ArchitectureError, from_name
from ..recipe import RecipeError

SPEC = ["fp8_recipes.megatron.fog", "layer_spec"]
"""What --spec becomes."""
VARIANTS = ("max", "opt", "flash")


@dataclass(frozen=True)
class Part:
    """One flag: its name, the field of `Architecture` it sets, and how argparse takes its value (constant: the value, for a flag without one)."""

    flag: str
    field: str
    help: str
    constant: bool | None = None
    kind: Any = str
    choices: tuple[str, ...] | None = None

    @property
    def dest(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")


PARTS = (
    Part("--no-pre-norm", "pre_norm", "no norm on the input of attention and FFN", constant=False),
    Part("--post-norm", "post_norm", "RMSNorm on the output of attention and FFN, before the residual addition", constant=True),
    Part("--post-norm-gain", "post_norm_gain", "initial gain of --post-norm: one, or depth = 1/sqrt(layers)", choices=("one", "depth")),
    Part("--layer-scale", "layer_scale", "a trained gain per feature on the same outputs, initially 1/sqrt(layers), without the norm", constant=True),
    Part("--no-final-norm", "final_norm", "no norm before the LM head", constant=False),
    Part(
        "--qk-bound",
        "qk",
        "bound of queries and keys, per head and before the rotary positions; rmsnorm_frozen has no gains, tanh has one trained alpha each",
        choices=("none", "rmsnorm", "rmsnorm_frozen", "tanh"),
    ),
    Part("--qk-tanh-alpha", "tanh_alpha", "initial alpha of --qk-bound tanh (default 0.5)", kind=float),
    Part("--softmax-gain", "softmax_gain", "attention's softmax scale times the square root of the head's size (default 1; FOG: sqrt(2))", kind=float),
    Part("--embedding-norm", "embedding", "plain, or unit: embeddings multiplied by 1 / their initial standard deviation", choices=("plain", "unit")),
    Part("--activation", "activation", "of the FFN; gelu and xielu have no gate", choices=("swiglu", "smooth_swiglu", "gelu", "xielu")),
)


def extend_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a Megatron parser. Idempotent."""
    if any("--fog" in action.option_strings for action in parser._actions):
        return
    group = parser.add_argument_group("architecture (fp8_recipes)")
    group.add_argument("--fog", choices=VARIANTS, default=None, help="FOG (arXiv 2505.20524): an architecture whose every product can run in FP8")
    group.add_argument("--arch", metavar="NAME[:KEY=VALUE,...]", default=None, help=f"an architecture of fp8_recipes: {', '.join(ARCHITECTURES)}")
    for part in PARTS:
        if part.constant is not None:
            group.add_argument(part.flag, action="store_const", const=part.constant, default=None, help=part.help)
        else:
            group.add_argument(part.flag, type=part.kind, choices=part.choices, default=None, help=part.help)
    group.add_argument(
        "--ffn-width-factor",
        type=float,
        default=None,
        help=f"multiplies --ffn-hidden-size, --moe-ffn-hidden-size and --moe-shared-expert-intermediate-size (default: {UNGATED_WIDTH} under --fog or --arch "
        "where the activation has no gate, so that the flags mean the width of a gated FFN with as many weights; 1 otherwise)",
    )


def asked(args: Any) -> bool:
    """Does the command line describe an architecture in our terms?"""
    return any(getattr(args, name, None) is not None for name in ("fog", "arch", *(part.dest for part in PARTS)))


def architecture_of(args: Any) -> Architecture | None:
    """The architecture that these arguments ask for, None if they leave everything to Megatron. Raises ArchitectureError on contradictions."""
    if not asked(args):
        return None
    fog, arch = getattr(args, "fog", None), getattr(args, "arch", None)
    if fog and arch:
        raise ArchitectureError(f"--fog {fog} and --arch {arch}: two architectures; drop one of them")
    given = {part.field: getattr(args, part.dest) for part in PARTS if getattr(args, part.dest, None) is not None}
    base = from_name(f"fog-{fog}") if fog else from_name(arch) if arch else Architecture("custom", activation="swiglu" if args.swiglu else "gelu")
    try:
        return base.with_overrides(**given)
    except ArchitectureError as error:
        flags = ", ".join(part.flag for part in PARTS if part.field in given and f"{part.field}=" in str(error))
        raise ArchitectureError(f"{flags}: {error}" if flags else str(error)) from None


def prepare(args: argparse.Namespace, argv: list[str] | None = None) -> list[str]:
    """Refuse what contradicts the architecture, then set what it implies, in place; returns notes for the user. Runs before Megatron validates, once."""
    try:
        architecture = architecture_of(args)
    except ArchitectureError as error:
        raise RecipeError(str(error)) from None
    if architecture is None:
        if getattr(args, "ffn_width_factor", None) is not None:
            raise RecipeError("--ffn-width-factor: belongs to --fog, --arch or a flag of their parts; give --ffn-hidden-size as it shall be")
        return []
    argv = sys.argv if argv is None else argv
    problems = refused(args, architecture, argv)
    if problems:
        raise RecipeError(f"architecture {architecture.name!r} cannot be built:\n" + "\n".join(f"  - {p}" for p in problems))
    args.spec = list(SPEC)
    args.normalization = "RMSNorm"
    args.swiglu = architecture.gated
    if not architecture.gated:
        args.bias_gelu_fusion = False  # the fused form is the tanh approximation and wants a bias
    if architecture.activation == "smooth_swiglu":
        args.bias_swiglu_fusion = False
    return [f"architecture {architecture}", *_widen(args, architecture), *_derived(args, architecture), *_unlike_the_paper(args, architecture)]


def _unlike_the_paper(args: argparse.Namespace, architecture: Architecture) -> list[str]:
    """What Megatron's defaults or other flags make of a FOG that its paper has not. They may stay: nothing here depends on them."""
    if not architecture.name.startswith("fog-"):
        return []
    positions = args.position_embedding_type
    different = [
        (positions != "rope", f"positions are {positions}; the paper's are rotary: --position-embedding-type rope"),
        (args.add_bias_linear, "linear layers have biases; the paper's have none: --disable-bias-linear"),
        (args.add_qkv_bias, "Q, K and V have biases; the paper's have none: drop --add-qkv-bias"),
    ]
    return [f"{architecture.name}: {text}" for wrong, text in different if wrong]


def _widen(args: argparse.Namespace, architecture: Architecture) -> list[str]:
    named = args.fog is not None or args.arch is not None
    factor = args.ffn_width_factor if args.ffn_width_factor is not None else UNGATED_WIDTH if named and not architecture.gated else 1.0
    if factor == 1.0:
        return []
    args.ffn_hidden_size = args.ffn_hidden_size or int(4 * args.hidden_size * 2 / 3) // 64 * 64  # Megatron's default for a gated FFN
    notes = []
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        width = getattr(args, name)
        if width is None:  # experts are then as wide as the dense FFN
            continue
        flag, wide = f"--{name.replace('_', '-')}", width * factor
        if not wide > 0 or wide != int(wide):
            raise RecipeError(f"--ffn-width-factor {factor} times {flag} {width} is {wide}: the FFN's width must be a positive whole number")
        setattr(args, name, int(wide))
        notes.append(f"FFN {int(wide)} wide = {factor} x {flag} {width} (--ffn-width-factor)")
    return notes


def _derived(args: argparse.Namespace, architecture: Architecture) -> list[str]:
    """The numbers that the architecture means at this size."""
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    std = args.embedding_init_method_std if args.embedding_init_method_std is not None else args.init_method_std
    numbers = {
        "softmax scale": architecture.softmax_scale(head),
        "embedding multiplier": architecture.embedding_multiplier(std),
        "initial gain of a branch's output": architecture.branch_gain(args.num_layers),
    }
    return [", ".join(f"{name} {value:.6g}" for name, value in numbers.items())]


def refused(args: argparse.Namespace, architecture: Architecture, argv: list[str]) -> list[str]:
    """What these (parsed, not yet validated) arguments ask for beside the architecture that it contradicts. One sentence each: flag, reason, way out."""
    rules = _norms(args, architecture, argv) + _activation(args, architecture) + _attention(args, architecture) + _elsewhere(args, architecture)
    return [message for wrong, message in rules if wrong]


def _norms(args: argparse.Namespace, architecture: Architecture, argv: list[str]) -> list[tuple[Any, str]]:
    chosen = any(item == "--normalization" or item.startswith("--normalization=") for item in argv)
    pre = "is about the norm on a branch's input, and this architecture has none; drop the flag"
    return [
        (chosen and args.normalization != "RMSNorm", f"--normalization {args.normalization}: these architectures have RMSNorm; leave the flag out"),
        (args.layernorm_zero_centered_gamma, "--apply-layernorm-1p: gains start at values of their own here, stored as they are; drop the flag"),
        (args.apply_residual_connection_post_layernorm, "--apply-residual-connection-post-layernorm: takes the residual from a norm; drop the flag"),
        (args.fused_residual_rmsnorm and not architecture.pre_norm, f"--fused-residual-rmsnorm: {pre}"),
        (
            args.recompute_modules and "layernorm" in args.recompute_modules and not architecture.pre_norm,
            f"--recompute-modules layernorm: {pre}",
        ),
    ]


def _activation(args: argparse.Namespace, architecture: Architecture) -> list[tuple[Any, str]]:
    name, activation = architecture.name, architecture.activation
    xielu_experts = args.num_experts and activation == "xielu"
    pair = f"{name} has activation=xielu, whose trained pair all experts of a layer share"
    others = ("squared_relu", "quick_geglu", "openai_gelu")
    other = [f"--{flag.replace('_', '-')}" for flag in others if getattr(args, flag, False)]
    gate = f"{name} has activation={activation}, which has no gate; drop --swiglu, or use --arch llama3, olmo2 or smooth-swiglu"
    return [
        (args.swiglu and not architecture.gated, f"--swiglu: {gate}"),
        (other, f"{', '.join(other)}: {name} has activation={activation}; drop the flag, or choose one with --activation"),
        (
            args.activation_func_clamp_value is not None or args.glu_linear_offset,
            "--activation-func-clamp-value / --glu-linear-offset: a clamped or shifted activation is none of these architectures'; drop the flag",
        ),
        (args.use_te_activation_func, "--use-te-activation-func: TransformerEngine's GeLU is the tanh approximation, and it has no xIELU; drop the flag"),
        (
            activation == "smooth_swiglu" and args.tensor_model_parallel_size > 1,
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: smooth_swiglu's factor is a maximum over the whole FFN; use 1",
        ),
        (
            args.num_experts and activation == "smooth_swiglu",
            f"--num-experts {args.num_experts}: smooth_swiglu has a factor per token behind the FFN, which is not built for experts; use --fog or swiglu",
        ),
        (xielu_experts and not args.moe_grouped_gemm, f"--moe-grouped-gemm is missing: {pair}, which one module has to hold; add the flag"),
        (
            xielu_experts and args.transformer_impl == "local",
            f"--transformer-impl local: {pair}, and it builds each expert as a module of its own; use transformer_engine",
        ),
        (xielu_experts and args.use_grouped_gemm_for_shared_expert, "--use-grouped-gemm-for-shared-expert: has no xIELU; drop the flag"),
        (xielu_experts and args.moe_use_upcycling, "--moe-use-upcycling: would leave the dense FFN's trained pair behind; train the experts from the start"),
    ]


def _attention(args: argparse.Namespace, architecture: Architecture) -> list[tuple[Any, str]]:
    heads, groups = args.num_attention_heads, args.num_query_groups
    qk = f"{architecture.name} has qk={architecture.qk}; drop the flag, or choose with --qk-bound"
    return [
        (args.qk_layernorm, f"--qk-layernorm: a norm with trained gains, and {qk}"),
        (args.qk_l2_norm, f"--qk-l2-norm: {qk}"),
        (args.multi_latent_attention, "--multi-latent-attention: queries and keys of MLA are built elsewhere; these architectures have grouped queries"),
        (args.experimental_attention_variant is not None, "--experimental-attention-variant: has specs of its own; drop the flag"),
        (args.attention_output_gate, "--attention-output-gate: none of these architectures has one; drop the flag"),
        (args.apply_query_key_layer_scaling, "--apply-query-key-layer-scaling: the softmax scale is fixed here; drop the flag"),
        (
            args.group_query_attention and heads and groups and heads % groups,
            f"--num-query-groups {groups}: {heads} query heads are not a multiple of it; choose a divisor of --num-attention-heads",
        ),
    ]


def _elsewhere(args: argparse.Namespace, architecture: Architecture) -> list[tuple[Any, str]]:
    """Flags that build the model in another way."""
    mup = "has an embedding multiplier, softmax scale and initialisation of its own; drop one of them"
    again = "would take the FFN's width from the checkpoint, where it is widened already; give the model's flags"
    own_spec = args.spec is not None and list(args.spec) != SPEC
    return [
        (own_spec, f"--spec {' '.join(args.spec or [])}: the architecture is itself a layer spec; drop one of them"),
        (args.transformer_impl == "inference_optimized", "--transformer-impl inference_optimized: use transformer_engine"),
        (args.use_mup, f"--use-mup: {mup}"),
        (getattr(args, "use_checkpoint_args", False), f"--use-checkpoint-args: {again}"),
        (args.use_transformer_engine_op_fuser, "--use-transformer-engine-op-fuser: its fused MLP has a norm in front; drop the flag"),
        (args.mtp_num_layers, f"--mtp-num-layers {args.mtp_num_layers}: multi-token prediction has norms of its own; drop the flag"),
        (args.init_model_with_meta_device, "--init-model-with-meta-device: gains are set where they are built; drop the flag"),
        (args.heterogeneous_layers_config_path is not None, "--heterogeneous-layers-config-path: has specs of its own; drop one of them"),
        (getattr(args, "yaml_cfg", None) is not None, "--yaml-cfg: the architecture's numbers do not reach it; give the model by flags"),
        (getattr(args, "use_megatron_fsdp", False) or getattr(args, "use_torch_fsdp2", False), "FSDP: not tried; use --use-distributed-optimizer"),
        (not math.isfinite(args.init_method_std) or args.init_method_std <= 0, f"--init-method-std {args.init_method_std}: must be positive"),
    ]
