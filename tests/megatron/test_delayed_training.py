"""Delayed scaling through whole trainings on the CPU (`pretend_gpu`, FP8 attention in TransformerEngine's emulation): resumed, and recomputed, bit for bit."""

from __future__ import annotations

import os
import shutil

import pytest

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")
pytest.importorskip("psutil", reason="psutil is not installed; Megatron's torch_dist writer needs it (pip install psutil)")

import pretend_gpu  # noqa: E402
import warm  # noqa: E402

from fp8_recipes.megatron import parse_log  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 2 --num-query-groups 1 --kv-channels 128 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --eval-iters 1 --eval-interval 2 --ckpt-format torch_dist"
)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def train(log, recipe: str, flags: str, port: int, ranks: int = 1) -> str:
    """Four steps of two microbatches; what rank 0 printed."""
    path = os.pathsep.join(filter(None, [str(pretend_gpu.ROOT), os.environ.get("PYTHONPATH")]))
    command = ["--model", "fog_tiny", "--recipe", recipe, "--steps", "4", "--log", str(log), "--", *SMALL.split(), *flags.split()]
    environment = os.environ | {"PYTHONPATH": path, "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NVTE_UnfusedDPA_Emulate_FP8": "1"}
    return warm.run(pretend_gpu.__file__, command, environment, ranks)[0]


@pytest.mark.parametrize(
    ("recipe", "modules", "port", "layout"),
    [("fog", 10, 29680, ""), ("moss:attention=fp8", 2, 29684, ""), ("fog", 10, 29688, "--num-query-groups 2 --tensor-model-parallel-size 2")],
)
def test_a_run_resumed_with_recompute_has_the_bits_of_the_run_that_went_on_without(tmp_path, recipe, modules, port, layout):
    """With an evaluation before the save, gradient accumulation and the distributed optimizer."""
    ranks = 2 if layout else 1
    train(tmp_path / "through.jsonl", recipe, f"{layout} --save {tmp_path / 'through'} --save-interval 2", port, ranks)
    (tmp_path / "from").mkdir()
    shutil.copytree(tmp_path / "through" / "iter_0000002", tmp_path / "from" / "iter_0000002")
    (tmp_path / "from" / "latest_checkpointed_iteration.txt").write_text("2")
    printed = train(tmp_path / "resumed.jsonl", recipe, f"{layout} --load {tmp_path / 'from'} {FULL}", port + 1, ranks)
    assert f"fp8_recipes: maxima and scales of {modules} modules under delayed scaling as saved" in printed
    through, resumed = (parse_log.read_losses(tmp_path / f"{name}.jsonl") for name in ("through", "resumed"))
    assert sorted(through) == [1, 2, 3, 4] and sorted(resumed) == [3, 4]
    assert {step: through[step].hex() for step in resumed} == {step: loss.hex() for step, loss in resumed.items()}
