"""Dispatch and combine over 2 and 4 processes (gloo; NCCL where there are two GPUs) against rows picked one by one, and what goes wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dispatch_worker as worker
import pytest
import torch
from assertions import assert_bitwise
from dispatch_worker import CASES, COLS

from fp8_recipes.nn.dispatch import AllToAll, DeepEP, Local, from_scale_words, scale_words
from fp8_recipes.reference import dequantize, quantize
from fp8_recipes.reference.dispatch import row_layout

Results = list[dict[str, Any]]
CPU = torch.device("cpu")
RUNS: dict[tuple[int, str], Results] = {}


def results_of(world: int, backend: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank of one run of all cases handed back; run once per session, also if it fails."""
    if (world, backend) not in RUNS:
        RUNS[world, backend] = []
        out = tmp_path_factory.mktemp(f"{backend}{world}")
        worker.spawn(worker.work, world, backend, str(out / "store"), str(out))
        RUNS[world, backend] = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(world)]
    if not RUNS[world, backend]:
        pytest.fail(f"the run over {world} ranks ({backend}) failed in an earlier test")
    return RUNS[world, backend]


@pytest.fixture(params=[(2, "gloo"), (4, "gloo"), pytest.param((2, "nccl"), marks=pytest.mark.multi_gpu)], ids=["2 gloo", "4 gloo", "2 nccl"])
def ranks(request, tmp_path_factory) -> Results:
    return results_of(*request.param, tmp_path_factory)


@pytest.fixture
def two(tmp_path_factory) -> Results:
    return results_of(2, "gloo", tmp_path_factory)


