"""Real training through scripts/launch.sh on a GPU: every recipe and option against bf16, checkpoints bit for bit, two GPUs.

Each run is its own process, as users start it.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import assert_near, assert_within, one_gpu, resume, two_gpus  # noqa: E402

MODEL = "tiny"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize("recipe", ["moss", "row", "moss:grad=e5m2", "moss_exact", "tile", "tensorwise"])
    def test_recipe_learns_as_bf16(self, train, recipe):
        losses, log = train(recipe)
        assert_near(losses, train("bf16")[0])
        assert ("fp8_recipes 0." in log) == (recipe != "tensorwise")
        assert "fp8_recipes_summary" in log

    @pytest.mark.parametrize(
        ("name", "flags", "words"),
        [
            ("first_last", "--first-last-layers-bf16", "bf16 (first / last)"),
            ("recompute", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "FP8 moss"),
            ("no_fusion", "--no-gradient-accumulation-fusion", "FP8 moss"),
            ("clip_often", "--clip-grad 0.01", "FP8 moss"),
            ("short_interval", "--weight-decay 0.5", "FP8 moss"),
        ],
    )
    def test_option_learns_as_bf16_with_the_same_option(self, train, name, flags, words):
        losses, log = train("moss:interval=3" if name == "short_interval" else "moss", flags)
        assert words in log
        assert_within(losses, train("bf16", flags if name in ("clip_often", "short_interval") else "")[0])

    def test_precision_file(self, train, workspace):
        path = workspace / "precision.yaml"
        path.write_text(
            "configs:\n"
            "  moss: {transformer_engine_config_type: TEQuantizationParams, training_recipe: "
            "{fp8_quantization_recipe: custom, custom_recipe_factory: fp8_recipes.megatron.factories.moss}}\n"
            "  bf16: {transformer_engine_config_type: TEQuantizationParams, training_recipe: {}}\n"
            "matchers:\n"
            "  proj: {config: bf16, type: glob, pattern: '*.self_attention.linear_proj', enabled: true}\n"
            "  rest: {config: moss, type: glob, pattern: '*.linear_fc*', enabled: true}\n"
        )
        losses, log = train("moss", f"--te-precision-config-file {path}")
        assert_near(losses, train("bf16")[0])
        assert "bf16 (precision file)" in log and "FP8 fp8_recipes.megatron.factories.moss (precision file)" in log

    def test_resume_is_bitwise_and_checkpoints_cross_recipes(self, workspace):
        resume(workspace / "resume", "moss")


class TestTwoGpus:
    pytestmark = two_gpus
    TP = "--tensor-model-parallel-size 2"

    @pytest.mark.parametrize("flags", [TP, f"{TP} --sequence-parallel", "--pipeline-model-parallel-size 2", ""])
    def test_parallel_run_learns_as_bf16_on_one(self, train, flags):
        losses, _ = train("moss", flags, gpus=2)
        assert_near(losses, train("bf16", flags, gpus=2)[0])

    def test_resume_with_tensor_parallelism(self, workspace):
        resume(workspace / "resume_tp", "moss", GPUS="2", EXTRA=f"{self.TP} --sequence-parallel")
