"""The LM head in FP8 on the launcher's own way, on the CPU (`pretend_gpu`): Megatron's data-parallel buffers, main_grad and distributed optimizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import pretend_gpu  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = (
    "--num-layers 2 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --fp8-metrics-interval 2 "
    "--overlap-grad-reduce --overlap-param-gather --tensor-model-parallel-size 2"
)


def train(path, recipe, flags, port):
    """(losses by step, output of the first rank) of four steps on two ranks."""
    log = path / f"{port}.jsonl"
    launch = ["--model", "tiny", "--recipe", recipe, "--steps", "4", "--", *SMALL.split(), *flags.split(), "--fp8-log", str(log)]
    given = os.environ | {"PYTHONPATH": str(pretend_gpu.ROOT), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([sys.executable, pretend_gpu.__file__, *launch], env=given | {"RANK": str(rank)}, **pipes) for rank in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(output[-4000:] for output in outputs)
    return {line["iteration"]: line["lm_loss"] for line in map(json.loads, log.read_text().splitlines())}, outputs[0]


def test_head_trains_as_in_bf16_and_sequence_parallelism_changes_no_bit(tmp_path):
    reference, _ = train(tmp_path, "bf16", "", 29750)
    losses, log = train(tmp_path, "moss", "", 29751)
    assert "256x256  FP8 moss, dy e5m2" in log and "9 weight scales predicted" in log
    assert sorted(losses) == sorted(reference) == [1, 2, 3, 4] and losses[4] < losses[1]
    for step, loss in losses.items():
        assert loss != reference[step] and loss == pytest.approx(reference[step], rel=0.01), f"step {step}"
    assert train(tmp_path, "moss", "--sequence-parallel", 29752)[0] == losses
