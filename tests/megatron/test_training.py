"""Real training through scripts/launch.sh on a GPU: every recipe and option against bf16, checkpoints bit for bit, two GPUs.

Each run is its own process, as users start it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from fp8_recipes.megatron.parse_log import read_losses  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
TOLERANCE = 0.02
"""Relative difference of a tiny model's loss from bf16's at the same step: 12 steps from the same weights, so the runs have not drifted apart."""
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

one_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 1, reason="no GPU")]
two_gpus = [pytest.mark.multi_gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Directory with a small text dataset."""
    from fp8_recipes import data

    path = tmp_path_factory.mktemp("megatron")
    data.build_from_roots(path / "text", data.default_roots(), max_mb=4)
    return path


@pytest.fixture(scope="module")
def train(workspace):
    """train(name, recipe, "--flags", gpus=1) -> (losses by step, text log); a run that was made already is not repeated."""
    done: dict[str, tuple[dict[int, float], str]] = {}

    def run(name: str, recipe: str, flags: str = "", gpus: int = 1):
        if name not in done:
            log = workspace / f"{name}.jsonl"
            command = [ROOT / "scripts" / "launch.sh", "--model", "tiny", "--recipe", recipe, "--gpus", gpus, "--steps", STEPS, "--log", log]
            command += ["--data", workspace / "text", "--", "--data-cache-path", workspace / "cache", *flags.split()]
            result = subprocess.run(
                [str(part) for part in command], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=600, check=False
            )
            assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
            done[name] = (read_losses(log), result.stdout)
        return done[name]

    return run


def assert_near(losses: dict[int, float], reference: dict[int, float]) -> None:
    assert sorted(losses) == sorted(reference) == list(range(1, STEPS + 1))
    for step, expected in reference.items():
        assert losses[step] == pytest.approx(expected, rel=TOLERANCE), f"step {step}"
    assert losses[STEPS] < 0.9 * losses[1], "the model does not learn"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize("recipe", ["moss", "row", "moss:grad=e5m2", "moss_exact", "tile", "tensorwise"])
    def test_recipe_learns_as_bf16(self, train, recipe):
        losses, log = train(recipe.replace(":", "_").replace("=", "_"), recipe)
        assert_near(losses, train("bf16", "bf16")[0])
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
        losses, log = train(f"moss_{name}", "moss:interval=3" if name == "short_interval" else "moss", flags)
        reference = train(f"bf16_{name}", "bf16", flags)[0] if name in ("clip_often", "short_interval") else train("bf16", "bf16")[0]
        assert words in log
        assert sorted(losses) == sorted(reference)
        for step, expected in reference.items():
            assert losses[step] == pytest.approx(expected, rel=TOLERANCE), f"step {step}"

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
        losses, log = train("moss_precision", "moss", f"--te-precision-config-file {path}")
        assert_near(losses, train("bf16", "bf16")[0])
        assert "bf16 (precision file)" in log and "FP8 fp8_recipes.megatron.factories.moss (precision file)" in log

    def test_resume_is_bitwise_and_checkpoints_cross_recipes(self, workspace):
        self.resume(workspace / "resume", {})

    @staticmethod
    def resume(out: Path, environment: dict[str, str]) -> None:
        env = os.environ | {"PYTHON": sys.executable, "DATA": str(out.parent / "text")} | environment
        result = subprocess.run(
            [str(ROOT / "scripts" / "resume_megatron.sh"), str(out), "moss"], env=env, capture_output=True, text=True, timeout=1800, check=False
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        assert "10 steps (11 to 20) equal bit for bit" in result.stdout


class TestTwoGpus:
    pytestmark = two_gpus
    TP = "--tensor-model-parallel-size 2"

    @pytest.mark.parametrize("flags", [TP, f"{TP} --sequence-parallel", "--pipeline-model-parallel-size 2", ""])
    def test_parallel_run_learns_as_bf16_on_one(self, train, flags):
        name = "two" + flags.replace("--", "_").replace(" ", "")
        losses, _ = train(name, "moss", flags, gpus=2)
        assert_near(losses, train(name + "_bf16", "bf16", flags, gpus=2)[0])

    def test_resume_with_tensor_parallelism(self, workspace):
        TestOneGpu.resume(workspace / "resume_tp", {"GPUS": "2", "EXTRA": f"{self.TP} --sequence-parallel"})
