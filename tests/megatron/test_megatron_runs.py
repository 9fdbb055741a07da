"""The helpers of the training tests, with a stand-in for torchrun: what they read, what they compare, what they start."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import STEPS, Trainings, assert_near, assert_within, resume  # noqa: E402

STAND_IN = f"""#!{sys.executable}
# A training whose loss falls from step to step, by a little less under FP8; it saves, loads and ends where its flags say. Other programs are the real ones.
import json, os, sys
from pathlib import Path
if "fp8_recipes.pretrain_gpt" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
value = lambda name, default=None: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
load, save, recipe = value("--load"), value("--save"), value("--fp8-recipe")
if recipe == "moss:interval=13":
    sys.exit("the reason why")
first = int(Path(load, "latest_checkpointed_iteration.txt").read_text()) + 1 if load else 1
last = int(value("--exit-interval", value("--train-iters")))
factor = (1.0 if recipe == "bf16" else 1.001) * float(os.environ.get("DRIFT", "1") if load else 1)
with open(value("--fp8-log"), "a") as log:
    for n in range(first, last + 1):
        log.write(json.dumps({{"iteration": n, "lm_loss_hex": (factor * 6 / (1 + n / 10)).hex()}}) + "\\n")
if save:
    Path(save, f"iter_{{10:07d}}").mkdir(parents=True, exist_ok=True)
    Path(save, "latest_checkpointed_iteration.txt").write_text(str(last))
print("args", *sys.argv[1:])
print("on the other stream", file=sys.stderr)
"""


@pytest.fixture
def python(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text(STAND_IN)
    fake.chmod(0o755)
    return str(fake)


@pytest.fixture
def train(tmp_path, python):
    return Trainings(tmp_path, "tiny", "--ckpt-format torch_dist", {"PYTHON": python})


def test_a_training_is_read_and_not_repeated(train):
    losses, log = train("moss:interval=3", "--fog  max")
    assert sorted(losses) == list(range(1, STEPS + 1)) and losses[10] == 1.001 * 6 / 2
    assert (
        "--nproc-per-node 1" in log and "--fp8-recipe moss:interval=3" in log and "--ckpt-format torch_dist --fog max" in log and "on the other stream" in log
    )
    assert train("moss:interval=3", "--fog max")[0] is losses
    again = [train("moss"), train("moss:interval=3"), train("moss:interval=3", "--fog max", gpus=2), train("moss:interval=3", "--fog max", model="fog_tiny")]
    assert len(train.done) == 5 and "--nproc-per-node 2" in again[2][1]
    assert_near(losses, train("bf16")[0])


def test_a_training_that_fails_says_why_and_leaves_nothing_behind(train):
    with pytest.raises(AssertionError, match="the reason why"):
        train("moss:interval=13")
    assert train.done == {} and len(train("moss")[0]) == STEPS


def test_processes_of_one_call_share_their_runs(tmp_path, python, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("FP8_RECIPES_TEST_RUNS", str(shared))
    first, second = (Trainings(tmp_path / name, "tiny", environment={"PYTHON": python}) for name in ("a", "b"))
    losses, log = first("bf16")
    assert str(tmp_path / "a") in log and second("bf16") == (losses, log), "the run of the first, whose data lies in a"
    assert str(tmp_path / "b") in second("moss")[1]
    assert str(tmp_path / "b") in Trainings(tmp_path / "b", "tiny", environment={"PYTHON": python, "DRIFT": "1"})("bf16")[1], "another environment"
    assert len(list(shared.glob("*.log"))) == 3


def test_losses_must_be_near_fall_and_be_of_another_run():
    falling = {n: 6 / (1 + n / 10) for n in range(1, STEPS + 1)}
    flat = dict.fromkeys(falling, 2.0)
    assert_within({n: 1.019 * v for n, v in falling.items()}, falling)
    assert_near({n: 1.019 * v for n, v in falling.items()}, falling)
    assert_near(falling, falling)
    for losses, reference, words in (
        (falling | {7: 1.03 * falling[7]}, falling, "step 7"),
        ({n: 1.001 * v for n, v in flat.items()}, flat, "does not learn"),
        (dict(falling), falling, "equal to the last bit"),
        ({n: v for n, v in falling.items() if n < STEPS}, falling, "steps"),
    ):
        with pytest.raises(AssertionError, match=words):
            assert_near(losses, reference)


def test_resume_compares_bit_for_bit(tmp_path, python):
    (tmp_path / "text.idx").touch()
    resume(tmp_path / "same", "moss", PYTHON=python, MODEL="fog_tiny", EXTRA="--fog max")
    assert "--fog max" in (tmp_path / "same" / "back.log").read_text()
    with pytest.raises(AssertionError, match="10 of 10 steps differ, first step 11"):
        resume(tmp_path / "other", "moss", PYTHON=python, DRIFT="1.0000001")
