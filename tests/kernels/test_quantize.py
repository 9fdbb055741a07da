"""quantize, quantize_weight and fold: bit for bit the reference."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise
from data import all_codes, nasty

from fp8_recipes import RecipeError, ops, reference
from fp8_recipes.formats import E4M3, E5M2, FORMATS, pow2
from fp8_recipes.kernels import common, rows
from fp8_recipes.tensor import GRANULARITIES, ScaledTensor

quantize = import_module("fp8_recipes.kernels.quantize")  # the package's attribute of that name is the function
reference_fold = import_module("fp8_recipes.reference.fold")
FOLDS = [(g, None) for g in GRANULARITIES] + [("micro", "row"), ("tile", "row")]
SHAPES = [(5, 128), (4, 700), (3, 1664), (7, 96), (1, 16)]
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)


@formats
@pytest.mark.parametrize("exponent", [-126, -20, 0, 60, 112])
def test_cast_is_exact_for_every_bf16(device, fmt, exponent):
    """All 65536 bf16 values, NaN, Inf and subnormals among them, under five scales."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024).to(device)
    amax = torch.tensor(fmt.max, device=device) * pow2(torch.tensor(exponent, device=device))
    actual = quantize.quantize_weight(x, amax, fmt=fmt)
    assert_bitwise(actual, reference.quantize_weight(x, amax, fmt=fmt))
    assert actual.scale.item() == 2.0**exponent


@formats
@pytest.mark.parametrize(("granularity", "fold"), FOLDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(device, shape, granularity, fold, fmt):
    x = nasty(*shape, device)
    assert_bitwise(quantize.quantize(x, granularity, fmt, fold=fold), reference.quantize(x, granularity, fmt, fold=fold))


@formats
@pytest.mark.parametrize("granularity", ["micro", "tile"])
def test_every_code_and_fold(device, fmt, granularity):
    """256 codes x 42 folds: each group holds codes and, so that its scale is one, the largest; the first group sets the row's scale."""
    width = 32 if granularity == "micro" else 128
    codes = all_codes().view(fmt.dtype).float()
    groups = torch.nn.functional.pad(codes, (0, -256 % (width - 1))).view(-1, width - 1)
    row = torch.cat([torch.full((1, width), fmt.max), torch.nn.functional.pad(groups, (1, 0), value=fmt.max)]).view(-1)
    x = row.repeat(42, 1)
    x[:, :width] *= pow2(torch.arange(42, dtype=torch.int32))[:, None]
    x = x.bfloat16().to(device)
    q = quantize.quantize(x, granularity, fmt, fold="row")
    assert_bitwise(q, reference.quantize(x, granularity, fmt, fold="row"))
    assert torch.equal(q.scale.cpu(), pow2(torch.arange(42, dtype=torch.int32)))


@formats
def test_ragged_blocks(device, fmt):
    x = nasty(130, 200, device)
    assert_bitwise(quantize.quantize(x, "block", fmt), reference.quantize(x, "block", fmt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("micro", "row"), ("tensor", None)])
def test_input_dtypes(device, dtype, granularity, fold):
    x = nasty(5, 384, device, dtype=dtype)
    assert_bitwise(quantize.quantize(x, granularity, fold=fold), reference.quantize(x, granularity, fold=fold))


@formats
def test_global_scale(device, fmt):
    x = nasty(5, 700, device)
    assert_bitwise(quantize.quantize(x, "micro", fmt, global_scale="measured"), reference.quantize(x, "micro", fmt, global_scale="measured"))
    given = torch.tensor(0.37, device=device)
    assert_bitwise(quantize.quantize(x, "micro", fmt, global_scale=given), reference.quantize(x, "micro", fmt, global_scale=given))


@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("micro", "row"), ("tile", None), ("micro", None)])
def test_rows_too_wide_for_registers(device, monkeypatch, granularity, fold):
    monkeypatch.setattr(quantize, "MAX_ROW", 256)
    monkeypatch.setattr(quantize, "WIDE_TILES", 2)
    x = nasty(4, 900, device)
    assert_bitwise(quantize.quantize(x, granularity, fold=fold), reference.quantize(x, granularity, fold=fold))


@pytest.mark.parametrize("cols", [1, 128, 129, 512, 640, 4096, 7168, 11008, 12288, 14336, 22016, 32768])
def test_row_plan_covers_the_row(cols):
    plan = rows.plan_row(cols)
    covered = (plan.block + plan.tail) * 128
    assert covered >= cols
    for pieces in (plan.block, max(plan.tail, 1), plan.warps):
        assert pieces & (pieces - 1) == 0
    if cols > 512:
        assert covered <= 1.5 * cols
    assert 1 <= plan.warps <= 16


@formats
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (36, 200), (260, 70), (6, 50)], ids=str)
def test_weight(device, shape, transpose, fmt):
    w = nasty(*shape, device)
    amax = torch.tensor(1.75, device=device)
    for increment in (0.0, 1e-3, 5.0):  # 1e-3 crosses 1.75, where the scale doubles; most of the data saturates
        actual = quantize.quantize_weight(w, amax, increment, fmt, transpose=transpose)
        assert_bitwise(actual, reference.quantize_weight(w, amax, increment, fmt, transpose=transpose))
        if actual.row_scale is not None:  # None: a shape that no GEMM takes
            assert torch.equal(actual.row_scale, actual.scale.expand(actual.shape[0]))


