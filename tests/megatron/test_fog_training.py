"""Real training of FOG through scripts/launch.sh on a GPU: architectures, FP8 attention, recompute, two GPUs. Each run is its own process."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import CALM, assert_near, assert_within, one_gpu, resume, two_gpus  # noqa: E402

MODEL = "fog_tiny"
FLAGS = CALM
ENVIRONMENT = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "1"}
"""TransformerEngine logs the attention that it takes."""
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize("arch", ["--fog flash", "--fog opt", "--fog max"])
    @pytest.mark.parametrize("recipe", ["moss", "fog", "moss:attention=fp8", "tensorwise"])
    def test_recipe_learns_as_bf16(self, train, recipe, arch):
        losses, log = train(recipe, arch)
        assert_near(losses, train("bf16", arch)[0])
        fp8_attention = recipe in ("fog", "moss:attention=fp8")
        assert ("FP8 (attention)" in log) == fp8_attention
        if "moss" in recipe:
            assert "4 MLPs: in FP8 layers fc1, activation and fc2 as one function" in log

    @pytest.mark.parametrize("arch", ["olmo2", "smooth-swiglu"])
    def test_gated_baselines_learn_as_bf16(self, train, arch):
        losses, log = train("moss", f"--arch {arch}", model="tiny")
        assert_near(losses, train("bf16", f"--arch {arch}", model="tiny")[0])
        assert f"{arch}(" in log

    @pytest.mark.parametrize(("recipe", "flags"), [("fog", FULL), ("moss", FULL), ("moss:attention=fp8", "--no-gradient-accumulation-fusion")])
    def test_option_changes_no_more_than_rounding(self, train, recipe, flags):
        losses, _ = train(recipe, f"--fog max {flags}")
        assert_within(losses, train(recipe, "--fog max")[0])

    @pytest.mark.parametrize("recipe", ["fog", "moss:attention=fp8"])
    def test_fp8_attention_is_run_and_not_only_announced(self, train, recipe):
        """By TransformerEngine's own word, and cuDNN's FP8 kernels alone: no layer took another backend."""
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

        taken = "Running with FusedAttention backend (sub-backend {})"
        fp8 = taken.format(int(FusedAttnBackend["FP8"]))
        lines = [line for line in train(recipe, "--fog flash")[1].splitlines() if "Running with" in line]
        assert lines and all(fp8 in line for line in lines), lines
        assert fp8 not in train("moss", "--fog flash")[1]

    @pytest.mark.parametrize(("recipe", "delayed"), [("moss", 0), ("fog", 20), ("moss:attention=fp8", 4)])
    def test_resume_is_bitwise_and_checkpoints_cross_recipes(self, workspace, recipe, delayed):
        """delayed: modules whose maxima and scales are resumed. An evaluation just before the save leaves maxima of its own in their histories."""
        out = workspace / f"resume_{recipe.replace(':', '_')}"
        resume(out, recipe, MODEL=MODEL, EXTRA=f"--fog max --eval-iters 1 --eval-interval 5 {FLAGS}")
        line = f"fp8_recipes: maxima and scales of {delayed} modules under delayed scaling as saved"
        assert (line in (out / "resumed.log").read_text()) == bool(delayed)
        anew = "holds no maxima of delayed scaling"
        assert (anew in (out / "back.log").read_text()) == bool(delayed), "from bf16"


class TestTwoGpus:
    pytestmark = two_gpus
    TP = "--tensor-model-parallel-size 2"

    @pytest.mark.parametrize("recipe", ["bf16", "fog", "moss:attention=fp8"])
    @pytest.mark.parametrize("flags", [TP, f"{TP} --sequence-parallel", "--pipeline-model-parallel-size 2", ""])
    def test_parallel_run_learns_as_bf16_on_two(self, train, recipe, flags):
        losses, _ = train(recipe, f"--fog max {flags}", gpus=2)
        assert_near(losses, train("bf16", f"--fog max {flags}", gpus=2)[0])
