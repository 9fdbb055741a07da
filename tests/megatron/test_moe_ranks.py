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
pytest.importorskip("psutil", reason="psutil is not installed; Megatron's torch_dist writer needs it (pip install psutil)")

import moe_layers as layers  # noqa: E402
from assertions import snr_db  # noqa: E402

pytestmark = pytest.mark.usefixtures("groups")
ROOT = Path(__file__).resolve().parents[2]


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 4, layers.HIDDEN, generator=generator).bfloat16() for _ in range(2)]


TWO_RANKS = """
import json, pathlib, sys
import torch
import moe_layers as layers
from megatron.core import dist_checkpointing
from fp8_recipes.megatron import moe

rank, out, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
whole = torch.load(out + "/whole.pt")
x, dy = (t[16 * rank : 16 * rank + 16].contiguous() for t in whole["tokens"])  # as sequence parallelism splits the sequence
for case, (tensor_parallel, options, xielu) in cases.items():
    layers.initialise(rank, 2, f"{out}/store {case}", expert_parallel=2, tensor_parallel=tensor_parallel)
    parallel = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": tensor_parallel, "sequence_parallel": tensor_parallel > 1}
    layer = layers.build(layers.config_of(**parallel, **options, **(layers.XIELU if xielu else {})), xielu=xielu)
    if xielu:
        whole = torch.load(out + "/xielu.pt")
    layer.router.load_state_dict({"weight": whole["router.weight"]})
    for n in (1, 2):
        for e in range(layers.EXPERTS // 2):
            getattr(getattr(layer.experts, f"linear_fc{n}"), f"weight{e}").data.copy_(whole[f"experts.linear_fc{n}.weight{rank * layers.EXPERTS // 2 + e}"])
    print(f"{case}: {moe.describe(layer)}")
    if xielu:
        layer.experts.activation_func.load_state_dict({n: whole[f"experts.activation_func.{n}"] for n in ("alpha_p", "alpha_n")})
        pathlib.Path(out, case).mkdir(exist_ok=True)
        with layers.on_cpu():
            dist_checkpointing.save(layer.sharded_state_dict(prefix="mlp."), f"{out}/{case}")  # refuses what two ranks would both write
        torch.save(layers.reduced_gradients(layer, x, dy), f"{out}/{case} {rank}.pt")
    else:
        torch.save(layers.gradients(layer, x, dy), f"{out}/{case} {rank}.pt")
    layers.finish()
"""

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
CASES: dict[str, tuple[int, dict, bool]] = {
    "data parallel": (1, {}, False),
    "sequence parallel, aux loss, recompute": (2, AUX | RECOMPUTE, False),
    "data parallel, xielu": (1, {}, True),
    "sequence parallel, xielu": (2, {}, True),
}
"""Tensor parallelism, options, xIELU in the experts."""


@pytest.fixture(scope="module")
def two_ranks(groups, tmp_path_factory):
    """Directory of what each rank made of each case from the same weights and tokens: two processes for all cases, for Megatron's import is what takes time."""
    out = tmp_path_factory.mktemp("ranks")
    torch.save(dict(layers.build(layers.config_of()).named_parameters()) | {"tokens": tokens()}, out / "whole.pt")
    torch.save(dict(xielu_layer().named_parameters()), out / "xielu.pt")
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


def xielu_layer():
    layer = layers.build(layers.config_of(**layers.XIELU), xielu=True)
    with torch.no_grad():
        layer.experts.activation_func.alpha_p += 0.25
        layer.experts.activation_func.alpha_n -= 0.5
    return layer


@pytest.mark.parametrize("case", [case for case, (_, _, xielu) in CASES.items() if not xielu])
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


@pytest.mark.parametrize("case", [case for case, (_, _, xielu) in CASES.items() if xielu])
def test_xielu_s_pair_is_one_over_all_experts_and_ranks(two_ranks, case):
    """Each rank sees the rows of its experts; data parallelism adds that up as for the router, Megatron's sum over tensor-parallel ranks as for a norm."""
    layer = xielu_layer()
    _, _, expected = layers.gradients(layer, *tokens())
    data_parallel = 2 // CASES[case][0]  # Megatron takes the mean over it
    parts = [torch.load(two_ranks / f"{case} {rank}.pt") for rank in range(2)]
    for name in ("experts.activation_func.alpha_p", "experts.activation_func.alpha_n"):
        for gradients, of_experts in parts:
            assert name not in of_experts and "experts.linear_fc1.weight0" in of_experts
            assert gradients[name].item() * data_parallel == pytest.approx(expected[name].item(), rel=1e-3), name
    for e in range(layers.EXPERTS):
        rank, local = divmod(e, layers.EXPERTS // 2)
        got = parts[rank][0][f"experts.linear_fc1.weight{local}"] * data_parallel
        assert snr_db(expected[f"experts.linear_fc1.weight{e}"], got) > 25


@pytest.mark.parametrize("case", [case for case, (_, _, xielu) in CASES.items() if xielu])
def test_checkpoint_of_two_ranks_loads_on_one(two_ranks, case):
    from megatron.core import dist_checkpointing

    layer, expected = layers.build(layers.config_of(**layers.XIELU), xielu=True, seed=1), torch.load(two_ranks / "xielu.pt")
    with layers.on_cpu():
        loaded = dist_checkpointing.load(layer.sharded_state_dict(prefix="mlp."), str(two_ranks / case))
    layer.load_state_dict({key.removeprefix("mlp."): value for key, value in loaded.items()})
    for name, parameter in layer.named_parameters():
        if "router" not in name:  # the ranks took another's
            assert torch.equal(parameter, expected[name]), name
