"""Products against float64 sums of the dequantised operands, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch

from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference import dequantize, fold_transpose, gemm, gemm_exact, quantize
from fp8_recipes.tensor import ScaledTensor

M, N, K = 37, 21, 200
FP32 = 2.0**-20
"""Relative error allowed to an fp32 sum of 200 products, each exact."""


def matrix(rows: int, cols: int, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, cols, generator=gen) * 2 ** (torch.randn(rows, 1, generator=gen) * 4)).bfloat16()


def truth(a: ScaledTensor, b: ScaledTensor) -> torch.Tensor:
    """Product of what the operands stand for, summed in float64; one FP32 rounding in ``dequantize`` at a non-power-of-two global scale."""
    return dequantize(a).double() @ dequantize(b).double().t()


def magnitude(a: ScaledTensor, b: ScaledTensor) -> torch.Tensor:
    return dequantize(a).double().abs() @ dequantize(b).double().abs().t()


@pytest.mark.parametrize(("ga", "gb"), list(itertools.product(("row", "tensor"), repeat=2)))
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_scales_in_the_epilogue(ga: str, gb: str, fmt) -> None:
    a, b = quantize(matrix(M, K, 1), ga, fmt), quantize(matrix(N, K, 2), gb)
    y = gemm(a, b, out_dtype=torch.float32)
    assert y.shape == (M, N)
    assert ((y.double() - truth(a, b)).abs() <= FP32 * magnitude(a, b)).all()
    assert torch.equal(gemm(a, b), y.bfloat16())
    assert torch.equal(gemm(a, b, promote=128), y.bfloat16()), "an fp32 sum has nothing to promote"


@pytest.mark.parametrize("ga", ["micro", "tile", "block", "row", "tensor", "moss"])
def test_exact_product_at_any_granularity(ga: str) -> None:
    x = matrix(M, K, 3)
    a = quantize(x, "micro", global_scale="measured") if ga == "moss" else quantize(x, ga)
    b = quantize(matrix(N, K, 4), "block")
    y = gemm_exact(a, b, out_dtype=torch.float32)
    assert ((y.double() - truth(a, b)).abs() <= FP32 * magnitude(a, b)).all()


def test_folded_and_exact_products_of_the_same_operands_agree() -> None:
    a, b = quantize(matrix(M, K, 5), "micro", fold="row"), quantize(matrix(N, K, 6), "tensor")
    folded, exact = gemm(a, b, out_dtype=torch.float32), gemm_exact(a, b, out_dtype=torch.float32)
    assert ((folded - exact).abs() <= FP32 * magnitude(a, b)).all()


def test_wgrad_of_saved_payloads() -> None:
    """dw [N, K] = dy^T x from two transposed folds: the contraction runs over tokens."""
    x, dy = quantize(matrix(M, K, 7), "micro", fold="row"), quantize(matrix(M, N, 8), "micro", fold="row")
    xt, dyt = fold_transpose(x), fold_transpose(dy)
    dw = gemm(dyt, xt, out_dtype=torch.float32)
    assert dw.shape == (N, K)
    assert ((dw.double() - truth(dyt, xt)).abs() <= FP32 * magnitude(dyt, xt)).all()


@pytest.mark.parametrize("product", [gemm, gemm_exact])
def test_bias_out_and_accumulate(product) -> None:
    a, b = quantize(matrix(M, K, 9), "row"), quantize(matrix(N, K, 10), "row")
    bias = torch.randn(N, generator=torch.Generator().manual_seed(11)).bfloat16()
    y = product(a, b, out_dtype=torch.float32)
    assert torch.equal(product(a, b, out_dtype=torch.float32, bias=bias), y + bias.float())
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((M, N), torch.nan, dtype=dtype)
        result = product(a, b, out=out)
        assert result is out
        assert torch.equal(out, y.to(dtype)), "without accumulate what was there does not matter"
        base = torch.randn(M, N, generator=torch.Generator().manual_seed(12)).to(dtype)
        out = base.clone()
        assert product(a, b, out=out, accumulate=True) is out
        assert torch.equal(out, (base.float() + y).to(dtype)), "the sum is taken in fp32 and rounded once"


def test_nan_stays_in_its_row() -> None:
    x = matrix(M, K, 13)
    x[4, 17] = torch.nan
    y = gemm(quantize(x, "row"), quantize(matrix(N, K, 14), "tensor"))
    assert y[4].isnan().all()
    y[4] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("product", [gemm, gemm_exact])
def test_refusals(product) -> None:
    a, b = quantize(matrix(M, K, 15), "row"), quantize(matrix(N, K, 16), "row")
    with pytest.raises(ValueError, match=r"contraction lengths differ: a is \(37, 200\), b is \(21, 64\); both must be \[rows, K\]"):
        product(a, quantize(matrix(N, 64, 17), "row"))
    with pytest.raises(ValueError, match=r"out must have shape \(37, 21\), got \(21, 37\)"):
        product(a, b, out=torch.zeros(N, M))
    with pytest.raises(ValueError, match=r"out of strides \(1, 37\) is not contiguous"):
        product(a, b, out=torch.zeros(N, M).t())
    with pytest.raises(ValueError, match="accumulate=True adds to `out`; pass the tensor to add to"):
        product(a, b, accumulate=True)
    with pytest.raises(ValueError, match=r"bias must have shape \(21,\), got \(37,\)"):
        product(a, b, bias=torch.zeros(M))


@pytest.mark.parametrize("granularity", ["micro", "tile", "block"])
def test_scales_that_change_along_k_are_refused_by_the_epilogue(granularity: str) -> None:
    fine, row = quantize(matrix(M, K, 18), granularity), quantize(matrix(N, K, 19), "row")
    for name, operands in (("a", (fine, row)), ("b", (row, fine))):
        with pytest.raises(ValueError, match=f"{name} has {granularity} scales, which change along K; fold it first or use gemm_exact"):
            gemm(*operands)