def expected_rows(case: str, rank: int, world: int) -> list[tuple[int, int, list[int], list[float]]]:
    """What rank must receive, one by one: (rank it comes from, token, local ids, probabilities)."""
    rows = []
    for source in range(world):
        given = worker.inputs(case, source, world)
        local = given.experts // world
        for token in range(given.tokens):
            ids = [e - rank * local if e // local == rank else -1 for e in given.index[token].tolist()]
            if any(i >= 0 for i in ids):
                rows.append((source, token, ids, [p if i >= 0 else 0.0 for p, i in zip(given.prob[token].tolist(), ids, strict=True)]))
    return rows


@pytest.mark.parametrize("case", CASES)
def test_every_rank_receives_its_tokens_once_in_order(ranks, case):
    world = len(ranks)
    sent = [worker.quantized(case, worker.inputs(case, r, world), CPU) for r in range(world)]
    for rank, results in enumerate(ranks):
        got, rows = results[case], expected_rows(case, rank, world)
        assert got["splits"][1].tolist() == [sum(source == s for source, *_ in rows) for s in range(world)]
        assert got["index"].tolist() == [ids for _, _, ids, _ in rows]
        assert_bitwise(got["prob"], torch.tensor([p for *_, p in rows]).reshape(got["prob"].shape), "prob")
        for direction in ("forward", "backward"):
            for field in ("payload", "scale", "tile_exponent"):
                parts = [getattr(sent[source], field) for source, *_ in rows]
                if field == "tile_exponent" and case.startswith("E5M2"):
                    assert got[f"{direction} {field}"] is None
                elif not rows:
                    assert got[f"{direction} {field}"].shape[0] == 0
                else:
                    wanted = torch.stack(
                        [t.view(torch.uint8)[token] if field == "payload" else t[token] for t, (_, token, *_) in zip(parts, rows, strict=True)]
                    )
                    actual = got[f"{direction} {field}"]
                    assert_bitwise(actual.view(torch.uint8) if field == "payload" else actual, wanted, f"rank {rank}, {direction} {field}")


@pytest.mark.parametrize("case", CASES)
def test_results_come_back_and_are_summed_in_the_order_of_the_ranks(ranks, case):
    world = len(ranks)
    back = [expected_rows(case, r, world) for r in range(world)]
    for rank, results in enumerate(ranks):
        given = worker.inputs(case, rank, world)
        total, dprob = torch.zeros(given.tokens, COLS), torch.zeros(given.tokens, given.k)
        for other in range(world):
            for row, (source, token, ids, _) in enumerate(back[other]):
                if source == rank:
                    total[token] += ranks[other][case]["y"][row].float()
                    here = torch.tensor(ids) >= 0
                    dprob[token, here] = ranks[other][case]["dprob"][row, here]
        assert_bitwise(results[case]["combined"], total.bfloat16(), f"rank {rank}, combined")
        assert_bitwise(results[case]["combined_prob"], dprob, f"rank {rank}, prob")
        if case == "usual":
            assert total.count_nonzero() > 0.9 * total.numel() and dprob.count_nonzero() > 0


def test_a_layer_over_ranks_equals_one_rank(ranks):
    for results in ranks:
        assert results["layer"].count_nonzero() > 0
        assert_bitwise(results["layer"], results["layer, one rank"])


def test_a_token_is_sent_once_per_rank_and_not_per_copy(ranks):
    world = len(ranks)
    for rank, results in enumerate(ranks):
        case = "more experts than tokens"
        given = worker.inputs(case, rank, world)
        assert max(results[case]["splits"][0].tolist()) <= given.tokens < int((given.index >= 0).sum())


@pytest.mark.multi_gpu
def test_nothing_but_the_counts_is_waited_for(tmp_path_factory):
    assert [r["waits"] for r in results_of(2, "nccl", tmp_path_factory)] == ["no error"] * 2


ERRORS: dict[str, str | tuple[str, str]] = {
    "ids": "ValueError: expert_index has ids outside -1 .. 7: 2 on rank 1",
    "experts": "ValueError: the ranks do not fit together: num_experts is 8 on rank 0, 16 on rank 1; give every rank the same model",
    "top-k": "ValueError: the ranks do not fit together: K is 3 on rank 0, 2 on rank 1; give every rank the same model",
    "not a multiple": "ValueError: num_experts = 9 cannot be shared equally by 2 ranks; use a multiple of the group's size",
    "not a multiple on one rank": (
        "ValueError: rank 0 stops because expert_index or num_experts of rank [1] cannot be planned; the error there says why",
        "ValueError: num_experts = 9 cannot be shared equally by 2 ranks",
    ),
    "columns": "ValueError: the ranks do not fit together (rank 0: what rows, columns 256, tile_exponents 2, K 3",
    "format": "ValueError: the ranks do not fit together",
    "prob on one rank": "ValueError: the ranks do not fit together",
    "result columns": "ValueError: the ranks do not fit together (rank 0: what results, columns 32, dtype torch.bfloat16; rank 1: what results, columns 48",
    "plans": "ValueError: the ranks do not fit together: number of plans so far is ",
    "rows here": "ValueError: y must be contiguous",
    "granularity": "ValueError: cannot send rows of a tile payload",
    "afterwards": "no error",
}


@pytest.mark.parametrize("what", ERRORS)
def test_wrong_use_is_the_same_clear_error_on_every_rank(two, what):
    for rank, results in enumerate(two):
        expected = ERRORS[what]
        assert results["errors"][what].startswith(expected if isinstance(expected, str) else expected[rank]), f"rank {rank}: {results['errors'][what]}"


@pytest.mark.parametrize(("how", "when"), [("dies", "dispatch"), ("dies", "plan"), ("stops", "combine"), ("dies", "backward")])
def test_a_rank_that_leaves_is_an_error_and_no_hang(tmp_path, how, when):
    """The process group's timeout is 4 s."""
    out = tmp_path / "result.pt"
    worker.spawn(worker.leave, 2, str(tmp_path / "store"), str(out), how, when)
    message, seconds = torch.load(out, weights_only=False)
    assert message.startswith("RuntimeError: all_") and "failed on rank 0: a rank died, left the group or did not call it within the timeout" in message
    assert seconds < 8


@pytest.mark.parametrize("case", CASES)
def test_deep_ep_calls_its_library_as_documented(two, case):
    """Against a stand-in of deep_ep.Buffer: the same received rows and the same results as AllToAll."""
    for results in two:
        actual, expected = results[f"DeepEP {case}"], results[case]
        assert set(expected) - set(actual) == {"splits"}
        for name, t in actual.items():
            if expected[name] is None:
                assert t is None
            else:
                assert_bitwise(t, expected[name], name)


def test_deep_ep_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deep_ep", None)
    with pytest.raises(RuntimeError, match="needs the package deep_ep .*install it or use AllToAll"):
        DeepEP()


def test_scale_words_keep_scales_and_exponents():
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(-120, 90, 30).float())[:, None]
    q = quantize(x.bfloat16(), "tile", fold="row")
    assert_bitwise(from_scale_words(q.payload, scale_words(q), True), q)
    odd = replace(q, scale=q.scale.clone())
    odd.scale[:4] = torch.tensor([3.0, -2.0, torch.nan, torch.inf])
    for exponents in (q.tile_exponent, None):
        back = from_scale_words(q.payload, scale_words(replace(odd, tile_exponent=exponents)), exponents is not None)
        assert back.scale[:3].isnan().all() and back.scale[3].isinf(), "no power of two"
        assert_bitwise(back.scale[4:], q.scale[4:])
        assert exponents is None or torch.equal(back.tile_exponent, exponents)
    assert q.tile_exponent is not None and q.scale.unique().numel() == 7
    with pytest.raises(ValueError, match="multiple of 128, got 144; use AllToAll"):
        scale_words(quantize(x[:, :144].bfloat16().contiguous(), "row"))


def test_local_is_the_identity():
    given, d = worker.inputs("usual", 0, 1), Local()
    q = worker.quantized("usual", given, CPU)
    plan = d.plan(given.index, given.experts)
    received, index, prob = d.dispatch(q, given.prob, plan)
    assert received is q and index is given.index and prob is given.prob and d.dispatch(q, None, plan) == (q, None, None)
    y = dequantize(q)
    assert d.combine(y, plan) is y and d.combine_prob(given.prob, plan) is given.prob
    with pytest.raises(ValueError, match="y must be contiguous"):
        d.combine(y[1:], plan)
    with pytest.raises(TypeError, match="must be int32"):
        d.plan(given.index.long(), given.experts)


def test_bytes_of_a_row():
    """About half of bf16, for the models of the benchmark."""
    for cols, k, at_most in ((2048, 6, 0.516), (7168, 8, 0.509), (2048, 8, 0.52)):
        q = SimpleNamespace(granularity="row", payload=torch.empty(1, cols, dtype=torch.float8_e4m3fn), scale=torch.empty(1), shape=(1, cols),
                            tile_exponent=torch.empty(1, cols // 128, dtype=torch.uint8))  # fmt: skip
        forward, backward = row_layout(q, k).nbytes, row_layout(q, 0).nbytes
        assert forward % 16 == backward % 16 == 0 and backward < forward <= at_most * 2 * cols


def test_all_to_all_needs_a_process_group():
    with pytest.raises(ValueError, match="(?i)process group"):
        AllToAll()
