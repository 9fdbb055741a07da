from __future__ import annotations

import pytest
import torch

from fp8_recipes.formats import E4M3
from fp8_recipes.monitor import Counts, Monitor, as_percent, count, describe_range, total
from fp8_recipes.reference import quantize, quantize_weight


def test_every_number_on_a_hand_made_row() -> None:
    # scale of the row: 448 -> 2^0. Half of the smallest subnormal is 2^-10: 2^-10 rounds to even zero, 2^-9 stays.
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([448.0, 2.0**-9, 2.0**-10, 1e-30, float("nan"), float("inf")])
    m = Monitor()
    m.add("x", x, quantize(x, "row"))
    assert m.read()["x"] == Counts(elements=32, nonzero=4, flushes=2, saturations=0, nonfinite=2, scale_exponent_min=0, scale_exponent_max=0)


def test_saturation_is_what_the_given_scale_cannot_hold() -> None:
    w = torch.tensor([[448.0, 448.5, -1000.0, 1.0]])
    q = quantize_weight(w, torch.tensor(448.0), 0.0, E4M3)
    m = Monitor()
    m.add("w", w, q)
    counts = m.read()["w"]
    assert (counts.saturations, counts.flushes) == (2, 0)
    assert counts.saturation_share == 0.5


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile", "block", "micro"])
def test_measured_scales_never_saturate_and_report_their_range(granularity: str) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(130, 160, generator=g) * torch.logspace(-6, 6, 130)[:, None]
    q = quantize(x, granularity)
    row = count(x, q).tolist()
    assert row[3] == 0
    dead = q.payload.float() == 0
    assert row[2] == int((dead & (x != 0)).sum())
    if granularity == "row":  # no group is all zeros, so the range is that of the scales themselves
        exponents = torch.log2(q.scale)
        assert row[5:] == [int(exponents.min()), int(exponents.max())]


def test_global_scale_enters_range_and_saturation() -> None:
    x = torch.full((1, 32), 3.0e4)
    q = quantize(x, "micro", global_scale="measured")
    row = count(x, q).tolist()
    assert row[3] == 0
    assert row[5] == row[6] == 6  # 3e4 / 448 = 66.96 = 2^6 * 1.05, local exponent 0


def test_zero_groups_stay_out_of_the_range() -> None:
    x = torch.zeros(4, 32)
    m = Monitor()
    m.add("x", x, quantize(x, "row"))
    counts = m.read()["x"]
    assert (counts.nonzero, counts.flush_share, counts.scale_exponent_min) == (0, 0.0, None)
    assert describe_range(counts) == "-"
    x[2] = 448.0
    m.add("x", x, quantize(x, "row"))
    assert describe_range(m.read()["x"]) == "2^0 .. 2^0"


def test_accumulates_by_name_totals_and_resets() -> None:
    m = Monitor()
    small, large = torch.full((2, 32), 2.0**-20), torch.full((3, 32), 2.0**20)
    for _ in range(2):
        m.add("small", small, quantize(small, "row"))
    m.add("large", large, quantize(large, "row"))
    m.add("large", torch.zeros(0, 32), quantize(small, "row"))  # no tokens: nothing to count
    counts = m.read()
    assert counts["small"].elements == 128
    assert counts["large"].elements == 96
    both = total(counts)
    assert (both.elements, both.nonzero) == (224, 224)
    assert (both.scale_exponent_min, both.scale_exponent_max) == (-28, 12)  # 2^(20 - 8) * 2^8, and so on
    m.reset()
    assert m.read() == {}


def test_shape_mismatch_names_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 64\).*\(2, 32\)"):
        count(torch.ones(2, 64), quantize(torch.ones(2, 32), "row"))


@pytest.mark.parametrize(("share", "text"), [(0.0, "0"), (0.5, "50.0 %"), (0.0012345, "0.123 %"), (0.00000045678, "0.0000457 %")])
def test_as_percent(share: float, text: str) -> None:
    assert as_percent(share) == text
