"""fold_transpose: bit for bit the reference, for every code and shift, every granularity, ragged sizes."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise, assert_snr
from data import all_codes, nasty

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS, pow2
from fp8_recipes.kernels import fold_transpose, quantize
from fp8_recipes.tensor import ScaledTensor

module = import_module("fp8_recipes.kernels.fold_transpose")  # the package's attribute of that name is the function
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
SMALL = module.TransposePlan(rows=32)


@pytest.fixture(autouse=True)
def small_tiles_where_there_is_no_gpu(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(module, "PLAN", SMALL)
        monkeypatch.setattr(module, "WEIGHT_PLAN", SMALL)


def row_payload(shifts: torch.Tensor, fmt, device) -> ScaledTensor:
    """All 256 codes in every row; row i has the scale 2**shifts[i]; every tile needs 2**0, so that row i must be shifted by shifts[i]."""
    payload = all_codes().repeat(len(shifts), 1).view(fmt.dtype)
    tile_exponent = torch.full((len(shifts), 2), 127, dtype=torch.uint8)
    return ScaledTensor(payload.to(device), pow2(shifts).to(device), "row", tile_exponent=tile_exponent.to(device))


@formats
@pytest.mark.parametrize("ragged", [False, True], ids=["words", "bytes"])
def test_every_code_and_shift(device, fmt, ragged):
    """256 codes x shifts -40 .. 40, through the kernel that moves words and the one that moves bytes (81 rows)."""
    shifts = torch.arange(-40, 41 if ragged else 44, dtype=torch.int32)
    q = row_payload(shifts, fmt, device)
    assert_bitwise(fold_transpose(q), reference.fold_transpose(q))


@formats
def test_extreme_shifts(device, fmt):
    """Down to where everything is flushed and up to where everything saturates; zeros stay zeros and NaN stays NaN."""
    shifts = torch.tensor([-126, -100, -64, 50, 64, 100, 111, 0], dtype=torch.int32)  # 57344 * 2**111 is the last that fp32 can hold
    q = row_payload(shifts, fmt, device)
    assert_bitwise(fold_transpose(q), reference.fold_transpose(q))


@formats
@pytest.mark.parametrize("to", ["column_block", "tensor"])
@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("micro", "row"), ("tile", None), ("micro", None)])
@pytest.mark.parametrize("shape", [(36, 160), (32, 128), (7, 130), (4, 100)], ids=str)
def test_fold_transpose(device, shape, granularity, fold, to, fmt):
    q = reference.quantize(nasty(*shape, device), granularity, fmt, fold=fold)
    assert_bitwise(fold_transpose(q, to), reference.fold_transpose(q, to))


@formats
@pytest.mark.parametrize("to", ["column_block", "tensor"])
@pytest.mark.parametrize("shape", [(36, 160), (32, 128), (160, 36), (68, 260), (7, 130), (4, 100)], ids=str)
def test_one_scale_for_all_moves_every_byte_as_it_is(device, shape, to, fmt):
    q = reference.quantize(nasty(*shape, device), "tensor", fmt)
    got = fold_transpose(q, to)
    assert_bitwise(got, reference.fold_transpose(q, to))
    assert torch.equal(got.payload.view(torch.uint8).t(), q.payload.view(torch.uint8)) and (got.scale == q.scale).all()
    q = ScaledTensor(all_codes().repeat(8, 1).view(fmt.dtype).to(device), torch.tensor(0.3, device=device), "tensor")
    got = fold_transpose(q, to)
    assert torch.equal(got.payload.view(torch.uint8).t(), q.payload.view(torch.uint8)), "NaN codes and a scale that is no power of two included"
    assert (got.scale == q.scale).all()


@pytest.mark.parametrize("columns_first", [False, True])
def test_launch_orders(device, columns_first):
    q = reference.quantize(nasty(68, 260, device), "micro", fold="row")
    plan = dataclasses.replace(SMALL, columns_first=columns_first)
    assert_bitwise(fold_transpose(q, plan=plan), reference.fold_transpose(q))


def test_many_partial_targets(device, monkeypatch):
    """The largest exponent is found wherever it stands among the rows."""
    monkeypatch.setattr(module, "MAX_PARTS", 2)
    for hot in (0, 40, 79):
        x = torch.ones(80, 128, dtype=torch.bfloat16, device=device)
        x[hot] = 1000.0
        q = reference.quantize(x, "row")
        assert_bitwise(fold_transpose(q), reference.fold_transpose(q))


def test_transpose_keeps_the_numbers(device):
    """End to end against the unquantised tensor: E4M3's own error and nothing more."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    xt = fold_transpose(quantize(x, "micro", fold="row"))
    assert xt.shape == (256, 64) and xt.granularity == "row"
    assert_snr(x.t(), reference.dequantize(xt), at_least=31.0)


@pytest.mark.parametrize("granularity", ["row", "tile"])
@pytest.mark.parametrize("rows", [8, 7])
def test_a_scale_that_is_no_power_of_two_becomes_nan(device, granularity, rows):
    q = reference.quantize(torch.ones(rows, 128, dtype=torch.bfloat16, device=device), granularity)
    q.scale.view(-1)[3] = 3.0
    payload = fold_transpose(q).payload.float()
    assert payload[:, 3].isnan().all()
    assert payload[:, :3].isfinite().all() and payload[:, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda q: fold_transpose(q, "row"), "column_block"),
        (lambda q: fold_transpose(ScaledTensor(q.payload, q.scale, "row")), "tile exponents"),
        (lambda q: fold_transpose(ScaledTensor(q.payload[:0], q.scale[:0], "row", tile_exponent=q.tile_exponent[:0])), "empty"),
        (lambda q: fold_transpose(ScaledTensor(q.payload[:, :64], q.scale, "row", tile_exponent=q.tile_exponent)), "not contiguous"),
        (lambda q: fold_transpose(ScaledTensor(q.payload[:, :64], q.scale[0], "tensor")), "not contiguous"),
        (lambda q: fold_transpose(reference.quantize(torch.ones(4, 128), "block")), "block"),
        (lambda q: fold_transpose(reference.quantize(torch.ones(4, 128), "micro", global_scale="measured")), "global"),
    ],
)
def test_bad_input(device, make, match):
    if device.type != "cpu" and match in ("block", "global"):
        match = "CUDA"
    with pytest.raises(ValueError, match=match):
        make(reference.quantize(torch.ones(4, 128, dtype=torch.bfloat16, device=device), "row"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4096, 11008), (2048, 12288), (1024, 22016), (8208, 144)], ids=str)
@pytest.mark.parametrize("plan", [module.PLAN, *(module.TransposePlan(r, w, c, o) for r, w, c, o in [(256, 8, True, True), (256, 4, False, False)])], ids=str)
def test_real_sizes(device, shape, plan):
    for fmt in FORMATS.values():
        for granularity, fold in (("micro", "row"), ("row", None), ("micro", None)):
            q = quantize(nasty(*shape, device), granularity, fmt, fold=fold)
            assert_bitwise(fold_transpose(q, plan=plan), reference.fold_transpose(q))
        q = quantize(nasty(*shape, device), "tensor", fmt)
        assert_bitwise(fold_transpose(q, plan=plan), reference.fold_transpose(q))
