"""Real training with and without the LM head in FP8 through scripts/launch.sh on a GPU: against bf16, with the head's options, tied, on two GPUs.

`moss` has the head in FP8, so its resume and its layouts on two GPUs are in test_training.py. Each run is its own process.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import ROOT, STEPS, assert_near, assert_within, finished, one_gpu, two_gpus  # noqa: E402

from fp8_recipes.megatron.parse_log import read_losses  # noqa: E402

MODEL = "tiny"
HEAD, WITHOUT = "moss", "moss:head=bf16"
FUSED = "--cross-entropy-loss-fusion"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize("recipe", [HEAD, WITHOUT, "row:head=fp8", "moss_exact:head=fp8"])
    def test_recipe_learns_as_bf16(self, train, recipe):
        losses, log = train(recipe)
        assert_near(losses, train("bf16")[0])
        runs_in = "bf16" if recipe == WITHOUT else f"FP8 {recipe.partition(':')[0]}, dy e5m2"
        assert f"output_layer - 384x256 {runs_in}" in (" ".join(line.split()) for line in log.splitlines())

    def test_head_is_run_and_not_only_announced(self, train):
        """The first loss differs from that of the same layers under a head in bf16, by no more than the head's rounding."""
        with_head, without = train(HEAD)[0][1], train(WITHOUT)[0][1]
        assert with_head != without and with_head == pytest.approx(without, rel=5e-3)

    @pytest.mark.parametrize("flags", [FUSED, "--overlap-grad-reduce --overlap-param-gather", "--fp8-metrics-interval 4"])
    def test_option_changes_no_more_than_rounding(self, train, flags):
        assert_within(train(HEAD, flags)[0], train(HEAD)[0])

    def test_tied_weights(self, workspace):
        """launch.sh's models have a head of their own, and Megatron has no flag to take that back: its command without the flag that says so."""
        tied = {}
        for recipe in (HEAD, "bf16"):
            log = workspace / f"tied_{recipe.partition(':')[0]}.jsonl"
            launch = [ROOT / "scripts" / "launch.sh", "--model", MODEL, "--recipe", recipe, "--steps", STEPS, "--log", log, "--data", workspace / "text"]
            dry = finished([*launch, "--dry-run", "--", "--data-cache-path", workspace / "cache"], {}, timeout=60)
            command = dry.replace("--untie-embeddings-and-output-weights", "")
            assert command != dry
            log.unlink(missing_ok=True)
            text = finished(["bash", "-c", command], {}, timeout=600)
            assert ("output_layer (weight of the embedding)" in text) == (recipe == HEAD)
            tied[recipe] = read_losses(log)
        assert_near(tied[HEAD], tied["bf16"])


class TestTwoGpus:
    pytestmark = two_gpus

    @pytest.mark.parametrize("recipe", [WITHOUT, "row:head=fp8"])
    def test_sequence_parallel_run_learns_as_bf16_on_two(self, train, recipe):
        """row: each rank measures the scale of its own rows of the vocabulary."""
        flags = "--tensor-model-parallel-size 2 --sequence-parallel"
        assert_near(train(recipe, flags, gpus=2)[0], train("bf16", flags, gpus=2)[0])
