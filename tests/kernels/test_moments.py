from __future__ import annotations

from importlib import import_module

import pytest
import torch

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.kernels import moments
from fp8_recipes.kernels.moments import BLOCK
from fp8_recipes.reference.moments import FIELDS, WIDTH, neutral
from fp8_recipes.tensor import ScaledTensor


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Counts and maxima are equal, sums agree to fp32 accuracy within a row."""
    assert actual.dtype == torch.float64 and tuple(actual.shape) == (WIDTH,)
    for name, a, b in zip(FIELDS, actual.tolist(), expected.tolist(), strict=False):
        tolerance = 1e-5 if name in ("kurtosis", "sum2", "sum4") else 0
        assert a == pytest.approx(b, rel=tolerance, abs=0), name


def data(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Heavy tails, rows from 1e-20 to 1e12 with values far below their row, a row of zeros, NaN and Inf."""
    g = torch.Generator().manual_seed(rows * cols)
    x = torch.randn(rows, cols, generator=g) * torch.randn(rows, cols, generator=g).exp()
    top = 4 if dtype == torch.float16 else 12
    x *= torch.logspace(-top if dtype == torch.float16 else -20, top - 1, rows)[:, None]
    x[:, 5::7] *= 1e-12
    x = x.to(dtype)
    if rows > 2:
        x[1] = 0
        x[2, 0], x[2, cols // 2] = float("nan"), float("-inf")
    return x.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (5, 1000), (3, 2 * BLOCK + 48)])
def test_moments_of_a_tensor(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
    x = data(rows, cols, dtype, device)
    check(moments(x), reference.moments(x))


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("per_row", [False, True])
def test_under_a_given_scale(per_row: bool, fmt, device: torch.device) -> None:
    x = data(6, 256, torch.bfloat16, device)
    scale = torch.logspace(-27, 5, 6).to(device) if per_row else torch.tensor(2.0**-3, device=device)
    expected = reference.moments(x, scale=scale, fmt=fmt)
    assert expected[7] > 0 and expected[8] > 0
    check(moments(x, scale=scale, fmt=fmt), expected)


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("tile", "row"), ("tensor", None), ("tile", None), ("block", None), ("micro", None)])
@pytest.mark.parametrize("source", [True, False])
def test_beside_or_from_a_payload(source: bool, granularity: str, fold: str | None, fmt, device: torch.device) -> None:
    x = data(9, 400, torch.bfloat16, device)
    q = reference.quantize(x, granularity, fmt, fold=fold)
    given = x if source else None
    expected = reference.moments(given, q)
    assert expected[7] > 0
    if fold:
        assert expected[9] > 0
    check(moments(given, q), expected)


def test_more_rows_than_programs_and_accumulation_repeat_bit_for_bit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("fp8_recipes.kernels.moments"), "PROGRAMS", 70)  # the last step adds 64 at a time
    x = torch.randn(150, 32, generator=torch.Generator().manual_seed(5)).to(device)
    first, second = neutral(device=device), neutral(device=device)
    for out in (first, second):
        assert moments(x, out=out) is out
        moments(x * 2, out=out)
    assert torch.equal(first, second)
    check(first, reference.moments(x * 2, out=reference.moments(x)))


def test_row_sums(device: torch.device) -> None:
    x = data(5, 160, torch.bfloat16, device)
    actual, expected = (torch.zeros(5, 2, dtype=torch.float64, device=device) for _ in range(2))
    check(moments(x, row_sums=actual), reference.moments(x, row_sums=expected))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_bad_arguments_raise_before_a_launch(device: torch.device) -> None:
    with pytest.raises(ValueError, match="needs x"):
        moments(None)
    with pytest.raises(TypeError, match="int32"):
        moments(torch.ones(2, 2, dtype=torch.int32, device=device))
    q = reference.quantize(torch.ones(2, 64, device=device), "row")
    with pytest.raises(ValueError, match="not contiguous"):
        moments(None, ScaledTensor(q.payload[:, ::2], q.scale, "row"))
