"""Real MoE training through scripts/launch.sh on GPUs: fp8_flow_moe and its options against bf16, which way ran, checkpoints bit for bit, two GPUs.

Each run is its own process, as users start it.
"""

from __future__ import annotations

import os
import re
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
FLOW = "local experts as one FP8 function from router to combined output"

one_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 1, reason="no GPU")]
two_gpus = [pytest.mark.multi_gpu, pytest.mark.slow, pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Directory with a small text dataset."""
    from fp8_recipes import data

    path = tmp_path_factory.mktemp("megatron_moe")
    data.build_from_roots(path / "text", data.default_roots(), max_mb=4)
    return path


@pytest.fixture(scope="module")
def train(workspace):
    """train(recipe, "--flags", gpus=1) -> (losses by step, text log); a run that was made already is not repeated."""
    done: dict[str, tuple[dict[int, float], str]] = {}

    def run(recipe: str, flags: str = "", gpus: int = 1):
        name = re.sub(r"[^A-Za-z0-9]+", "_", f"{recipe}{flags}_{gpus}")
        if name not in done:
            log = workspace / f"{name}.jsonl"
            command = [ROOT / "scripts" / "launch.sh", "--model", "moe_tiny", "--recipe", recipe, "--gpus", gpus, "--steps", STEPS, "--log", log]
            command += ["--data", workspace / "text", "--", "--data-cache-path", workspace / "cache", "--ckpt-format", "torch_dist", *flags.split()]
            environment = os.environ | {"PYTHON": sys.executable}
            result = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600, check=False)
            assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
            done[name] = (read_losses(log), result.stdout)
        return done[name]

    return run


def assert_near(losses: dict[int, float], reference: dict[int, float]) -> None:
    assert sorted(losses) == sorted(reference) == list(range(1, STEPS + 1))
    for step, expected in reference.items():
        assert losses[step] == pytest.approx(expected, rel=TOLERANCE), f"step {step}"
    assert losses[STEPS] < 0.9 * losses[1], "the model does not learn"
    assert losses != reference, "equal to the last bit: FP8 cannot have run"


def auxiliary(log: str, name: str) -> list[float]:
    """Values of one of the router's losses in Megatron's log, by step."""
    return [float(value) for value in re.findall(rf"{name}: ([0-9.E+-]+) \|", log)]


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
        assert ("FP8 moss" in log) == ("dense=bf16" not in recipe)

    def test_scales_of_dense_and_expert_weights_are_predicted(self, train):
        """4 layers: 2 linears of the attention, 8 experts with 2 weights each."""
        assert "72 weight scales predicted" in train("fp8_flow_moe")[1]
        assert "64 weight scales predicted" in train("fp8_flow_moe:dense=bf16")[1]

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (SHARED, [f"MoE layers 2-4: 8 {FLOW}", "1 MLPs: in FP8 layers norm, fc1, SwiGLU and fc2 as one function", "shared_experts.linear_fc1"]),
            (SIGMOID, [f"MoE layers 2-3: 8 {FLOW}", "MoE layers 1,4: Megatron's own modules, bf16 (first / last)"]),
            ("--no-gradient-accumulation-fusion --moe-router-fusion", [f"MoE layers 1-4: 8 {FLOW}"]),
        ],
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
        self.resume(workspace / "resume", {})

    @staticmethod
    def resume(out: Path, environment: dict[str, str]) -> None:
        """Checkpoint at step 10: resumed bit for bit, into bf16 (Megatron's own MoE layer) and back."""
        env = os.environ | {"PYTHON": sys.executable, "DATA": str(out.parent / "text"), "MODEL": "moe_tiny"} | environment
        command = [str(ROOT / "scripts" / "resume_megatron.sh"), str(out), "fp8_flow_moe"]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        assert "10 steps (11 to 20) equal bit for bit" in result.stdout
        assert FLOW in (out / "resumed.log").read_text() and FLOW not in (out / "into_bf16.log").read_text()


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
        TestOneGpu.resume(workspace / "resume_ep", {"GPUS": "2", "EXTRA": EXPERTS_2})
