"""rmsnorm_quantize: the reference, up to the order of a sum."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from assertions import assert_quantized

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.kernels import rmsnorm_quantize

module = import_module("fp8_recipes.kernels.rmsnorm")
MODES = [("row", None), ("tile", None), ("micro", None), ("micro", "row"), ("tile", "row"), ("tensor", None), ("block", None)]
SHAPES = [(2, 128), (3, 700), (3, 1664)]


def inputs(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(rows * cols)
    x = torch.randn(rows, cols, generator=gen) * torch.exp(torch.randn(rows, 1, generator=gen) * 2)
    gamma = 1 + torch.randn(cols, generator=gen) / 4
    return x.bfloat16().to(device), gamma.bfloat16().to(device)


def check(x, gamma, granularity, fold, fmt):
    eps = 1e-5
    q, rstd = rmsnorm_quantize(x, gamma, eps, granularity, fmt, fold=fold)
    expected, expected_rstd = reference.rmsnorm_quantize(x, gamma, eps, granularity, fmt, fold=fold)
    truth_rstd = (x.double().square().mean(dim=1) + eps).rsqrt()
    truth = x.double() * truth_rstd[:, None] * gamma.double()
    assert torch.allclose(rstd.double(), truth_rstd, rtol=1e-6, atol=0)
    assert rstd.dtype == expected_rstd.dtype and rstd.shape == expected_rstd.shape
    assert_quantized(q, expected, truth)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm(device, shape, granularity, fold, fmt):
    check(*inputs(*shape, device), granularity, fold, fmt)


def test_fp32_gamma_and_rows_too_wide(device, monkeypatch):
    x, gamma = inputs(3, 900, device)
    check(x, gamma.float(), "row", None, FORMATS["e4m3"])
    monkeypatch.setattr(module, "MAX_ROW", 256)
    check(x, gamma, "micro", "row", FORMATS["e4m3"])


def test_a_bad_row_stays_alone(device):
    """NaN spoils its row (the norm sees it), no other; a zero row stays zero."""
    x, gamma = inputs(4, 256, device)
    x[1, 7], x[2] = float("nan"), 0.0
    q, rstd = rmsnorm_quantize(x, gamma, 1e-5, "micro", fold="row")
    y = reference.dequantize(q)
    assert y[1].isnan().all() and rstd[1].isnan()
    assert (y[2] == 0).all() and q.scale[2].item() == 2.0**-126
    assert y[[0, 3]].isfinite().all()


def test_bad_input(device):
    x, gamma = inputs(4, 128, device)
    with pytest.raises(ValueError, match="gamma"):
        rmsnorm_quantize(x, gamma[:-1])
    with pytest.raises(ValueError, match="empty"):
        rmsnorm_quantize(x[:0], gamma)
    with pytest.raises(ValueError, match="contiguous"):
        rmsnorm_quantize(x[:, :64], gamma[:64])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4096, 5120), (2048, 7168), (512, 11008)], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES[:4])
def test_real_sizes(device, shape, granularity, fold):
    for fmt in FORMATS.values():
        check(*inputs(*shape, device), granularity, fold, fmt)
