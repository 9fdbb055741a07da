"""Fold: every FP8 code at every shift against float64, then folds of tensors against the fold of their elements."""

from __future__ import annotations

import math

import pytest
import torch

from fp8_recipes.formats import E4M3, E5M2, Format, from_e8m0, pow2, to_e8m0
from fp8_recipes.reference.fold import fold, fold_transpose
from fp8_recipes.reference.quantize import dequantize, quantize, tile_exponents
from fp8_recipes.tensor import ScaledTensor

BOTH = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
SHIFTS = range(-40, 41)
RAGGED = [(1, 1), (1, 300), (300, 1), (7, 129), (130, 257)]


def rounded(value: float, fmt: Format) -> float:
    """Nearest `fmt` number of a float64, ties to even, saturating, from the spacing of the numbers around it (no table, no torch)."""
    if math.isnan(value):
        return math.nan
    exponent = max(math.frexp(value)[1] - 1, 1 - (1 << (fmt.exponent_bits - 1)) + 1) if value else 0
    step = math.ldexp(1.0, exponent - fmt.mantissa_bits)
    nearest = round(value / step) * step  # Python's round takes ties to even
    return math.copysign(min(abs(nearest), fmt.max), value)


def all_codes(fmt: Format) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(fmt.dtype)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits for numbers (the sign of zero too), NaN where NaN is expected."""
    numbers = ~expected.isnan()
    bits_equal = torch.equal(got[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    return bits_equal and bool(got[~numbers].isnan().all())


def values(rows: int, cols: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=gen) * 2 ** (torch.randn(rows, 1, generator=gen) * spread)
    return (x * 2 ** (torch.randn(rows, cols, generator=gen) * 2)).bfloat16()


def exponents_of(q: ScaledTensor) -> torch.Tensor:
    """Exponent of the scale of every element, [rows, cols]."""
    if q.granularity == "row":
        return q.scale.log2()[:, None].expand(q.shape)
    fine = (q.scale.int() - 127).float() if q.granularity == "micro" else q.scale.log2()
    return fine.repeat_interleave(32 if q.granularity == "micro" else 128, dim=1)[:, : q.shape[1]]


def shifted_by_hand(payload: torch.Tensor, shift: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Float64 oracle: every element times 2**shift, rounded once."""
    exact = (payload.double() * torch.exp2(shift.double())).flatten()
    return torch.tensor([rounded(v, fmt) for v in exact.tolist()]).view(payload.shape)


@BOTH
def test_every_code_at_every_shift(fmt: Format) -> None:
    """One row of 256 codes per shift; the tile exponents say where the column block has to go, so fold_transpose applies exactly that shift."""
    codes = all_codes(fmt)
    for shift in SHIFTS:
        target = torch.full((1, 2), -shift, dtype=torch.int32)
        q = ScaledTensor(codes[None], torch.ones(1), "row", tile_exponent=to_e8m0(target))
        got = fold_transpose(q)
        finite = torch.where(codes.float().isfinite(), codes.float(), torch.nan)  # E5M2's infinities are not numbers of this package
        expected = torch.tensor([rounded(v * 2.0**shift, fmt) for v in finite.tolist()])
        assert same(got.payload[:, 0].float(), expected), f"shift {shift}"
        assert (got.scale == 2.0**-shift).all()


@BOTH
def test_exact_wherever_the_result_is_normal(fmt: Format) -> None:
    codes = all_codes(fmt)
    finite = codes[codes.float().isfinite()]
    for shift in range(-40, 1):
        q = ScaledTensor(finite[None], torch.ones(1), "row", tile_exponent=to_e8m0(torch.full((1, 2), -shift, dtype=torch.int32)))
        moved = fold_transpose(q)
        before, after = finite.double(), dequantize(moved)[:, 0].double()
        normal = (before.abs() * 2.0**shift >= fmt.min_normal) | (before == 0)
        assert torch.equal(before[normal], after[normal])
        error = (before - after).abs() * 2.0**shift  # in units of the new payload
        assert (error <= fmt.min_subnormal / 2).all()
        flushed = (after == 0) & (before != 0)
        assert torch.equal(flushed, (before != 0) & (before.abs() * 2.0**shift <= fmt.min_subnormal / 2)), "a tie at half a step goes to zero (even)"


def test_nan_is_kept_at_any_shift() -> None:
    x = torch.tensor([[math.nan] + [1.0] * 127 + [2.0**30] * 128])
    folded = fold(quantize(x, "tile"), "row")
    assert dequantize(folded)[0, 0].isnan()
    assert dequantize(folded)[0, 1:128].eq(0).all(), "the rest of the tile is 2**30 below and flushes"
    back = fold_transpose(folded)
    assert dequantize(back)[0, 0].isnan()
    assert dequantize(back)[1:].isfinite().all()


