"""Trainings of tiny models through scripts/launch.sh, each its own process as users start it: what the tests of Megatron training on a GPU share.

The fixtures `workspace` and `train` are in tests/megatron/conftest.py. A module that takes `train` says MODEL, and may say FLAGS and ENVIRONMENT of every run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fp8_recipes.megatron.parse_log import read_losses

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
TOLERANCE = 0.02
"""Relative difference of a tiny model's loss from bf16's at the same step: 12 steps from the same weights, so the runs have not drifted apart."""
CALM = "--lr 3e-4 --min-lr 3e-5"
"""Learning rate at which runs of tiny FOG models can be compared: with no norm before their layers they are chaotic at the models' own 1e-3.

Measured on the CPU over 12 steps from three starts (8 experts under --fog flash and --fog opt, dense --fog max): from weights perturbed by up to 6 %, as a
rounding to E4M3 does, bf16 is at worst 10.9, 2.9 and 0.6 % from bf16, and FP8 from the same weights 1.7, 1.9 and 1.0 %; at 3e-4 bf16 is at worst 0.8, 1.1
and 0.3 %, and FP8 0.5, 0.4 and 0.3 %. (Initial weights drawn in FP32: torch draws bf16 ones on the CPU from too few values, which FP8 sees.)
"""
SHARED_RUNS = "FP8_RECIPES_TEST_RUNS"
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
Losses = dict[int, float]

one_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 1, reason="no GPU")]
two_gpus = [pytest.mark.multi_gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")]


def finished(command: list[object], environment: Mapping[str, str], timeout: float) -> str:
    """Output of a script that must end with 0; otherwise the end of what it printed is the message."""
    env = os.environ | {"PYTHON": sys.executable} | dict(environment)
    result = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout + result.stderr


@dataclass
class Trainings:
    """trainings("moss", "--flags", gpus=1, model=None) -> (losses by step, text log). A run that was made already is not repeated: the same object comes back.

    workspace: folder with a dataset "text". flags and environment are those of every run. Where SHARED_RUNS names a folder, as scripts/gpu_tests.py does,
    pytest processes of one call share their runs through it: baselines above all, which a dozen of them want.
    """

    workspace: Path
    model: str
    flags: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    done: dict[tuple[str, str, int, str], tuple[Losses, str]] = field(default_factory=dict)

    def __call__(self, recipe: str, flags: str = "", gpus: int = 1, model: str | None = None) -> tuple[Losses, str]:
        skip_without_right_cudnn(recipe)
        key = (recipe, " ".join(flags.split()), gpus, model or self.model)
        if key not in self.done:
            all_of_it = repr((key, self.flags.split(), sorted(self.environment.items())))
            run = Path(os.environ.get(SHARED_RUNS, self.workspace)) / hashlib.sha256(all_of_it.encode()).hexdigest()[:16]
            with run.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits for the first one's result
                if not run.with_suffix(".log").exists():
                    self.train(key, run)
            self.done[key] = read_losses(run.with_suffix(".jsonl")), run.with_suffix(".log").read_text()
        return self.done[key]

    def train(self, key: tuple[str, str, int, str], run: Path) -> None:
        """Leaves run.jsonl and, if it ended well, run.log."""
        recipe, flags, gpus, model = key
        losses = run.with_suffix(".jsonl")
        command: list[object] = [ROOT / "scripts" / "launch.sh", "--model", model, "--recipe", recipe, "--gpus", gpus, "--steps", STEPS, "--log", losses]
        command += ["--data", self.workspace / "text", "--", "--data-cache-path", self.workspace / "cache", *self.flags.split(), *flags.split()]
        losses.unlink(missing_ok=True)  # of a run that failed: a log is appended to
        run.with_suffix(".log").write_text(finished(command, self.environment, timeout=600))


def assert_within(losses: Losses, reference: Losses) -> None:
    """The same steps, each loss near the reference's."""
    assert sorted(losses) == sorted(reference) == list(range(1, STEPS + 1)), f"steps {sorted(losses)} and {sorted(reference)}"
    for step, expected in reference.items():
        assert losses[step] == pytest.approx(expected, rel=TOLERANCE), f"step {step}: {losses[step]:.5f}, expected {expected:.5f}"


def assert_near(losses: Losses, reference: Losses) -> None:
    """Near a reference that is another run, and learning."""
    assert_within(losses, reference)
    assert losses[STEPS] < 0.9 * losses[1], f"the model does not learn: {losses[1]:.5f} to {losses[STEPS]:.5f}"
    assert losses is reference or losses != reference, "equal to the last bit: FP8 cannot have run"


def resume(out: Path, recipe: str, **environment: str) -> None:
    """scripts/resume_megatron.sh on the dataset beside ``out``: a checkpoint at step 10 resumed bit for bit, loaded into bf16 and back."""
    skip_without_right_cudnn(recipe)
    text = finished([ROOT / "scripts" / "resume_megatron.sh", out, recipe], {"DATA": str(out.parent / "text"), **environment}, timeout=1800)
    assert "10 steps (11 to 20) equal bit for bit" in text, text[-6000:]


def skip_without_right_cudnn(recipe: str) -> None:
    """Skip a test whose recipe has FP8 attention where the launcher refuses to train: an older cuDNN returns wrong results."""
    from fp8_recipes.megatron import arguments, attention_arguments

    if arguments.is_ours(recipe) and arguments.resolve(recipe).attention == "fp8":
        reason = attention_arguments.wrong(attention_arguments.cudnn_version())
        if reason:
            pytest.skip(reason)
