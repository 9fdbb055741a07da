"""FP8 attention on the command line: which recipes allow it, what it asks of the model, and recipe ``fog`` in terms of Megatron's own flags.

    --fp8-recipe fog                       delayed scaling and FP8 attention, as published
    --fp8-recipe moss --fp8-attention      this package's quantisation of the linears, TransformerEngine's FP8 attention (= moss:attention=fp8)
    --fp8-recipe delayed --fp8-format hybrid --fp8-attention

TransformerEngine has one FP8 attention for Hopper: cuDNN's, with delayed scaling. Where that cannot run, TransformerEngine ends with "no backend" deep in the
first layer, or goes on in bf16 (NVTE_DPA_FP8_RECIPE=F16); both are refused here by name.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ..recipe import RecipeError
from ..te.attention import cudnn_version, dots, wrong
from . import delayed_state

# The limits of TransformerEngine's FP8 attention on Hopper, and where upstream states them: [1] get_attention_backend in TransformerEngine 2.20.2
# (pytorch/attention/dot_product_attention/utils.py), [2] nvte_get_fused_attn_backend before 2.20 (common/fused_attn/fused_attn.cpp; 2.20 asks cuDNN instead),
# [3] cudnn-frontend 1.32 (node/sdpa_fp8_bwd.h), whose checks 2.20 runs. Any whole ratio of query to key heads is taken [3]. Which cuDNN is right: te.attention.
HEAD = 128
"""Features per head, of queries, keys and values [2, 3]: the backward pass takes no other, the forward pass up to 256."""
BOUNDED = ("rmsnorm_frozen", "tanh")
"""What of `Architecture.qk` keeps attention's logits below a bound that does not move."""
HISTORY = 1024
"""Steps whose maxima delayed scaling looks at, as in the paper; TransformerEngine's algorithm "max"."""

_NOT_HERE = {
    "tensorwise": "TransformerEngine's FP8 attention with current scaling needs Blackwell",
    "mxfp8": "MXFP8 needs Blackwell",
    "blockwise": "TransformerEngine has no FP8 attention under block scaling",
    "custom": "a quantizer factory says nothing about attention",
}


def extend_parser(parser: argparse.ArgumentParser) -> None:
    """Add --fp8-attention. Idempotent."""
    if not any("--fp8-attention" in action.option_strings for action in parser._actions):
        group = parser.add_argument_group("FP8 attention (fp8_recipes)")
        text = f"QK^T and PV in FP8, forward and backward (cuDNN; heads of {HEAD}), under recipes that allow it: fog (always on), delayed, moss, row"
        group.add_argument("--fp8-attention", action="store_true", help=text)


def prepare(args: argparse.Namespace, argv: list[str] | None = None) -> list[str]:
    """Turn FP8 attention and recipe ``fog`` into what Megatron and `arguments` read, in place; returns notes. Raises RecipeError where it cannot run."""
    from . import arguments

    argv = sys.argv if argv is None else argv
    asked, spec = getattr(args, "fp8_attention", False), args.fp8_recipe
    if not arguments.is_ours(spec):
        if not asked:
            return []
        if spec != "delayed" or args.fp8 is None:
            raise RecipeError(f"--fp8-attention: {_reason(args)}. Use --fp8-recipe fog, delayed (with --fp8-format hybrid) or moss, or drop the flag")
        args.fp8_dot_product_attention = True
        return _checked(args, "delayed")
    if asked and arguments.resolve(str(spec)).attention != "fp8":
        try:
            args.fp8_recipe = arguments.with_override(str(spec), "attention", "fp8")
            arguments.resolve(args.fp8_recipe)
        except RecipeError as error:
            raise RecipeError(f"--fp8-attention with --fp8-recipe {spec}: {error}") from None
    recipe = arguments.resolve(str(args.fp8_recipe))
    notes = _as_stock(args, recipe, argv) if recipe.stock else []
    return notes + (_checked(args, spec) if recipe.attention == "fp8" else [])


def _reason(args: argparse.Namespace) -> str:
    if args.fp8 is None:
        return "attention in FP8 needs an FP8 recipe, and this run trains in bf16"
    return f"not under --fp8-recipe {args.fp8_recipe}: {_NOT_HERE[str(args.fp8_recipe)]}"