@pytest.mark.parametrize("granularity", ["tile", "micro"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@BOTH
def test_fold_to_rows(fmt: Format, shape: tuple[int, int], granularity: str) -> None:
    q = quantize(values(*shape, seed=1), granularity, fmt)
    fine = (q.scale.int() - 127) if granularity == "micro" else q.scale.log2().int()
    width = 32 if granularity == "micro" else 128
    per_element = fine.repeat_interleave(width, dim=1)[:, : shape[1]]
    target = fine.amax(dim=1)
    folded = fold(q, "row")
    assert folded.granularity == "row"
    assert torch.equal(folded.scale, pow2(target))
    assert same(folded.payload.float(), shifted_by_hand(q.payload, per_element - target[:, None], fmt))
    assert folded.tile_exponent is not None
    assert torch.equal(from_e8m0(folded.tile_exponent), pow2(tile_exponents(q)))
    fused = quantize(values(*shape, seed=1), granularity, fmt, fold="row")
    assert torch.equal(fused.payload.view(torch.uint8), folded.payload.view(torch.uint8))
    assert torch.equal(fused.scale, folded.scale)


@pytest.mark.parametrize("granularity", ["micro", "tile", "block", "row"])
def test_fold_to_a_tensor(granularity: str) -> None:
    q = quantize(values(130, 257, seed=2), granularity)
    folded = fold(q, "tensor")
    assert folded.granularity == "tensor"
    largest = from_e8m0(q.scale).amax() if granularity == "micro" else q.scale.amax()
    assert folded.scale == largest
    if granularity == "row":
        shift = (q.scale / largest).log2()[:, None].expand(q.shape)
        assert same(folded.payload.float(), shifted_by_hand(q.payload, shift, E4M3))


@pytest.mark.parametrize(("granularity", "to"), [("micro", "tile"), ("micro", "block"), ("tile", "block")])
@pytest.mark.parametrize("shape", [(130, 300), (128, 128), (3, 40)], ids=str)
@BOTH
def test_fold_to_tiles_and_blocks(fmt: Format, shape: tuple[int, int], granularity: str, to: str) -> None:
    rows, cols = shape
    q = quantize(values(rows, cols, seed=4), granularity, fmt)
    fine = (q.scale.int() - 127) if granularity == "micro" else q.scale.log2().int()
    per_element = fine.repeat_interleave(32 if granularity == "micro" else 128, dim=1)[:, :cols]
    height, folded = (128 if to == "block" else 1), fold(q, to)
    assert folded.granularity == to and folded.tile_exponent is None
    for i in range(folded.scale.shape[0]):
        for j in range(folded.scale.shape[1]):
            group = (slice(i * height, (i + 1) * height), slice(j * 128, (j + 1) * 128))
            target = per_element[group].max()
            assert folded.scale[i, j] == 2.0 ** int(target)
            expected = shifted_by_hand(q.payload[group], per_element[group] - target, fmt)
            assert same(folded.payload[group].float(), expected)


def test_a_folded_row_has_the_scale_that_quantising_the_row_gives() -> None:
    x = values(64, 400, seed=3)
    for granularity in ("tile", "micro"):
        folded, direct = quantize(x, granularity, fold="row"), quantize(x, "row")
        assert torch.equal(folded.scale, direct.scale)
        assert torch.equal(folded.tile_exponent, direct.tile_exponent)
        differ = folded.payload.view(torch.uint8) != direct.payload.view(torch.uint8)
        assert (folded.payload.float().abs()[differ] <= E4M3.min_normal).all(), "they differ by double rounding in the subnormals only"


@pytest.mark.parametrize("granularity", ["row", "tile", "micro"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@BOTH
def test_fold_transpose_is_the_transpose_of_the_fold_at_that_scale(fmt: Format, shape: tuple[int, int], granularity: str) -> None:
    q = quantize(values(*shape, seed=4), granularity, fmt)
    exponents = tile_exponents(q)
    block = exponents.amax(dim=0).repeat_interleave(128)[: shape[1]]
    per_element = exponents_of(q)
    moved = fold_transpose(q)
    assert moved.shape == (shape[1], shape[0])
    assert moved.payload.is_contiguous()
    assert moved.granularity == "row"
    assert torch.equal(moved.scale, pow2(block))
    assert same(moved.payload.float(), shifted_by_hand(q.payload, per_element - block[None], fmt).t())
    whole = fold_transpose(q, to="tensor")
    assert (whole.scale == pow2(block.amax())).all()
    assert same(whole.payload.float(), shifted_by_hand(q.payload, per_element - block.amax(), fmt).t())


@pytest.mark.parametrize("first", [1.0, 2.0**-60])
def test_zero_rows_and_columns_are_harmless(first: float) -> None:
    """A zero group's scale is the smallest, so it neither wins a maximum nor flushes its neighbours."""
    x = torch.zeros(256, 256, dtype=torch.bfloat16)
    x[3, 5], x[200, 130] = first, first / 16
    for granularity in ("row", "tile", "micro"):
        q = quantize(x, granularity)
        assert torch.equal(dequantize(fold_transpose(q)), x.float().t())
        if granularity != "row":
            assert torch.equal(dequantize(fold(q, "row")), x.float())
    zeros = quantize(torch.zeros_like(x), "tile")
    assert fold(zeros, "row").scale.eq(2.0**-126).all()
    assert not dequantize(fold_transpose(zeros)).any()


def test_folding_up_saturates_where_a_subnormal_had_been_rounded_up() -> None:
    """0.75 * 2**-8 under a row scale of 1 is 1.5 of E4M3's subnormal steps and becomes 2; at the tile's own scale that is 512: it saturates at 448.

    The true value is 384 there.
    """
    x = torch.zeros(1, 256)
    x[0, 0], x[0, 128] = 448.0, 0.75 * 2.0**-8
    q = quantize(x, "row")
    assert q.payload[0, 128].float() == 2.0**-8
    up = fold_transpose(q)
    assert up.payload[128, 0].float() == 448
    assert up.scale[128] == 2.0**-17
    assert abs(dequantize(up)[128, 0] - x[0, 128]) < abs(dequantize(q)[0, 128] - x[0, 128]), "saturation brings it nearer to the truth"


@pytest.mark.parametrize("granularity", ["row", "tile", "micro"])
def test_a_shift_beyond_the_exponent_range_gives_zero_not_garbage(granularity: str) -> None:
    x = torch.tensor([[2.0**-126], [2.0**120]]).expand(2, 32).contiguous()
    moved = dequantize(fold_transpose(quantize(x, granularity)))
    assert moved[:, 0].eq(0).all()
    assert moved[:, 1].eq(2.0**120).all()


def test_folding_twice_is_folding_once_when_nothing_becomes_subnormal() -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(5)).clamp(0.3, 3).bfloat16()
    for granularity in ("micro", "tile"):
        q = quantize(x, granularity)
        assert torch.equal(dequantize(fold(fold(q, "row"), "tensor")), dequantize(q))
        assert torch.equal(dequantize(fold_transpose(fold(q, "row"))), dequantize(q).t())


@pytest.mark.parametrize("granularity", ["row", "tile", "micro"])
@BOTH
def test_each_column_has_the_smallest_scale_that_holds_its_largest_value(fmt: Format, granularity: str) -> None:
    """Nothing saturates, and under half of the scale the column's largest value would; rows of very different size, a column of zeros, one with NaN."""
    x = values(60, 300, seed=8) * torch.exp2(torch.arange(60.0) - 30)[:, None]
    x[:, 17] = 0
    x[3, 18] = torch.nan
    q = quantize(x.bfloat16(), granularity, fmt)
    turned = fold_transpose(q, to="column")
    largest = dequantize(q).nan_to_num(0.0).abs().amax(dim=0)
    assert (largest <= turned.scale * fmt.max).all()
    used = largest > 0
    assert (largest[used] > turned.scale[used] / 2 * fmt.max).all()
    assert (turned.scale[~used] == 2.0**-126).all() and not used[17]
    assert dequantize(turned)[18, 3].isnan()
    assert same(turned.payload.float(), shifted_by_hand(q.payload, exponents_of(q) - turned.scale.log2(), fmt).t())


@pytest.mark.parametrize("to", ["column", "column_block", "tensor"])
def test_under_one_scale_the_transpose_is_only_that(to: str) -> None:
    q = quantize(values(12, 300, seed=7), "tensor")
    turned = fold_transpose(q, to)
    assert torch.equal(turned.payload.view(torch.uint8), q.payload.view(torch.uint8).t())
    assert turned.granularity == "row" and torch.equal(turned.scale, q.scale.expand(300))


def test_refusals() -> None:
    x = values(4, 300, seed=6)
    for granularity in ("row", "tensor", "tile"):
        with pytest.raises(ValueError, match="cannot fold to 'column_block'; expected 'tile', 'block', 'row', 'tensor'"):
            fold(quantize(x, granularity), "column_block")
    for granularity in ("tensor", "block"):
        with pytest.raises(ValueError, match=rf"cannot fold a {granularity} payload to row; its scales are not finer \(those of micro, tile are\)"):
            fold(quantize(x, granularity), "row")
    for granularity in ("row", "block", "tensor"):
        with pytest.raises(ValueError, match=f"cannot fold a {granularity} payload to tile"):
            fold(quantize(x, granularity), "tile")
    with pytest.raises(ValueError, match="a block payload carries no tile exponents"):
        fold_transpose(quantize(x, "block"))
    with pytest.raises(ValueError, match="cannot fold_transpose to 'row'; expected 'column', 'column_block', 'tensor'"):
        fold_transpose(quantize(x, "row"), to="row")
    measured = quantize(x, "micro", global_scale="measured")
    for operation in (lambda: fold(measured, "row"), lambda: fold_transpose(measured), lambda: fold(measured, "tensor")):
        with pytest.raises(ValueError, match="under an FP32 global scale cannot be folded"):
            operation()
    q = quantize(x, "tile")
    q.scale[1, 2] = 0.3
    with pytest.raises(ValueError, match=r"scale 0\.3\d* is not a normal power of two, so its payload cannot be folded"):
        fold(q, "tensor")
    for granularity in ("row", "tensor"):
        same_again = quantize(x, granularity)
        assert fold(same_again, granularity) is same_again
