"""Quantise at every granularity against an oracle that walks over the groups one by one, in float64, with the table of FP8 values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2, Format, from_e8m0, scale_from_amax
from fp8_recipes.reference.quantize import dequantize, group_amax, quantize, quantize_weight, tile_exponents

GROUP = {"micro": (1, 32), "tile": (1, 128), "block": (128, 128), "row": (1, None), "tensor": (None, None)}
GRANULARITIES = tuple(GROUP)
RAGGED = [(1, 1), (1, 130), (130, 1), (3, 33), (131, 259)]
SMALLEST = 2.0**-126


def random(rows: int, cols: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """bf16 with magnitudes over several binades, some zeros."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=gen) * 2 ** (torch.randn(rows, cols, generator=gen) * spread)
    return x.masked_fill(torch.rand(rows, cols, generator=gen) < 0.05, 0).bfloat16()


def nearest(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Nearest finite FP8 value of float64 x, ties to the even code, saturating."""
    table = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).double()
    table = table[torch.isfinite(table)]
    above = torch.searchsorted(table, x.abs()).clamp(1, len(table) - 1)
    up, down = table[above] - x.abs(), x.abs() - table[above - 1]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return torch.copysign(table[code], x)


def smallest_scale(amax: float, fmt: Format) -> float:
    scale = SMALLEST
    while amax > fmt.max * scale:
        scale *= 2
    return scale


def oracle(x: torch.Tensor, granularity: str, fmt: Format) -> tuple[torch.Tensor, dict[tuple[int, int], float]]:
    """Dequantised values (float64) and the scale of every group, keyed by its first element."""
    rows, cols = x.shape
    height, width = GROUP[granularity]
    height, width = height or rows, width or cols
    result, scales = torch.zeros(rows, cols, dtype=torch.float64), {}
    for i, j in itertools.product(range(0, rows, height), range(0, cols, width)):
        group = x[i : i + height, j : j + width].double()
        scale = smallest_scale(group.abs().max().item(), fmt)
        scales[i, j] = scale
        result[i : i + height, j : j + width] = nearest(group / scale, fmt) * scale
    return result, scales


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_values_and_scales(granularity: str, shape: tuple[int, int], fmt: Format) -> None:
    x = random(*shape, seed=sum(shape))
    q = quantize(x, granularity, fmt)
    values, scales = oracle(x, granularity, fmt)
    assert torch.equal(dequantize(q).double(), values)
    stored = from_e8m0(q.scale) if granularity == "micro" else q.scale
    assert stored.flatten().tolist() == list(scales.values())
    assert q.format is fmt
    assert q.global_scale is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantising_what_was_dequantised_changes_nothing(granularity: str) -> None:
    q = quantize(random(131, 259, seed=1), granularity)
    again = quantize(dequantize(q, torch.bfloat16), granularity)
    assert torch.equal(dequantize(again), dequantize(q))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dequantised_values_are_exact_in_bfloat16(granularity: str) -> None:
    q = quantize(random(5, 300, seed=2, spread=20), granularity)
    assert torch.equal(dequantize(q, torch.bfloat16).double(), dequantize(q).double())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_half_the_scale_would_overflow(granularity: str) -> None:
    x = random(131, 259, seed=3)
    amax = group_amax(x, granularity)
    q = quantize(x, granularity)
    scale = from_e8m0(q.scale) if granularity == "micro" else q.scale
    assert (amax <= 448 * scale).all()
    assert (amax > 448 * scale / 2).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zero_groups_take_the_smallest_scale(granularity: str) -> None:
    x = random(256, 256, seed=4)
    x[:128] = 0
    q = quantize(x, granularity)
    scale = from_e8m0(q.scale) if granularity == "micro" else q.scale
    assert not dequantize(q)[:128].any()
    if granularity != "tensor":
        zero, rest = scale.chunk(2)
        assert (zero == SMALLEST).all()
        assert (rest > 2.0**-30).all()


def test_a_zero_tensor_is_zero_under_every_form() -> None:
    for granularity in GRANULARITIES:
        assert not dequantize(quantize(torch.zeros(3, 40), granularity)).any()
    assert not dequantize(quantize(torch.zeros(3, 40), "micro", global_scale="measured")).any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bfloat16_subnormals_keep_what_the_smallest_scale_allows(granularity: str) -> None:
    unit = 2.0**-133  # smallest bf16 subnormal; under 2**-126 it is 2**-7, four times E4M3's smallest subnormal
    x = (torch.arange(-16, 16) * unit).bfloat16()[None]
    assert torch.equal(dequantize(quantize(x, granularity)), x.float()), "up to 16 units every bf16 subnormal is an E4M3 number"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_non_finite_is_visible_and_alone(granularity: str, bad: float) -> None:
    x = random(5, 160, seed=5)
    x[2, 40] = 0
    clean = dequantize(quantize(x, granularity))
    x[2, 40] = bad
    got = dequantize(quantize(x, granularity))
    assert got[2, 40].isnan()
    got[2, 40] = 0
    assert torch.equal(got, clean)


@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_row_results_carry_the_exponent_of_each_tile(shape: tuple[int, int]) -> None:
    x = random(*shape, seed=6)
    expected = quantize(x, "tile").scale
    q = quantize(x, "row")
    assert q.tile_exponent is not None
    assert torch.equal(from_e8m0(q.tile_exponent), expected)
    assert torch.equal(tile_exponents(q), tile_exponents(quantize(x, "tile")))
    assert torch.equal(tile_exponents(q), tile_exponents(quantize(x, "micro"))), "the largest micro scale of a tile is the tile's"


# --- MOSS's two-level form -------------------------------------------------------------------------------------------------------------


def moss_scales(x: torch.Tensor) -> tuple[float, list[list[int]]]:
    """s = max_i s_i and the exponents of ss_i = 2**ceil(log2(s_i / s)), from the definition (448 cancels in s_i / s); a zero group has none (-126)."""
    groups = [[g.double().abs().max().item() for g in row.split(32)] for row in x]
    largest = max(max(row) for row in groups)
    return largest / 448, [[math.ceil(math.log2(g / largest)) if g else -126 for g in row] for row in groups]


def test_measured_micro_is_moss_as_defined() -> None:
    x = random(40, 100, seed=7)
    q = quantize(x, "micro", global_scale="measured")
    s, exponents = moss_scales(x)
    assert q.global_scale is not None
    assert q.global_scale.item() == pytest.approx(s, rel=2**-22)
    assert (q.scale.int() - 127).tolist() == exponents
    scale = from_e8m0(q.scale).repeat_interleave(32, dim=1)[:, :100].double() * q.global_scale.double()
    assert torch.equal(dequantize(q).double(), (nearest(x.double() / scale, E4M3) * scale).float().double())


def test_measured_local_scales_never_exceed_one() -> None:
    """Every bf16 mantissa as the tensor's maximum: fp32 division alone gives a local scale of 2 for one in twelve."""
    for mantissa in range(128):
        amax = 1 + mantissa / 128
        x = torch.tensor([[amax] * 32 + [amax / 4] * 32 + [amax / 3] * 32])
        q = quantize(x, "micro", global_scale="measured")
        assert q.scale[0].tolist()[:2] == [127, 125]
        assert q.scale.max() == 127
        assert q.payload[0, 0].float() == 448


def test_a_given_global_scale_moves_the_grid_only() -> None:
    x = random(9, 96, seed=8)
    for scale in (1.0, 0.5, 2.0**20):
        q = quantize(x, "micro", global_scale=torch.tensor(scale))
        assert torch.equal(dequantize(q), dequantize(quantize(x, "micro"))), "a power of two changes nothing but the bytes of the scales"
    q = quantize(x, "micro", global_scale=torch.tensor(0.3))
    error = (dequantize(q) - x.float()).abs()
    normal = dequantize(q).abs() > 0
    assert (error[normal] / x.float().abs()[normal]).median() < 2**-4


# --- weights ---------------------------------------------------------------------------------------------------------------------------


def test_weight_under_a_given_maximum() -> None:
    w = random(24, 40, seed=9)
    amax = w.float().abs().max()
    q = quantize_weight(w, amax)
    assert torch.equal(q.payload.float(), quantize(w, "tensor").payload.float())
    assert q.scale == scale_from_amax(amax)
    transposed = quantize_weight(w, amax, transpose=True)
    assert transposed.payload.is_contiguous()
    assert torch.equal(transposed.payload.float(), q.payload.float().t())


def test_weight_increment_raises_the_scale_and_a_low_maximum_saturates() -> None:
    w = torch.tensor([[448.0, -447.0, 1.0]])
    assert quantize_weight(w, torch.tensor(448.0)).scale == 1
    assert quantize_weight(w, torch.tensor(448.0), 0.5).scale == 2
    assert quantize_weight(w, torch.tensor(448.0), 448.5).scale == 4
    clipped = quantize_weight(w, torch.tensor(100.0))
    assert clipped.scale == 0.25
    assert dequantize(clipped).tolist() == [[112.0, -112.0, 1.0]]


# --- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_is_refused(granularity: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"cannot take scales of an empty tensor of shape \({shape[0]}, {shape[1]}\)"):
        quantize(torch.zeros(shape), granularity)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"granularity": "column"}, "cannot quantise at granularity 'column'; expected row, tile, micro, block or tensor"),
        ({"granularity": "tile", "fold": "tensor"}, "fold must be None or 'row', got 'tensor'"),
        ({"granularity": "row", "fold": "row"}, "fold='row' applies to tile and micro granularity, not 'row'"),
        ({"granularity": "tile", "global_scale": "measured"}, "global_scale belongs to micro granularity, not 'tile'"),
        ({"granularity": "micro", "global_scale": "delayed"}, "global_scale must be None, 'measured' or a 0-dim fp32 tensor, got 'delayed'"),
        ({"granularity": "micro", "global_scale": torch.ones(2)}, r"global_scale must be 0-dim .* got shape \(2,\)"),
        ({"granularity": "micro", "fold": "row", "global_scale": "measured"}, "fold='row' needs power-of-two scales: leave global_scale at None"),
    ],
)
def test_contradicting_options_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(4, 64), **kwargs)


def test_tile_exponents_need_fine_power_of_two_scales() -> None:
    x = random(4, 64)
    with pytest.raises(ValueError, match="a tensor payload carries no tile exponents"):
        tile_exponents(quantize(x, "tensor"))
    with pytest.raises(ValueError, match="under an FP32 global scale cannot be folded; quantise with global_scale=None"):
        tile_exponents(quantize(x, "micro", global_scale="measured"))


def test_reference_exports_every_operation() -> None:
    assert {"quantize", "quantize_weight", "fold", "fold_transpose", "gemm", "gemm_exact"} <= set(reference.__all__)