def _as_stock(args: argparse.Namespace, recipe: Any, argv: list[str]) -> list[str]:
    """Recipe ``fog`` as Megatron's own flags. What the user gave explicitly stays, unless it contradicts the recipe."""
    spec, formats = args.fp8_recipe, "hybrid" if recipe.grad == "e5m2" else "e4m3"
    if args.fp8 not in (None, formats):
        other = "e4m3" if formats == "hybrid" else "e5m2"
        raise RecipeError(f"--fp8-format {args.fp8}: {spec} has grad={recipe.grad}; leave the flag out, or use --fp8-recipe {recipe.name}:grad={other}")

    def given(flag: str) -> bool:
        return any(item == flag or item.startswith(flag + "=") for item in argv)

    args.fp8_recipe, args.fp8, args.fp8_delayed_recipe = recipe.stock, formats, spec  # the last: `calibration` tells it from Megatron's own by it
    args.fp8_dot_product_attention = recipe.attention == "fp8"
    if not given("--fp8-amax-history-len"):
        args.fp8_amax_history_len = HISTORY
    if not given("--fp8-amax-compute-algo"):
        args.fp8_amax_compute_algo = "max"
    history = f"amax history {args.fp8_amax_history_len}, {args.fp8_amax_compute_algo}, margin {args.fp8_margin}"
    return [f"--fp8-recipe {spec}: Megatron's {recipe.stock} scaling, {formats}, {history}"]


def _checked(args: argparse.Namespace, spec: str) -> list[str]:
    problems = refused(args)
    if problems:
        raise RecipeError(f"FP8 attention (--fp8-recipe {spec}) cannot run:\n" + "\n".join(f"  - {p}" for p in problems))
    version = cudnn_version()
    cudnn = f"cuDNN {dots(version)}" if version else "cuDNN"
    return [f"attention: QK^T and PV in FP8, forward and backward (TransformerEngine, {cudnn}, delayed scaling)", *_unbounded(args)]


def _unbounded(args: argparse.Namespace) -> list[str]:
    """A warning where nothing keeps queries and keys small. A norm with trained gains does not: OLMo2 and OP diverged in FOG's paper (arXiv 2505.20524)."""
    from .fog_arguments import architecture_of

    architecture = architecture_of(args)
    if architecture is not None and architecture.qk in BOUNDED:
        return []
    return [
        "WARNING: FP8 attention, and nothing in this architecture bounds queries and keys: Llama3 diverged like this (docs/metrics.md, \"Does the metric warn "
        "first?\"). --fog flash, opt and max bear it; otherwise leave attention in bf16, or watch --fp8-metrics-log"
    ]


def refused(args: argparse.Namespace) -> list[str]:
    """What these (parsed, not yet validated) arguments ask of FP8 attention that it cannot do. One sentence each: flag, reason, way out."""
    rules = _shapes(args) + _features(args) + _environment(args) + (_own(args) if args.fp8_recipe != "delayed" else [])
    return [message for wrong, message in rules if wrong]


def _shapes(args: argparse.Namespace) -> list[tuple[Any, str]]:
    heads, hidden, groups, seq = args.num_attention_heads, args.hidden_size, args.num_query_groups, args.seq_length
    if None in (heads, hidden, seq):
        return []  # Megatron names the missing flag itself
    head, grouped = args.kv_channels or hidden // heads, args.group_query_attention and groups
    tp = args.tensor_model_parallel_size
    return [
        (
            head != HEAD,
            f"--num-attention-heads {heads} --hidden-size {hidden}: heads of {head} features, and cuDNN trains heads of {HEAD} only; "
            f"use --num-attention-heads {max(1, hidden // HEAD)}, or --kv-channels {HEAD}",
        ),
        (grouped and heads % groups, f"--num-query-groups {groups}: {heads} query heads are not a multiple of it; choose a divisor of --num-attention-heads"),
        (grouped and groups < tp, f"--num-query-groups {groups}: fewer than --tensor-model-parallel-size {tp}; give each rank a key head of its own"),
    ]


