"""A mixture-of-experts layer whose experts are spread over two processes, against the same layer on one."""

from __future__ import annotations

import dispatch_worker
import moe_worker
import pytest
import torch
from assertions import assert_bitwise, assert_snr
from moe_cases import CALLS, Results, flow, results

RUNS: dict[str, list[dict[tuple[str, str, str], Results]]] = {}
LAUNCHES: list[tuple[dict[str, int], list[str]]] = []
MODULES: list[Results] = []


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.multi_gpu)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[tuple[str, str, str], Results]]]:
    """(device, what each rank handed back)."""
    backend = request.param
    if backend not in RUNS:
        RUNS[backend] = []
        out = tmp_path_factory.mktemp(backend)
        dispatch_worker.spawn(moe_worker.work, 2, backend, str(out / "store"), str(out))
        RUNS[backend] = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]
        if backend == "gloo":
            LAUNCHES.extend(torch.load(out / f"launches {rank}.pt", weights_only=False) for rank in range(2))
            MODULES.extend(torch.load(out / f"module {rank}.pt") for rank in range(2))
    if not RUNS[backend]:
        pytest.fail(f"the run over two ranks ({backend}) failed in an earlier test")
    return "cpu" if backend == "gloo" else "cuda", RUNS[backend]


@pytest.mark.parametrize("name", moe_worker.RUNS, ids=", ".join)
def test_two_ranks_equal_one(ranks: tuple[str, list[dict[tuple[str, str, str], Results]]], name: tuple[str, str, str]) -> None:
    device, found = ranks
    got, (label, saved, activation) = [one[name] for one in found], name
    want = results(moe_worker.whole(label, activation).to(device), flow(f"fp8_flow_moe:moe_saved={saved}", activation=activation))
    # Each expert sees the same rows in the same order: same bits. A token's copies are added up on each rank by itself, so bf16 rounds once more.
    for key in ("dprob", "dw1", "dw2"):
        assert_bitwise(torch.cat([one[key] for one in got]), want[key].cpu(), key)
    for key in ("y", "dx"):
        if label == "NaN in a token":
            check_nan(want[key].cpu(), torch.cat([one[key] for one in got]))
            continue
        assert_snr(want[key].cpu(), torch.cat([one[key] for one in got]), 48.0, key)
        if label in ("all tokens to rank 1", "one expert for all"):
            assert_bitwise(torch.cat([one[key] for one in got]), want[key].cpu(), key)
    if activation == "xielu":  # each rank has the rows of its experts: they add up to all rows
        torch.testing.assert_close(sum(one["dalpha"] for one in got), want["dalpha"].cpu(), rtol=1e-5, atol=1e-4)
        assert got[0]["dalpha"].any() == (label != "all tokens to rank 1")


def check_nan(want: torch.Tensor, got: torch.Tensor) -> None:
    """The whole row of that token is NaN, also where it was sent away, and no other."""
    token = moe_worker.POISONED[0]
    others = torch.arange(len(want)) != token
    assert torch.isnan(got[token]).all() and torch.isfinite(got[others]).all()
    assert_snr(want[others], got[others], 48.0, "the other tokens")


ACROSS = {"send_map": 1, "pack_rows": 2, "unpack_rows": 2, "combine_sent": 2, "copies_of_sent": 1}


@pytest.mark.parametrize("ranks", ["gloo"], indirect=True)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_casts_stand_alone_across_ranks_too(ranks: object, rank: int) -> None:
    """What travels is packed and unpacked; outside the operations only four collectives touch a large tensor: one dispatch and one combine each way."""
    calls, outside = LAUNCHES[rank]
    assert calls == CALLS | ACROSS
    assert [text.split()[0] for text in outside] == ["c10d.alltoall_base_"] * 4, outside


@pytest.mark.parametrize("ranks", ["gloo"], indirect=True)
def test_module_over_ranks_equals_one(ranks: object) -> None:
    """`MoE` with router and shared experts: each rank holds half of the experts and of the tokens; what it has of the others is summed by the user."""
    c = moe_worker.whole("usual", "swiglu")
    want, half = moe_worker.gradients(moe_worker.module(), c.x, c.dy), moe_worker.EXPERTS // 2
    for name, expected in want.items():
        if name in ("y", "dx"):
            assert_snr(expected, torch.cat([one[name] for one in MODULES]), 45.0, name)
        elif name[0] == "w":
            rank, local = divmod(int(name[3:]), half)
            assert_snr(expected, MODULES[rank][f"{name[:3]}{local}"], 45.0, name)
        else:  # of router and shared experts a rank has its own tokens' part, in bf16
            assert_snr(expected, sum(one[name].float() for one in MODULES), 24.0 if name.startswith("shared") else 40.0, name)  # type: ignore[arg-type]
