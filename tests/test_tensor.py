"""ScaledTensor: shapes of scales, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.tensor import ScaledTensor, check_matrix, scale_shape


def payload(rows: int, cols: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.zeros(rows, cols).to(dtype)


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [("tensor", ()), ("row", (130,)), ("tile", (130, 3)), ("block", (2, 3)), ("micro", (130, 9))],
)
def test_scale_shape_counts_ragged_groups(granularity: str, expected: tuple[int, ...]) -> None:
    assert scale_shape(130, 257, granularity) == expected
    q = ScaledTensor(payload(130, 257), torch.ones(expected), granularity)
    assert q.shape == (130, 257)
    with pytest.raises(ValueError, match=rf"{granularity} scale of a \(130, 257\) payload must have shape .*, got \(7, 7\)"):
        ScaledTensor(payload(130, 257), torch.ones(7, 7), granularity)


def test_refuses_unknown_granularity_and_wrong_rank() -> None:
    with pytest.raises(ValueError, match="unknown granularity 'rows'; expected one of .*'row'"):
        ScaledTensor(payload(2, 2), torch.ones(2), "rows")
    with pytest.raises(ValueError, match=r"payload must be 2-D \[rows, cols\], got shape \(4,\)"):
        ScaledTensor(payload(2, 2).flatten(), torch.ones(2), "row")


def test_format_and_device_follow_the_payload() -> None:
    assert ScaledTensor(payload(2, 3), torch.ones(2), "row").format is E4M3
    q = ScaledTensor(payload(2, 3, torch.float8_e5m2), torch.ones(2), "row")
    assert q.format is E5M2
    assert q.device == torch.device("cpu")


def test_nbytes_counts_payload_scales_and_exponents() -> None:
    q = ScaledTensor(payload(256, 512), torch.ones(256), "row", tile_exponent=torch.zeros(256, 4, dtype=torch.uint8))
    assert q.nbytes() == 256 * 512 + 256 * 4 + 256 * 4
    micro = ScaledTensor(payload(2, 64), torch.zeros(2, 2, dtype=torch.uint8), "micro", global_scale=torch.ones(()))
    assert micro.nbytes() == 2 * 64 + 4 + 4


def test_check_matrix_names_the_value_and_the_remedy() -> None:
    check_matrix(torch.zeros(2, 3, dtype=torch.bfloat16), "x")
    with pytest.raises(ValueError, match=r"x must be 2-D \[rows, cols\], got shape \(2, 3, 4\); reshape it to \[tokens, features\]"):
        check_matrix(torch.zeros(2, 3, 4), "x")
    with pytest.raises(ValueError, match=r"x of shape \(3, 2\) and strides \(1, 3\) is not contiguous; call .contiguous\(\)"):
        check_matrix(torch.zeros(2, 3).t(), "x")
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="dy must be bfloat16, float16 or float32, got"):
            check_matrix(torch.zeros(2, 3).to(dtype), "dy")