def _features(args: argparse.Namespace) -> list[tuple[Any, str]]:
    backend = str(getattr(args.attention_backend, "name", args.attention_backend))
    packed = [flag for flag in ("sft", "dataloader_inter_document_masking") if getattr(args, flag, False)]
    selective = args.recompute_granularity == "selective" or getattr(args, "recompute_activations", False)
    return [
        (backend not in ("auto", "fused"), f"--attention-backend {backend}: only cuDNN's fused attention trains in FP8; leave the flag out, or use fused"),
        (args.transformer_impl != "transformer_engine", f"--transformer-impl {args.transformer_impl}: use transformer_engine"),
        (args.attention_dropout > 0, f"--attention-dropout {args.attention_dropout}: not tried in FP8; use --attention-dropout 0"),
        (args.softmax_type != "vanilla", f"--softmax-type {args.softmax_type}: not in FP8 on Hopper; use vanilla"),  # [1]
        (getattr(args, "window_size", None) is not None, "--window-size: no sliding window in FP8 on Hopper; drop the flag"),  # [1]
        (args.reset_attention_mask, "--reset-attention-mask: FP8 attention knows the causal mask only; drop the flag"),
        (packed, f"--{' --'.join(packed).replace('_', '-')}: packed sequences have no backward pass in FP8 on Hopper; drop the flag"),  # [3]
        (args.multi_latent_attention, f"--multi-latent-attention: keys and values of different sizes, and FP8 attention takes {HEAD} for both"),  # [3]
        (
            getattr(args, "qk_clip", False) or getattr(args, "log_max_attention_logit", False),
            "--qk-clip / --log-max-attention-logit: FP8 attention does not return its largest logit; drop the flag (FOG bounds it by construction)",
        ),
        (
            selective and "core_attn" in (args.recompute_modules or ["core_attn"]),
            "--recompute-modules core_attn (the default of selective recompute): Megatron's second forward pass of attention would run in bf16; "
            "use --recompute-granularity full, or --recompute-modules mlp",
        ),
        (args.first_last_layers_bf16, "--first-last-layers-bf16: attention's maxima are kept by one FP8 region around all layers; drop the flag"),
        (
            getattr(args, "non_persistent_ckpt_type", None) == "local",
            "--non-persistent-ckpt-type local: maxima and scales are kept in persistent and global checkpoints; use global",
        ),
        (
            args.ckpt_format not in delayed_state.FORMATS and (args.save or args.load),
            f"--ckpt-format {args.ckpt_format}: maxima and scales are kept in {' and '.join(delayed_state.FORMATS)}; use one of these",
        ),
    ]


def _environment(args: argparse.Namespace) -> list[tuple[Any, str]]:
    reason = wrong(cudnn_version())
    off = [f"{name}={os.environ[name]}" for name, values in _OFF.items() if os.environ.get(name) in values]
    return [
        (reason, reason or ""),
        (off, f"{', '.join(off)} in the environment turns FP8 attention off, or half of it; unset it"),
    ]


_OFF = {
    "NVTE_FUSED_ATTN": ("0",),
    "NVTE_FP8_DPA_BWD": ("0",),
    "NVTE_DPA_FP8_RECIPE": ("F16", "Float8CurrentScaling", "MXFP8BlockScaling"),
}
"""Environment variables of TransformerEngine, and their values, under which FP8 attention would not run as asked on Hopper [1]."""


def _own(args: argparse.Namespace) -> list[tuple[Any, str]]:
    """Of this package's recipes with FP8 attention, which ride on TransformerEngine's CustomRecipe."""
    cp = args.context_parallel_size
    return [
        (cp > 1, f"--context-parallel-size {cp}: TransformerEngine takes custom recipes with FP8 attention on one rank's sequence only; use --fp8-recipe fog"),
        (
            args.recompute_granularity == "selective" and "layernorm" in (args.recompute_modules or []),
            "--recompute-modules layernorm: would move attention's maxima on at every layer (Megatron refuses it for delayed scaling too); drop layernorm",
        ),
        (getattr(args, "te_precision_config_file", None), "--te-precision-config-file: not tried with FP8 attention; drop the flag"),
    ]
