from __future__ import annotations

import pytest
import torch

from fp8_recipes.formats import E5M2
from fp8_recipes.reference import fold_transpose, quantize
from fp8_recipes.reference.moments import FIELDS, NO_EXPONENT, WIDTH, merge, moments, neutral, token_kurtosis


def named(result: torch.Tensor) -> dict[str, float]:
    return dict(zip(FIELDS, result.tolist(), strict=False))


def test_kurtosis_of_known_distributions() -> None:
    g = torch.Generator().manual_seed(0)
    gaussian = named(moments(torch.randn(64, 4096, generator=g)))
    assert gaussian["kurtosis"] / gaussian["tokens"] == pytest.approx(3.0, abs=0.05)
    spike = torch.zeros(5, 640)
    spike[:, 17] = -0.25
    assert named(moments(spike))["kurtosis"] == pytest.approx(5 * 640.0)
    signs = torch.where(torch.rand(3, 128, generator=g) < 0.5, -2.0, 2.0)
    assert named(moments(signs))["kurtosis"] == pytest.approx(3.0)  # 1 per token, the least there is


def test_token_kurtosis_does_not_see_the_size_of_a_token_and_the_pooled_one_does() -> None:
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    a, b = named(moments(x)), named(moments(x * torch.logspace(-3, 3, 16)[:, None]))
    assert b["kurtosis"] == pytest.approx(a["kurtosis"], rel=1e-5)

    def pooled(m: dict[str, float]) -> float:
        return m["elements"] * m["sum4"] / m["sum2"] ** 2

    assert pooled(a) == pytest.approx(3.0, abs=0.2)
    assert pooled(b) > 10


def test_every_count_on_a_hand_made_row() -> None:
    # amax 448: scale 1. Half of the smallest subnormal is 2^-10: it rounds to even zero, 2^-9 stays.
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([448.0, 2.0**-9, 2.0**-10, 1e-30, float("nan"), float("-inf")])
    m = named(moments(x, quantize(x, "row")))
    assert (m["tokens"], m["elements"], m["nonfinite"], m["nonzero"], m["flushed"], m["saturated"], m["amax"]) == (1, 32, 2, 4, 2, 0, 448.0)
    assert (m["scale_exponent_max"], m["minus_scale_exponent_min"]) == (0, 0)


@pytest.mark.parametrize("per_row", [False, True])
def test_a_given_scale_tells_what_it_would_saturate_and_flush(per_row: bool) -> None:
    x = torch.tensor([[448.0, 448.5, -1000.0, 1.0, 2.0**-10, 2.0**-9]])
    scale = torch.ones(1) if per_row else torch.ones(())
    m = named(moments(x, scale=scale))
    assert (m["saturated"], m["flushed"]) == (2, 1)
    m = named(moments(x, scale=scale, fmt=E5M2))  # up to 57344, down to 2^-16
    assert (m["saturated"], m["flushed"]) == (0, 0)


def test_fold_flushes_are_those_of_fold_transpose() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(200, 300, generator=g) * torch.logspace(-5, 5, 200)[torch.randperm(200, generator=g)][:, None]
    q = quantize(x, "tile", fold="row")
    folded = fold_transpose(q, "column_block").payload.float().t()
    expected = int(((q.payload.float() != 0) & (folded == 0)).sum())
    assert expected > 100
    assert named(moments(x, q))["fold_flushed"] == expected
    assert named(moments(None, q))["fold_flushed"] == expected
    assert named(moments(x, q, fold=False))["fold_flushed"] == 0


def test_without_a_source_zero_payloads_are_an_upper_bound_of_flushes() -> None:
    x = torch.tensor([[448.0, 0.0, 1e-9, 1.0], [0.0, 0.0, 0.0, 0.0]])  # a row of padding tells nothing
    m = named(moments(None, quantize(x, "row")))
    assert (m["nonzero"], m["flushed"]) == (4, 2)
    assert named(moments(x, quantize(x, "row")))["flushed"] == 1


def test_parts_add_up_to_the_whole_for_every_field() -> None:
    x = torch.randn(10, 96, generator=torch.Generator().manual_seed(3))
    x[4] = 0
    whole = moments(x, quantize(x, "row"))
    out = neutral()
    for part in x.split(3):
        returned = moments(part.contiguous(), quantize(part.contiguous(), "row", fold=None), fold=False, out=out)
        assert returned is out
    whole[9] = 0  # the fold's target is that of the part
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(merge(neutral(), whole), whole, rtol=0, atol=0)


def test_row_sums_of_shards_give_the_kurtosis_of_the_whole_token() -> None:
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(4))
    x[:, 5] *= 30
    whole = named(moments(x))
    parts = torch.zeros(2, 6, 2, dtype=torch.float64)
    for shard, sums in zip(x.chunk(2, dim=1), parts, strict=True):
        assert named(moments(shard.contiguous(), row_sums=sums))["tokens"] == 0
    tokens, kurtosis = token_kurtosis(*parts.sum(dim=0).unbind(1), 128)
    assert tokens == 6
    assert float(kurtosis) == pytest.approx(whole["kurtosis"], rel=1e-12)


def test_nothing_but_zeros_stays_neutral() -> None:
    m = named(moments(torch.zeros(4, 32), quantize(torch.zeros(4, 32), "row")))
    assert (m["tokens"], m["kurtosis"], m["nonzero"], m["amax"]) == (0, 0, 0, 0)
    assert m["scale_exponent_max"] == m["minus_scale_exponent_min"] == NO_EXPONENT


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 32)
    for call, match in (
        (lambda: moments(None), "needs x"),
        (lambda: moments(torch.ones(0, 32)), r"empty tensor.*\(0, 32\)"),
        (lambda: moments(torch.ones(2, 64), quantize(x, "row")), r"\(2, 64\).*\(2, 32\)"),
        (lambda: moments(x, quantize(x, "row"), scale=torch.ones(())), "brings its own scales"),
        (lambda: moments(x, scale=torch.ones(3)), r"\(2,\).*\(3,\)"),
        (lambda: moments(x, out=torch.zeros(3)), rf"\[{WIDTH}\]"),
        (lambda: moments(x, row_sums=torch.zeros(2, 3, dtype=torch.float64)), r"\(2, 2\).*\(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
