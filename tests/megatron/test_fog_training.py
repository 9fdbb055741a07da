"""Real training of FOG through scripts/launch.sh on a GPU: architectures, FP8 attention, recompute, two GPUs. Each run is its own process."""

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
"""Relative difference of a tiny model's loss from bf16's at the same step."""
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
one_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 1, reason="no GPU")]
two_gpus = [pytest.mark.multi_gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")]
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Directory with a small text dataset."""
    from fp8_recipes import data

    path = tmp_path_factory.mktemp("fog")
    data.build_from_roots(path / "text", data.default_roots(), max_mb=4)
    return path


@pytest.fixture(scope="module")
def train(workspace):
    """train("moss", "--fog max", gpus=1, model="fog_tiny") -> (losses by step, text log); a run that was made already is not repeated."""
    done: dict[tuple[str, str, int, str], tuple[dict[int, float], str]] = {}

    def run(recipe: str, flags: str = "", gpus: int = 1, model: str = "fog_tiny"):
        key = (recipe, flags, gpus, model)
        if key not in done:
            log = workspace / f"{len(done)}.jsonl"
            command = [ROOT / "scripts" / "launch.sh", "--model", model, "--recipe", recipe, "--gpus", gpus, "--steps", STEPS, "--log", log]
            command += ["--data", workspace / "text", "--", "--data-cache-path", workspace / "cache", *flags.split()]
            result = subprocess.run(
                [str(part) for part in command],
                env=os.environ | {"PYTHON": sys.executable, "NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "1"},  # TransformerEngine logs the attention that it takes
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
            done[key] = (read_losses(log), result.stdout + result.stderr)
        return done[key]

    return run


def assert_near(losses, reference):
    assert sorted(losses) == sorted(reference) == list(range(1, STEPS + 1))
    for step, expected in reference.items():
        assert losses[step] == pytest.approx(expected, rel=TOLERANCE), f"step {step}"
    assert losses[STEPS] < 0.9 * losses[1], "the model does not learn"


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
        reference, _ = train(recipe, "--fog max")
        for step, expected in reference.items():
            assert losses[step] == pytest.approx(expected, rel=TOLERANCE), f"step {step}"

    @pytest.mark.parametrize("recipe", ["fog", "moss:attention=fp8"])
    def test_fp8_attention_is_run_and_not_only_announced(self, train, recipe):
        """By TransformerEngine's own word, and cuDNN's FP8 kernels alone: no layer took another backend."""
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

        taken = "Running with FusedAttention backend (sub-backend {})"
        fp8 = taken.format(int(FusedAttnBackend["FP8"]))
        lines = [line for line in train(recipe, "--fog flash")[1].splitlines() if "Running with" in line]
        assert lines and all(fp8 in line for line in lines), lines
        assert fp8 not in train("moss", "--fog flash")[1]

    def test_resume_is_bitwise_and_checkpoints_cross_recipes(self, workspace):
        env = os.environ | {"PYTHON": sys.executable, "DATA": str(workspace / "text"), "MODEL": "fog_tiny", "EXTRA": "--fog max"}
        command = [str(ROOT / "scripts" / "resume_megatron.sh"), str(workspace / "resume"), "moss"]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        assert "10 steps (11 to 20) equal bit for bit" in result.stdout


class TestTwoGpus:
    pytestmark = two_gpus
    TP = "--tensor-model-parallel-size 2"

    @pytest.mark.parametrize("recipe", ["bf16", "fog", "moss:attention=fp8"])
    @pytest.mark.parametrize("flags", [TP, f"{TP} --sequence-parallel", "--pipeline-model-parallel-size 2", ""])
    def test_parallel_run_learns_as_bf16_on_two(self, train, recipe, flags):
        losses, _ = train(recipe, f"--fog max {flags}", gpus=2)
        assert_near(losses, train("bf16", f"--fog max {flags}", gpus=2)[0])
