"""Megatron's MoE layer under fp8_flow_moe on two ranks (gloo, CPU): half of the experts on each, the values of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import moe_layers as layers  # noqa: E402
from assertions import snr_db  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def groups():
    layers.initialise()
    yield
    layers.finish()


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 4, layers.HIDDEN, generator=generator).bfloat16() for _ in range(2)]


TWO_RANKS = """
import json, sys
import torch
import moe_layers as layers
from fp8_recipes.megatron import moe

rank, out, tensor_parallel, options = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
layers.initialise(rank, 2, out + "/store", expert_parallel=2, tensor_parallel=tensor_parallel)
parallel = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": tensor_parallel, "sequence_parallel": tensor_parallel > 1}
layer = layers.build(layers.config_of(**parallel, **options))
whole = torch.load(out + "/whole.pt")
layer.router.load_state_dict({"weight": whole["router.weight"]})
for n in (1, 2):
    for e in range(layers.EXPERTS // 2):
        getattr(getattr(layer.experts, f"linear_fc{n}"), f"weight{e}").data.copy_(whole[f"experts.linear_fc{n}.weight{rank * layers.EXPERTS // 2 + e}"])
x, dy = (t[16 * rank : 16 * rank + 16].contiguous() for t in whole["tokens"])  # as sequence parallelism splits the sequence
print("SAYS", moe.describe(layer))
torch.save(layers.gradients(layer, x, dy), f"{out}/{rank}.pt")
layers.finish()
"""

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@pytest.mark.parametrize(("tensor_parallel", "options"), [(1, {}), (2, AUX | RECOMPUTE)], ids=["data parallel", "sequence parallel, aux loss, recompute"])
def test_two_ranks_with_half_of_the_experts_each_have_the_values_of_one(tmp_path, tensor_parallel, options):
    layer = layers.build(layers.config_of(**options))
    x, dy = tokens()
    y, dx, grads = layers.gradients(layer, x, dy)
    torch.save(dict(layer.named_parameters()) | {"tokens": (x, dy)}, tmp_path / "whole.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path), str(tensor_parallel), json.dumps(options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert "SAYS 4 local experts as one FP8 function from router to combined output; FP8 dispatch over 2 ranks (alltoall)" in out
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert snr_db(y, torch.cat([p[0] for p in parts])) > 40, "the sum over ranks rounds once more to bf16"
    assert snr_db(dx, torch.cat([p[1] for p in parts])) > 40
    for n in (1, 2):
        for e in range(layers.EXPERTS):
            rank, local = divmod(e, layers.EXPERTS // 2)
            assert snr_db(grads[f"experts.linear_fc{n}.weight{e}"], parts[rank][2][f"experts.linear_fc{n}.weight{local}"]) > 25
    assert snr_db(grads["router.weight"], sum(p[2]["router.weight"].float() for p in parts)) > 30
