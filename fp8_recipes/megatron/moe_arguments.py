"""What `moe=flow` recipes cannot honour in Megatron's arguments: one sentence per flag, with the reason and the way out. Checked before anything is built."""

from __future__ import annotations

import argparse
from typing import Any

ALIGNMENT = 16
"""Widths of the experts' products are multiples of this (16-byte rows for TMA)."""
MAX_TOPK = 8
"""Largest --moe-router-topk that was checked."""


def refused(args: argparse.Namespace) -> list[str]:
    """Problems of a recipe that runs MoE layers itself. ``args``: parsed, not yet validated by Megatron."""
    if not args.num_experts:
        return [f"--num-experts is missing: {args.fp8_recipe} is a recipe for mixture-of-experts models; use --fp8-recipe moss for a dense one"]
    rules = _routing(args) + _experts(args) + _parallelism(args) + _schedule(args)
    return [message for wrong, message in rules if wrong] + _misaligned(args)


def _routing(args: argparse.Namespace) -> list[tuple[Any, str]]:
    capacity = "drops or pads tokens to a capacity, and rows are not counted in advance here; drop the flag (dropless)"
    dispatcher, backend = args.moe_token_dispatcher_type, getattr(args, "moe_flex_dispatcher_backend", "deepep")
    flex = dispatcher == "flex" and backend != "deepep"
    return [
        (args.moe_expert_capacity_factor is not None, f"--moe-expert-capacity-factor {args.moe_expert_capacity_factor}: {capacity}"),
        (args.moe_pad_expert_input_to_capacity, f"--moe-pad-expert-input-to-capacity: {capacity}"),
        (args.moe_expert_rank_capacity_factor is not None, f"--moe-expert-rank-capacity-factor: {capacity}"),
        (args.moe_router_topk > MAX_TOPK, f"--moe-router-topk {args.moe_router_topk}: checked up to {MAX_TOPK}; use fewer experts per token"),
        (args.moe_apply_probs_on_input, "--moe-apply-probs-on-input: probabilities are multiplied into the activation here; drop the flag"),
        (args.moe_latent_size is not None, "--moe-latent-size: latent MoE projects in bf16 between router and dispatch; drop the flag"),
        (
            dispatcher == "allgather",
            "--moe-token-dispatcher-type allgather (Megatron's default): tokens travel in FP8 by all-to-all here; use --moe-token-dispatcher-type alltoall",
        ),
        (flex, f"--moe-flex-dispatcher-backend {backend}: of the flex backends only deepep takes FP8; use deepep, or --moe-token-dispatcher-type alltoall"),
    ]


def _experts(args: argparse.Namespace) -> list[tuple[Any, str]]:
    other = ", ".join(f"--{flag.replace('_', '-')}" for flag in ("squared_relu", "quick_geglu", "openai_gelu") if getattr(args, flag, False))
    shifted = args.activation_func_clamp_value is not None or args.glu_linear_offset
    single = args.moe_single_grouped_weight or args.moe_single_grouped_bias
    shared_overlap = "a second stream of Megatron's own dispatcher, which is not used here, computes them; drop the flag (shared experts then run before it)"
    return [
        (not args.moe_grouped_gemm, "--moe-grouped-gemm is missing: the experts' parameters are those of Megatron's grouped MLP; add the flag"),
        (other, f"activation {other}: the experts compute SwiGLU (--swiglu) or, without a flag, exact GeLU; drop the flag"),
        (
            args.use_te_activation_func and not args.swiglu,
            "--use-te-activation-func: TransformerEngine's GeLU is the tanh approximation, and the experts compute the exact one; drop the flag",
        ),
        (shifted, "--activation-func-clamp-value / --glu-linear-offset: the experts compute plain SwiGLU or GeLU; drop the flag"),
        (args.add_bias_linear, "--disable-bias-linear is missing: the experts' products have no bias; add the flag"),
        (single, "--moe-single-grouped-weight / -bias: one parameter per expert is expected (weight0, weight1, ...); drop the flag"),
        (args.moe_mlp_glu_interleave_size is not None, "--moe-mlp-glu-interleave-size: gate and up are the halves of fc1's output here; drop the flag"),
        (args.moe_use_upcycling, "--moe-use-upcycling: convert the checkpoint under --fp8-recipe bf16 first, then train from it"),
        (args.moe_shared_expert_overlap, f"--moe-shared-expert-overlap: {shared_overlap}"),
        (args.use_grouped_gemm_for_shared_expert, "--use-grouped-gemm-for-shared-expert: its quantisers are TransformerEngine's own; drop the flag"),
        (args.moe_paged_stash, "--moe-paged-stash: it stashes TransformerEngine's own tensors; use --recompute-modules moe, which saves FP8 only"),
    ]


def _parallelism(args: argparse.Namespace) -> list[tuple[Any, str]]:
    tensor, expert = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    expert = tensor if expert is None else expert  # Megatron's default
    shards = getattr(args, "expert_tensor_parallel_num_weight_shards", None)
    return [
        (expert > 1, f"--expert-tensor-parallel-size {expert}: an expert's weights are whole on one rank here; use --expert-tensor-parallel-size 1"),
        (shards not in (None, expert), f"--expert-tensor-parallel-num-weight-shards {shards}: an expert's weights are whole on one rank here; drop the flag"),
        (
            tensor > 1 and not args.sequence_parallel,
            f"--tensor-model-parallel-size {tensor} without --sequence-parallel: Megatron's MoE layers need both in training; add the flag",
        ),
    ]


def _schedule(args: argparse.Namespace) -> list[tuple[Any, str]]:
    one = "the layer is one function from dispatch to combine, which nothing else can be scheduled into; drop the flag"
    return [
        (args.delay_wgrad_compute, f"--delay-wgrad-compute: {one}"),
        (args.overlap_moe_expert_parallel_comm, f"--overlap-moe-expert-parallel-comm: {one}"),
        (args.overlap_dispatch_backward_with_experts_wgrad, f"--overlap-dispatch-backward-with-experts-wgrad: {one}"),
        (args.mtp_num_layers, f"--mtp-num-layers {args.mtp_num_layers}: multi-token prediction with experts was not tried; drop the flag"),
    ]


def _misaligned(args: argparse.Namespace) -> list[str]:
    sizes = {
        "--moe-ffn-hidden-size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        f"--moe-shared-expert-intermediate-size / TP {args.tensor_model_parallel_size}": (
            args.moe_shared_expert_intermediate_size and args.moe_shared_expert_intermediate_size / args.tensor_model_parallel_size
        ),
    }
    return [f"{name} is {size}: FP8 products need multiples of {ALIGNMENT}" for name, size in sizes.items() if size and size % ALIGNMENT]
