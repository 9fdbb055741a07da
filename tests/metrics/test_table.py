"""Sums added up over microbatches and ranks. The two-rank tests run two gloo processes and compare with one process that sees everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from metrics_ranks import spawn

from fp8_recipes.metrics import MomentTable, Reading
from fp8_recipes.reference import quantize


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {"a": torch.randn(12, 64, generator=g), "b": torch.randn(12, 96, generator=g).exp(), "c": torch.randn(12, 32, generator=g)}
    found["a"][:, 3] *= 40
    found["b"][5, 7] = float("nan")
    return found


def one_process() -> dict[str, Reading]:
    table = MomentTable()
    for name, x in tensors().items():
        table.add(name, x, quantize(x, "row") if name == "c" else None, fold=False)
    return table.reduce()


def same(a: Reading, b: Reading) -> None:
    for field, value in vars(a).items():
        assert value == (pytest.approx(getattr(b, field), rel=1e-9) if value is not None else None), field


def test_payload_for_its_values_alone_is_read_as_the_tensor_it_stands_for() -> None:
    q, plain, payload = quantize(tensors()["a"], "row"), MomentTable(), MomentTable()
    for _ in range(2):
        plain.add("a", q.payload.float() * q.scale[:, None])
        payload.add("a.input", None, q)
        payload.same_values("a", "a.input")
    readings = payload.reduce()
    assert list(readings) == ["a.input", "a"]
    assert readings["a"].as_json() == pytest.approx(plain.reduce()["a"].as_json(), rel=1e-9)
    assert readings["a"].as_json().items() <= readings["a.input"].as_json().items() and "flush_share" in readings["a.input"].as_json()


def test_microbatches_add_up_and_the_order_of_names_stays() -> None:
    table = MomentTable()
    for rows in (slice(0, 5), slice(5, 12)):
        for name, x in tensors().items():
            x = x[rows].contiguous()
            table.add(name, x, quantize(x, "row") if name == "c" else None, fold=False)
    readings, whole = table.reduce(), one_process()
    assert list(readings) == ["a", "b", "c"]
    for name in readings:
        same(readings[name], whole[name])
    table.reset()
    assert table.reduce()["a"].kurtosis is None


def test_reading_of_a_quantised_and_of_a_plain_tensor() -> None:
    readings = one_process()
    assert readings["a"].scale_exponent_max is None and "flush_share" not in readings["a"].as_json()
    assert readings["b"].nonfinite == 1 and readings["b"].as_json()["nonfinite"] == 1
    c = readings["c"]
    assert c.scale_exponent_min is not None and c.scale_exponent_max is not None and c.scale_exponent_min <= c.scale_exponent_max < 0
    assert c.rms == pytest.approx(1.0, abs=0.1) and c.saturation_share == 0
    assert set(c.as_json()) >= {"flush_share", "saturation_share", "fold_flush_share", "scale_exponent_min", "scale_exponent_max"}


def test_more_names_than_one_block_and_tensors_of_any_rank() -> None:
    table = MomentTable()
    for i in range(130):
        table.add(f"t{i}", torch.full((2, 3, 8), float(i + 1)))
    table.add("nothing", torch.zeros(0, 8))
    readings = table.reduce()
    assert len(readings) == 130
    assert (readings["t129"].amax, readings["t129"].elements, readings["t129"].kurtosis) == (130.0, 48, 1.0)


def test_no_tensor_at_all_is_an_error_and_an_empty_table_reads_empty() -> None:
    with pytest.raises(ValueError, match="'x'"):
        MomentTable().add("x", None)
    assert MomentTable().reduce() == {}


# --- two ranks --------------------------------------------------------------------------------------------------------------------------------------------


def _all_ways(rank: int, whole: dict[str, Reading]) -> None:
    """a: features split (tensor parallelism). b: tokens split (data). c: on rank 1 only (pipeline). d: whole on both (no sequence parallelism)."""
    x, table = tensors(), MomentTable()
    for step in range(2):  # the second time no names are exchanged
        table.add("a", x["a"].chunk(2, dim=1)[rank], shard=dist.group.WORLD)
        table.add("b", x["b"][:4] if rank == 0 else x["b"][4:])
        if rank == 1:
            table.add("c", x["c"], quantize(x["c"], "row"), fold=False)
        table.add("d", x["a"], copies=2)
        if rank == 1:
            table.same_values("e", "c")
        readings = table.reduce()
        assert sorted(readings) == ["a", "b", "c", "d", "e"], step
        assert readings["e"].kurtosis == readings["c"].kurtosis and readings["e"].scale_exponent_max is None
        for name in "abc":
            same(readings[name], whole[name])
        same(readings["d"], whole["a"])
        table.reset()
    every: list[Any] = [None, None]
    dist.all_gather_object(every, readings)
    assert every[0] == every[1]
    if rank == 0:
        table.add("late", x["c"])
    assert table.reduce()["late"].elements == x["c"].numel()


def _first_stage_idle(rank: int, whole: dict[str, Reading]) -> None:
    """A rank that never saw a tensor takes part."""
    table = MomentTable()
    if rank == 1:
        table.add("c", tensors()["c"], quantize(tensors()["c"], "row"), fold=False)
    same(table.reduce()["c"], whole["c"])


def _both(rank: int, whole: dict[str, Reading]) -> None:
    _all_ways(rank, whole)
    _first_stage_idle(rank, whole)


def test_two_ranks_read_what_one_process_reads() -> None:
    spawn(_both, one_process())
