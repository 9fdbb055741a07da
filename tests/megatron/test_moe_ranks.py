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

rank, out, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
whole = torch.load(out + "/whole.pt")
x, dy = (t[16 * rank : 16 * rank + 16].contiguous() for t in whole["tokens"])  # as sequence parallelism splits the sequence
for case, (tensor_parallel, options) in cases.items():
    layers.initialise(rank, 2, f"{out}/store {case}", expert_parallel=2, tensor_parallel=tensor_parallel)
    parallel = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": tensor_parallel, "sequence_parallel": tensor_parallel > 1}
    layer = layers.build(layers.config_of(**parallel, **options))
    layer.router.load_state_dict({"weight": whole["router.weight"]})
    for n in (1, 2):
        for e in range(layers.EXPERTS // 2):
            getattr(getattr(layer.experts, f"linear_fc{n}"), f"weight{e}").data.copy_(whole[f"experts.linear_fc{n}.weight{rank * layers.EXPERTS // 2 + e}"])
    print(f"{case}: {moe.describe(layer)}")
    torch.save(layers.gradients(layer, x, dy), f"{out}/{case} {rank}.pt")
    layers.finish()
"""

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
CASES: dict[str, tuple[int, dict]] = {"data parallel": (1, {}), "sequence parallel, aux loss, recompute": (2, AUX | RECOMPUTE)}
"""Tensor parallelism, options."""


@pytest.fixture(scope="module")
def two_ranks(groups, tmp_path_factory):
    """Directory of what each rank made of each case from the same weights and tokens: two processes for all cases, for Megatron's import is what takes time."""
    out = tmp_path_factory.mktemp("ranks")
    torch.save(dict(layers.build(layers.config_of()).named_parameters()) | {"tokens": tokens()}, out / "whole.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(out), json.dumps(CASES)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        said, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        for case in CASES:
            assert f"{case}: 4 local experts as one FP8 function from router to combined output; FP8 dispatch over 2 ranks (alltoall)" in said
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_of_the_experts_each_have_the_values_of_one(two_ranks, case):
    y, dx, grads = layers.gradients(layers.build(layers.config_of(**CASES[case][1])), *tokens())
    parts = [torch.load(two_ranks / f"{case} {rank}.pt") for rank in range(2)]
    assert snr_db(y, torch.cat([p[0] for p in parts])) > 40, "the sum over ranks rounds once more to bf16"
    assert snr_db(dx, torch.cat([p[1] for p in parts])) > 40
    for n in (1, 2):
        for e in range(layers.EXPERTS):
            rank, local = divmod(e, layers.EXPERTS // 2)
            assert snr_db(grads[f"experts.linear_fc{n}.weight{e}"], parts[rank][2][f"experts.linear_fc{n}.weight{local}"]) > 25
    assert snr_db(grads["router.weight"], sum(p[2]["router.weight"].float() for p in parts)) > 30
