"""The transposes of a grouped buffer, the paper's and ours, over every code and shift; the paper's kernel bit for bit its reference whatever the groups."""

from __future__ import annotations

import pytest
import torch
from assertions import as_bytes, assert_bitwise
from data import GROUPS, all_codes, group_layout, nasty

from fp8_recipes import kernels, ops, reference
from fp8_recipes.formats import FORMATS, Format, pow2
from fp8_recipes.reference.grouped import SMALLEST_SCALE, GroupedTensor
from fp8_recipes.tensor import ScaledTensor

FORMS = ((272, "tile"), (128, "row"), (36, "micro"), (160, "tile"), (128, "micro"), (36, "row"))
"""Columns and granularity, one for each layout of `GROUPS`."""
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)


def check(q: ScaledTensor, block_expert: torch.Tensor | None = None, used: int | None = None) -> GroupedTensor:
    used = q.shape[0] if used is None else used
    got, want = kernels.scaling_aware_transpose(q, block_expert), reference.scaling_aware_transpose(q, block_expert)
    blocks = -(-used // 128)
    assert got.payload.shape == want.payload.shape and got.scale.shape == want.scale.shape
    assert_bitwise(got.scale[:blocks], want.scale[:blocks], "scale")
    assert_bitwise(got.payload[:, :used], want.payload[:, :used], "payload")
    assert (as_bytes(got.payload[:, used:]) == 0x7F).all() and (as_bytes(got.scale[blocks:]) == 0x7F).all(), "unused blocks were written"
    return got


def nearest_even(v: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The value of ``fmt`` nearest to every element of ``v`` (float64, no NaN), ties to the even code, saturating, by looking at all of them."""
    codes = all_codes()[:128].view(fmt.dtype).double()
    codes = codes[codes.isfinite()]  # rising; index and code have the same parity
    above = torch.searchsorted(codes, v.abs().clamp(max=fmt.max)).clamp(min=1)
    low, high = codes[above - 1], codes[above]
    middle = (low + high) / 2
    take = torch.where(v.abs() == middle, above % 2 == 0, v.abs() > middle)
    return torch.where(take, high, low).copysign(v)


def all_shifts(fmt: Format, device: torch.device) -> tuple[ScaledTensor, torch.Tensor]:
    """256 codes in each of 256 rows; row i is to be shifted by shifts[i], -126 .. 111 (57344 * 2**111 is the last that fp32 can hold) and then 0."""
    shifts = torch.cat((torch.arange(-126, 112), torch.zeros(18))).int()
    payload = all_codes().repeat(256, 1).view(fmt.dtype)
    tiles = torch.full((256, 2), 127, dtype=torch.uint8)
    return ScaledTensor(payload.to(device), pow2(shifts).to(device), "row", tile_exponent=tiles.to(device)), shifts


@formats
@pytest.mark.parametrize("form", ["paper", "ours"])
def test_every_code_and_shift(device, fmt, form):
    """Rounded to nearest even into the subnormals, NaN (and E5M2's Inf) NaN, zeros zeros with their sign: against a search through the format's values."""
    q, shifts = all_shifts(fmt, device)
    _, offsets, block_expert = group_layout((2,), device)
    got = check(q) if form == "paper" else kernels.grouped_fold_transpose(q, offsets, block_expert[:2].contiguous())
    assert (got.scale == 1).all()
    exact = q.payload.cpu().double() * torch.exp2(shifts.double())[:, None]
    finite = exact.isfinite()
    result = got.payload.cpu().double().t()
    want = nearest_even(torch.where(finite, exact, 0.0), fmt)
    assert torch.equal(result[finite], want[finite])
    assert torch.equal(result.signbit()[finite], exact.signbit()[finite])
    assert result[~finite].isnan().all() and int((~finite).sum()) > 0


@formats
@pytest.mark.parametrize("granularity", ["tile", "micro"])
def test_every_code_and_downward_shift_of_finer_scales(device, fmt, granularity):
    """All shifts that the paper's form can meet: the largest scale of the tile stands in row 77, row i is i binades below it."""
    below = torch.arange(128).roll(77)
    payload = all_codes().repeat(128, 1).view(fmt.dtype).to(device)
    scale = pow2((60 - below).int()).to(device)[:, None].expand(128, 2).contiguous()
    scale[:, 1] *= 8  # each tile has a target of its own
    if granularity == "micro":
        scale = reference.quantize(torch.zeros(128, 256), "micro").scale.to(device)
        scale[:, :4], scale[:, 4:] = (187 - below).to(scale)[:, None], (190 - below).to(scale)[:, None]
        scale[:, :3] = 40  # three of four groups far below
    got = check(ScaledTensor(payload, scale, granularity))
    assert (got.scale[0, :128] == 2.0**60).all() and (got.scale[0, 128:] == 2.0**63).all()


@pytest.mark.parametrize(("groups", "form"), [*zip(GROUPS, FORMS, strict=True)])
def test_groups(device, groups, form):
    """Ragged and empty experts in one launch; the last rows of a group are padding; unused rows hold garbage, in payload, scale and tile exponent."""
    cols, granularity = form
    rows, offsets, block_expert = group_layout(GROUPS[groups], device)
    x = nasty(rows, cols, device)
    for stop in offsets.tolist()[1:]:
        x[max(stop - 100, 0) : stop] = 0
    q = reference.quantize(x, granularity)
    used = int(offsets[-1])
    as_garbage = 255 if granularity == "micro" else float("nan")
    q.payload.view(torch.uint8)[used:], q.scale[used:] = 0x55, as_garbage
    if q.tile_exponent is not None:
        q.tile_exponent[used:] = 254
    check(q, block_expert, used)


@formats
@pytest.mark.parametrize("shape", [(128, 128), (200, 160), (4, 4), (132, 260)], ids=str)
def test_without_groups(device, shape, fmt):
    check(reference.quantize(nasty(*shape, device), "tile", fmt))


def test_zero_rows_are_harmless(device):
    """A tiny token among zeros keeps its precision; a tile of zeros gets the smallest scale."""
    x = torch.zeros(256, 256, device=device)
    x[5, :128] = torch.randn(128) * 2.0**-100
    q = reference.quantize(x, "tile")
    got = check(q)
    assert_bitwise(got.payload[:128, 5], q.payload[5, :128])
    assert (got.scale[0, 128:] == SMALLEST_SCALE).all() and (got.scale[1] == SMALLEST_SCALE).all()
    assert (got.payload.float()[:, 6:] == 0).all()


def test_one_tile_per_expert_is_ours(device):
    """Where every expert has 128 rows the two forms are the same."""
    rows, offsets, block_expert = group_layout((1, 1, 1), device)
    q = reference.quantize(nasty(rows, 160, device), "tile")
    paper, ours = kernels.scaling_aware_transpose(q, block_expert), kernels.grouped_fold_transpose(q, offsets, block_expert)
    assert_bitwise(paper.payload[:, :384], ours.payload[:, :384])
    assert_bitwise(paper.scale[:3], ours.scale)


@pytest.mark.parametrize("granularity", ["tile", "row"])
def test_a_scale_that_is_no_power_of_two_becomes_nan(device, granularity):
    q = reference.quantize(torch.ones(128, 128, device=device), granularity)
    q.scale[3] = 3.0
    got = kernels.scaling_aware_transpose(q)
    payload = got.payload.float()
    assert payload[:, 3].isnan().all() and int(payload.isnan().sum()) == 128
    assert (got.scale == 2.0**-8).all(), "the bad scale decided the tile's"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda q, b: (reference.quantize(torch.ones(128, 128, device=b.device), "block"), None), ValueError, "block payload carries no tile exponents"),
        (lambda q, b: (ScaledTensor(q.payload, q.scale[:, 0].contiguous(), "row"), None), ValueError, "row payload carries no tile exponents"),
        (lambda q, b: (reference.quantize(torch.ones(128, 6, device=b.device), "tile"), None), ValueError, "cols=6 must be a multiple of 4"),
        (lambda q, b: (reference.quantize(torch.ones(130, 8, device=b.device), "tile"), None), ValueError, "rows=130 must be a multiple of 4"),
        (lambda q, b: (reference.quantize(torch.ones(132, 8, device=b.device), "tile"), b), ValueError, "multiple of 128 rows, got 132"),
        (lambda q, b: (ScaledTensor(q.payload[:, :64], q.scale, "tile"), None), ValueError, "not contiguous"),
        (lambda q, b: (q, b.long()), TypeError, "int32"),
        (lambda q, b: (reference.quantize(torch.ones(128, 64, device=b.device), "micro", global_scale="measured"), None), ValueError, "global scale"),
    ],
)
def test_bad_input(device, make, error, match):
    q = reference.quantize(torch.ones(128, 128, device=device), "tile")
    with pytest.raises(error, match=match):
        kernels.scaling_aware_transpose(*make(q, torch.zeros(1, dtype=torch.int32, device=device)))


def test_ops_takes_the_reference_for_cpu_tensors():
    q = reference.quantize(torch.randn(128, 64), "tile")
    assert_bitwise(ops.scaling_aware_transpose(q).payload, reference.scaling_aware_transpose(q).payload)


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [2048, 7168, 1408])
def test_real_sizes(device, cols):
    generator = torch.Generator().manual_seed(0)
    blocks = tuple(torch.randint(0, 8, (32,), generator=generator).tolist())
    rows, offsets, block_expert = group_layout(blocks, device)
    for granularity, fmt in (("tile", FORMATS["e4m3"]), ("row", FORMATS["e5m2"]), ("micro", FORMATS["e4m3"])):
        check(reference.quantize(nasty(rows, cols, device), granularity, fmt), block_expert, int(offsets[-1]))
