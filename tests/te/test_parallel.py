"""TransformerEngine's modules under tensor parallelism of two, with and without sequence parallelism, without Megatron: `te_worker` runs as two ranks, on two
GPUs or, with what TransformerEngine has in C++ stood in for, on the CPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

WORKER = Path(__file__).resolve().parents[1] / "te_worker.py"
KINDS = ("two linears", "mlp", "layer")


@pytest.fixture(scope="module", params=[pytest.param("", marks=pytest.mark.slow), pytest.param("0,1", marks=pytest.mark.multi_gpu)], ids=["cpu", "gpu"])
def ranks(request, tmp_path_factory):
    """What each of the two ranks wrote."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = os.environ | ({} if request.param else {"CUDA_VISIBLE_DEVICES": "", "NVTE_UNFUSED_FP8_UPDATE": "1"})
    command = [sys.executable, str(WORKER)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*command, str(rank), str(directory)], env=environment, **pipes) for rank in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(output[-4000:] for output in outputs)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


def snr(reference: torch.Tensor, value: torch.Tensor) -> float:
    error = (reference.double() - value.double()).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(reference.double().square().sum().item() / error)


@pytest.mark.parametrize("mode", ["tp", "sp"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_what_the_whole_module_gives(ranks, kind, mode):
    """A shard's rows have scales of their own, which moves nothing but subnormals; what is left is bf16's rounding of partial sums."""
    for found in ranks:
        pairs = found[f"{kind}, {mode}"]["pairs"]
        assert {"y", "dx"} < pairs.keys() and all(got.shape == want.shape for got, want in pairs.values())
        for name, (got, want) in pairs.items():
            assert snr(want, got) > 30, f"{name}: {snr(want, got):.1f} dB"


@pytest.mark.parametrize("mode", ["tp", "sp"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_on_the_scale_of_a_weight(ranks, kind, mode):
    first, second = (found[f"{kind}, {mode}"] for found in ranks)
    assert first["scales"] and first["scales"] == second["scales"]
    for name, anchor in first["scales"].items():
        assert anchor == pytest.approx(first["largest"][name] * (1 + 2**-8) ** 2, rel=1e-6), f"{name}: not that of the whole weight"