@formats
def test_fold_every_code_and_shift(device, fmt):
    """256 codes under shifts 0..-40: tiles 0 and 1 hold the codes, tile 2 holds the row's largest scale."""
    payload = torch.zeros(41, 384, dtype=torch.uint8)
    payload[:, :256] = all_codes()
    scale = torch.ones(41, 3)
    scale[:, 2] = pow2(torch.arange(41))
    q = ScaledTensor(payload.view(fmt.dtype).to(device), scale.to(device), "tile")
    assert_bitwise(quantize.fold(q, "row"), reference.fold(q, "row"))
    assert_bitwise(quantize.fold(q, "tensor"), reference.fold(q, "tensor"))


@formats
@pytest.mark.parametrize("granularity", ["micro", "tile", "block", "row"])
def test_fold(device, granularity, fmt):
    q = reference.quantize(nasty(130, 300, device), granularity, fmt)
    assert_bitwise(quantize.fold(q, "tensor"), reference.fold(q, "tensor"))
    for to, finer in reference_fold.FINER.items():
        if granularity in finer:
            assert_bitwise(quantize.fold(q, to), reference.fold(q, to))


def test_fold_to_its_own_granularity_is_itself(device):
    q = reference.quantize(nasty(4, 128, device), "row")
    assert quantize.fold(q, "row") is q


def test_a_scale_that_is_no_power_of_two_folds_to_nan(device):
    q = reference.quantize(torch.ones(2, 256, device=device), "tile")
    q.scale[1, 0] = 3.0
    payload = quantize.fold(q, "row").payload.float()
    assert payload[1, :128].isnan().all()
    assert payload[0].isfinite().all() and payload[1, 128:].isfinite().all()


def test_amax_ignores_what_is_not_finite(device):
    x = torch.tensor([[1.0, float("nan"), -7.5], [float("-inf"), 2.0, 0.0]], dtype=torch.bfloat16, device=device)
    assert quantize.amax(x).item() == 7.5
    assert quantize.amax(torch.full((2, 5000), float("nan"), device=device)).item() == 0


def test_results_do_not_depend_on_the_run(device):
    x = nasty(6, 640, device)
    assert_bitwise(quantize.quantize(x, "micro", fold="row"), quantize.quantize(x, "micro", fold="row"))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda x: quantize.quantize(x[:0], "row"), ValueError, "empty"),
        (lambda x: quantize.quantize(x[:, :0], "row"), ValueError, "empty|contiguous"),
        (lambda x: quantize.quantize(x.t(), "row"), ValueError, "contiguous"),
        (lambda x: quantize.quantize(x[None], "row"), ValueError, "2-D"),
        (lambda x: quantize.quantize(x.int(), "row"), TypeError, "bfloat16"),
        (lambda x: quantize.quantize(x, "rows"), ValueError, "rows"),
        (lambda x: quantize.quantize(x, "row", fold="row"), ValueError, "fold"),
        (lambda x: quantize.quantize(x, "micro", fold="row", global_scale="measured"), ValueError, "global_scale"),
        (lambda x: quantize.quantize(x.to("meta"), "row"), ValueError, "meta"),
        (lambda x: quantize.quantize_weight(x[:0], x.new_ones(())), ValueError, "empty"),
        (lambda x: quantize.quantize_weight(x, x.new_ones(3)), ValueError, "amax"),
        (lambda x: quantize.quantize_weight(x, torch.ones((), device="meta")), ValueError, "amax"),
        (lambda x: quantize.fold(reference.quantize(x, "row"), "tile"), ValueError, "cannot fold a row payload to tile"),
        (lambda x: quantize.fold(reference.quantize(x, "micro"), "column_block"), ValueError, "column_block"),
        (lambda x: quantize.fold(reference.quantize(x, "block"), "row"), ValueError, "block"),
        (lambda x: quantize.fold(ScaledTensor(reference.quantize(x, "row").payload[:, ::2], x.new_ones(4).float(), "row"), "tensor"), ValueError, "contiguous"),
        (lambda x: quantize.fold(reference.quantize(x, "micro", global_scale="measured"), "row"), ValueError, "global scale"),
    ],
)
def test_bad_input(device, make, error, match):
    with pytest.raises(error, match=match):
        make(torch.ones(4, 64, dtype=torch.bfloat16, device=device))


def test_wrong_device_names_the_remedy(monkeypatch):
    monkeypatch.setattr(common, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="fp8_recipes.ops"):
        quantize.quantize(torch.ones(2, 32), "row")


@pytest.mark.parametrize(("name", "capability"), [("NVIDIA L40S", (8, 9)), ("NVIDIA B200", (10, 0))])
def test_another_gpu_is_refused_before_the_first_kernel(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    with pytest.raises(RecipeError, match=rf"{name} has compute capability {capability[0]}\.{capability[1]}; .*Hopper.*CPU"):
        ops._kernels.__wrapped__()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4096, 11008), (2048, 12288), (1024, 22016), (64, 40960), (32768, 512)], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), FOLDS)
def test_quantize_real_sizes(device, shape, granularity, fold):
    x = nasty(*shape, device)
    for fmt in (E4M3, E5M2):
        assert_bitwise(quantize.quantize(x, granularity, fmt, fold=fold), reference.quantize(x, granularity, fmt, fold=fold))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(22016, 4096), (4096, 11008), (12288, 4096)], ids=str)
def test_weight_real_sizes(device, shape):
    w = torch.randn(shape, device=device).bfloat16()
    amax = w.abs().amax().float()
    for transpose in (False, True):
        assert_bitwise(quantize.quantize_weight(w, amax, 1e-3, transpose=transpose), reference.quantize_weight(w, amax, 1e-3, transpose=transpose))
