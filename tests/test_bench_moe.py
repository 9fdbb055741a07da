"""scripts/bench_moe.py without a GPU: every ablation computes what the layer computes, and takes its own way."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fp8_recipes import ops

ROOT = Path(__file__).resolve().parents[1]
TOKENS, K, EXPERTS, HIDDEN, FFN = 96, 3, 5, 256, 128


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield import_module("bench_moe")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def problem(bench):
    """A `Problem` on the CPU; its constructor makes one on a GPU."""
    gen = torch.Generator().manual_seed(0)
    p = object.__new__(bench.Problem)
    p.name, p.tokens, p.k, p.experts, p.hidden, p.ffn = "small", TOKENS, K, EXPERTS, HIDDEN, FFN
    p.x, p.dy = (torch.randn(TOKENS, HIDDEN, generator=gen).bfloat16() for _ in range(2))
    p.index = torch.rand(TOKENS, EXPERTS, generator=gen).topk(K, dim=1).indices.int()
    p.prob = torch.rand(TOKENS, K, generator=gen)
    p.w1 = (torch.randn(EXPERTS, 2 * FFN, HIDDEN, generator=gen) * HIDDEN**-0.5).bfloat16()
    p.w2 = (torch.randn(EXPERTS, HIDDEN, FFN, generator=gen) * FFN**-0.5).bfloat16()
    return p


@pytest.mark.parametrize("name", ["unfused permute, pad", "dequantise, transpose, requantise", "unfused SwiGLU and quantise"])
def test_an_ablation_changes_the_way_and_not_the_result(bench, monkeypatch, name):
    p = problem(bench)
    ours, other = bench.Ours(p, "fp8_flow_moe"), bench.ABLATIONS[name](p, "fp8_flow_moe")
    other.name, calls = name, []
    replaced = {op: lambda *args, op=op, way=way, **kw: (calls.append(op), way(*args, **kw))[1] for op, way in other.patches.items()}
    monkeypatch.setattr(other, "patches", replaced)
    originals = {op: getattr(ops, op) for op in replaced}
    with torch.compiler.set_stance("force_eager"):
        rows, failures = bench.checked([ours, other], dict.fromkeys(bench.FLOORS, 24.0))
        assert not failures and [row["contender"] for row in rows] == ["fp8_flow_moe", name]
        other.step(1)
    exact = {"snr_dw1_db", "snr_dw2_db", "snr_dprob_db"} if name != "unfused SwiGLU and quantise" else set()
    assert all(rows[1][column] == float("inf") for column in exact), rows[1]
    assert set(calls) == set(replaced), "every replaced operation ran"
    assert {op: getattr(ops, op) for op in replaced} == originals, "and only inside the contender's own steps"
    assert getattr(other, "h", None) is None, "nothing of a step stays in memory"
