"""Real training of FOG with experts through scripts/launch.sh on GPUs: GeLU and xIELU experts in the FP8 flow beside bf16, which way ran, recompute, resume,
two GPUs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import CALM, assert_near, one_gpu, resume, two_gpus  # noqa: E402

MODEL = "fog_moe_tiny"
FLAGS = f"--ckpt-format torch_dist {CALM}"
FLOW = "local experts as one FP8 function from router to combined output"
RECOMPUTE = "--recompute-granularity selective --recompute-modules moe"
SHARED = "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 256"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize(
        ("recipe", "flags"),
        [
            ("fp8_flow_moe", ""),
            ("fp8_flow_moe:moe_saved=activation,grad=e5m2", ""),
            ("fp8_flow_moe", SHARED),
            ("fp8_flow_moe:attention=fp8", ""),
            ("fp8_flow_moe", RECOMPUTE),
        ],
    )
    def test_recipe_learns_as_bf16(self, train, recipe, flags):
        losses, log = train(recipe, flags)
        assert_near(losses, train("bf16", flags if flags == SHARED else "")[0])
        assert "fog-flash(" in log
        first = 2 if flags == SHARED else 1
        assert ("FP8 (attention)" in log) == ("attention=fp8" in recipe)
        kept = "activation" if "activation" in recipe else "input" if "recompute" in flags else "h"
        assert f"MoE layers {first}-4: 8 {FLOW}; no dispatch (one rank); kept for backward: {kept}; gelu without a gate" in log
        if flags == SHARED:
            assert "4 MLPs: in FP8 layers fc1, activation and fc2 as one function" in log

    def test_opt_learns_as_bf16(self, train):
        losses, log = train("fp8_flow_moe", "--fog opt")
        assert_near(losses, train("bf16", "--fog opt")[0])
        assert "fog-opt(" in log and f"MoE layers 1-4: 8 {FLOW}" in log

    @pytest.mark.parametrize(("recipe", "flags"), [("fp8_flow_moe", ""), ("fp8_flow_moe", SHARED), ("fp8_flow_moe:grad=e5m2", RECOMPUTE)])
    def test_max_learns_as_bf16(self, train, recipe, flags):
        losses, log = train(recipe, f"--fog max {flags}")
        assert_near(losses, train("bf16", f"--fog max {flags if flags == SHARED else ''}")[0])
        kept = "input" if flags == RECOMPUTE else "h"
        way = f"MoE layers {2 if flags == SHARED else 1}-4: 8 {FLOW}; no dispatch (one rank); kept for backward: {kept}"
        assert "fog-max(" in log and f"{way}; xielu without a gate, one trained pair for all experts of a layer" in log

    @pytest.mark.parametrize("name", ["flash", "max"])
    def test_resume_is_bitwise_and_checkpoints_cross_recipes(self, workspace, name):
        resume(workspace / f"resume_{name}", "fp8_flow_moe", MODEL=MODEL, EXTRA=f"{CALM} --fog {name}")


class TestTwoGpus:
    pytestmark = two_gpus

    @pytest.mark.parametrize("name", ["flash", "max"])
    @pytest.mark.parametrize("layout", ["--expert-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"])
    def test_parallel_run_learns_as_bf16(self, train, layout, name):
        layout = f"{layout} --fog {name}"
        losses, log = train("fp8_flow_moe", layout, gpus=2)
        assert_near(losses, train("bf16", layout, gpus=2)[0])
        assert ("4 " if "expert-model" in layout else "8 ") + FLOW in log
