"""fold_transpose(to="column") and its grouped twin: bit for bit the reference, for every code and shift, every granularity, ragged sizes and groups."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise
from data import GROUPS, all_codes, group_layout, nasty

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2, FORMATS, pow2
from fp8_recipes.kernels import column_fold, fold_transpose, grouped_fold_transpose
from fp8_recipes.tensor import ScaledTensor

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)


def check(q: ScaledTensor) -> ScaledTensor:
    got = fold_transpose(q, "column")
    assert_bitwise(got, reference.fold_transpose(q, "column"))
    return got


def check_grouped(q: ScaledTensor, offsets: torch.Tensor, block_expert: torch.Tensor) -> None:
    got, want = (f(q, offsets, block_expert, "column") for f in (grouped_fold_transpose, reference.grouped_fold_transpose))
    used = int(offsets[-1])
    assert_bitwise(got.scale, want.scale, "scale")
    assert_bitwise(got.payload[:, :used], want.payload[:, :used], "payload")
    assert (got.payload.view(torch.uint8)[:, used:] == 0x7F).all(), "columns of unused rows were written"


@formats
def test_every_code_and_shift(device, fmt):
    """256 codes x scales 2**-40 .. 2**43, 2**-126 and 2**111: what a column needs is set by its largest value, wherever it is; and with that one gone, by
    another's."""
    shifts = torch.tensor([*range(-40, 44), -126, -100, 64, 111], dtype=torch.int32)
    tiles = torch.full((len(shifts), 2), 127, dtype=torch.uint8, device=device)
    for seed in range(3):
        payload = all_codes().repeat(len(shifts), 1)
        if seed:
            gone = torch.rand(payload.shape, generator=torch.Generator().manual_seed(seed)) < 0.95
            payload[gone] = 0x80 * (seed - 1)  # zeros of either sign, under scales up to 2**111 beside values under 2**-126
        check(ScaledTensor(payload.view(fmt.dtype).to(device), pow2(shifts).to(device), "row", tile_exponent=tiles))


@pytest.mark.parametrize(
    ("shape", "granularity", "fold", "fmt"),
    [((36, 160), "row", None, E5M2), ((132, 36), "micro", "row", E4M3), ((32, 128), "tile", None, E4M3), ((4, 100), "micro", None, E5M2)],
)
def test_granularities_and_ragged_sizes(device, shape, granularity, fold, fmt):
    check(reference.quantize(nasty(*shape, device), granularity, fmt, fold=fold))


@pytest.mark.parametrize("blocks", GROUPS.values(), ids=GROUPS)
def test_groups(device, blocks, monkeypatch):
    """Two blocks at a time in the second kernel, so that it takes several turns; unused rows hold garbage."""
    monkeypatch.setattr(column_fold, "BLOCKS", 2)
    rows, offsets, block_expert = group_layout(blocks, device)
    q = reference.quantize(nasty(rows, 36, device), "row", E5M2 if len(blocks) % 2 else E4M3)
    used = int(offsets[-1])
    q.payload.view(torch.uint8)[used:], q.tile_exponent[used:] = 0x55, 254
    check_grouped(q, offsets, block_expert)


def test_a_spike_costs_its_own_column_only(device):
    """The point of it: under one scale per 128 columns, the spike's neighbours are flushed."""
    x = torch.ones(128, 128, dtype=torch.bfloat16, device=device)
    x[5, 7] = 2.0**20
    q = reference.quantize(x, "row")
    block, column = (reference.dequantize(fold_transpose(q, to)).t() for to in ("column_block", "column"))
    quiet = [i for i in range(128) if i != 5]
    assert not block[quiet].any(), "under the block's scale nothing is left"
    others = [i for i in range(128) if i != 7]
    assert (column[quiet][:, others] == 1).all()
    assert column[5, 7] == 2.0**20 and not column[quiet, 7].any()


@pytest.mark.parametrize("bad", [3.0, -1.0, 0.0, float("inf"), float("nan"), 2.0**-127])
def test_a_scale_that_is_no_power_of_two_makes_its_row_nan_and_no_other(device, bad):
    q = reference.quantize(torch.ones(8, 128, dtype=torch.bfloat16, device=device), "row")
    want = fold_transpose(q, "column").scale
    q.scale[3] = bad
    got = fold_transpose(q, "column")
    assert got.payload[:, 3].float().isnan().all() and int(got.payload.float().isnan().sum()) == 128
    assert torch.equal(got.scale, want)


def test_bad_input(device):
    q = reference.quantize(torch.ones(6, 128, dtype=torch.bfloat16, device=device), "row")
    with pytest.raises(ValueError, match="6 x 128 cannot be folded to its columns; rows and columns must be multiples of 4"):
        fold_transpose(q, "column")
    _, offsets, block_expert = group_layout((1,), device)
    q = reference.quantize(torch.ones(256, 128, dtype=torch.bfloat16, device=device), "row")
    for f in (grouped_fold_transpose, reference.grouped_fold_transpose):
        if f is grouped_fold_transpose or device.type == "cpu":
            with pytest.raises(ValueError, match="cannot fold the rows of experts to 'tensor'; expected 'column' or 'column_block'"):
                f(q, offsets, block_expert, "tensor")


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [2048, 7168, 1408])
def test_real_sizes(device, cols):
    generator = torch.Generator().manual_seed(0)
    rows, offsets, block_expert = group_layout(tuple(torch.randint(0, 8, (32,), generator=generator).tolist()), device)
    for fmt in FORMATS.values():
        q = reference.quantize(nasty(rows, cols, device), "row", fmt)
        check_grouped(q, offsets, block_expert)
        check(reference.quantize(nasty(1028, cols, device), "micro", fmt, fold="row"))
