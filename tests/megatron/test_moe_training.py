"""Real MoE training through scripts/launch.sh on GPUs: fp8_flow_moe and its options against bf16, which way ran, checkpoints bit for bit, two GPUs.

Each run is its own process, as users start it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import STEPS, assert_near, one_gpu, resume, two_gpus  # noqa: E402

MODEL = "moe_tiny"
FLAGS = "--ckpt-format torch_dist"
FLOW = "local experts as one FP8 function from router to combined output"


def auxiliary(log: str, name: str) -> list[float]:
    """Values of one of the router's losses in Megatron's log, by step."""
    return [float(value) for value in re.findall(rf"{name}: ([0-9.E+-]+) \|", log)]


def resume_experts(out: Path, **environment: str) -> None:
    """From and into bf16 with Megatron's own MoE layer."""
    resume(out, "fp8_flow_moe", MODEL=MODEL, **environment)
    assert FLOW in (out / "resumed.log").read_text() and FLOW not in (out / "into_bf16.log").read_text()


SHARED = "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 256 --moe-router-topk 6 --moe-z-loss-coeff 1e-3"
SIGMOID = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss --first-last-layers-bf16"
SELECTIVE = "--recompute-granularity selective --recompute-modules"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize("recipe", ["fp8_flow_moe", "fp8_flow_moe:dense=bf16", "fp8_flow_moe:moe_saved=activation,grad=e5m2"])
    def test_recipe_learns_as_bf16(self, train, recipe):
        losses, log = train(recipe)
        assert_near(losses, train("bf16")[0])
        assert f"MoE layers 1-4: 8 {FLOW}; no dispatch (one rank)" in log
        assert f"kept for backward: {'activation' if 'activation' in recipe else 'h'}" in log
        assert ("FP8 moss" in log) == ("FP8 moss, dy e5m2" in log) == ("dense=bf16" not in recipe), "the LM head goes with the dense layers"

    def test_scales_of_dense_and_expert_weights_are_predicted(self, train):
        """4 layers: 2 linears of the attention, 8 experts with 2 weights each; and the LM head."""
        assert "73 weight scales predicted" in train("fp8_flow_moe")[1]
        assert "64 weight scales predicted" in train("fp8_flow_moe:dense=bf16")[1]

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (SHARED, [f"MoE layers 2-4: 8 {FLOW}", "1 MLPs: in FP8 layers norm, fc1, SwiGLU and fc2 as one function", "shared_experts.linear_fc1"]),
            (SIGMOID, [f"MoE layers 2-3: 8 {FLOW}", "MoE layers 1,4: Megatron's own modules, bf16 (first / last)"]),
            ("--no-gradient-accumulation-fusion --moe-router-fusion", [f"MoE layers 1-4: 8 {FLOW}"]),
        ],
        ids=["shared", "sigmoid", "fusion"],
    )
    def test_option_learns_as_bf16_with_the_same_option(self, train, flags, words):
        losses, log = train("fp8_flow_moe", flags)
        assert_near(losses, train("bf16", "" if "fusion" in flags else flags)[0])
        for expected in words:
            assert expected in log

    def test_router_losses_are_logged_as_in_bf16(self, train):
        for name in ("load_balancing_loss", "z_loss"):
            ours, stock = (auxiliary(train(recipe, SHARED)[1], name) for recipe in ("fp8_flow_moe", "bf16"))
            assert len(ours) == len(stock) == STEPS
            assert ours == pytest.approx(stock, rel=0.05), name

    @pytest.mark.parametrize(
        ("flags", "kept"), [(f"{SELECTIVE} moe layernorm", "input"), ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "h")]
    )
    def test_recompute_changes_no_forward_pass(self, train, flags, kept):
        losses, log = train("fp8_flow_moe", flags)
        assert f"kept for backward: {kept}" in log
        assert losses[1] == train("fp8_flow_moe")[0][1]
        assert_near(losses, train("bf16")[0])

    def test_resume_is_bitwise_and_checkpoints_cross_recipes(self, workspace):
        resume_experts(workspace / "resume")


EXPERTS_2 = "--expert-model-parallel-size 2"
TENSOR_2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
OVERLAP = f"--overlap-grad-reduce --overlap-param-gather {SELECTIVE} moe"


class TestTwoGpus:
    pytestmark = two_gpus

    @pytest.mark.parametrize(
        ("layout", "flags", "experts"),
        [
            (EXPERTS_2, "", 4),
            (EXPERTS_2, SHARED, 4),
            (EXPERTS_2, OVERLAP, 4),
            (TENSOR_2, "", 8),
            (f"{TENSOR_2} {EXPERTS_2}", "", 4),
            ("--pipeline-model-parallel-size 2", "", 8),
        ],
        ids=["experts", "shared", "experts_overlap", "tensor", "tensor_experts", "pipeline"],
    )
    def test_parallel_run_learns_as_bf16(self, train, layout, flags, experts):
        """The layout decides the initial weights, so bf16 runs in the same."""
        losses, log = train("fp8_flow_moe", f"{layout} {flags}", gpus=2)
        assert_near(losses, train("bf16", f"{layout} {'' if flags == OVERLAP else flags}", gpus=2)[0])
        travel = "FP8 dispatch over 2 ranks (alltoall)" if EXPERTS_2 in layout else "no dispatch (one rank)"
        assert f"{experts} {FLOW}; {travel}" in log

    def test_expert_parallelism_changes_the_loss_by_rounding_only(self, train, workspace):
        """The same weights, from a checkpoint of a run with every expert on both ranks, with half of them on each."""
        whole, _ = train("fp8_flow_moe", f"--save {workspace}/whole --save-interval 6", gpus=2)
        (workspace / "whole" / "latest_checkpointed_iteration.txt").write_text("6")
        split, log = train("fp8_flow_moe", f"{EXPERTS_2} --load {workspace}/whole --no-load-optim --no-load-rng", gpus=2)
        assert f"4 {FLOW}; FP8 dispatch over 2 ranks" in log
        assert split[7] == pytest.approx(whole[7], rel=1e-3)

    def test_resume_with_expert_parallelism(self, workspace):
        resume_experts(workspace / "resume_ep", GPUS="2", EXTRA=EXPERTS_2)
