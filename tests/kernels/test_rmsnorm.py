"""rmsnorm_quantize: the reference, bit for bit given rstd; rstd up to the order of a sum."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from assertions import assert_quantized
from machine_code import has_compiler, listings, spills, wide_loads

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.kernels import rmsnorm_quantize

module = import_module("fp8_recipes.kernels.rmsnorm")
MODES = [("row", None), ("tile", None), ("micro", None), ("micro", "row"), ("tile", "row"), ("tensor", None), ("block", None)]
SHAPES = [(2, 128), (3, 700), (2, 1024), (3, 2304)]  # pieces for "micro" and "row": 1, 2 (the second in part), 2, and 5 (in part) and 3


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
    y = reference.quantize(x.float() * rstd[:, None] * gamma.float(), granularity, fmt, fold=fold)
    for name in ("payload", "scale", "tile_exponent"):
        ours, theirs = getattr(q, name), getattr(y, name)
        assert (ours is None) == (theirs is None)
        assert theirs is None or torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm(device, shape, granularity, fold, fmt):
    check(*inputs(*shape, device), granularity, fold, fmt)


@pytest.mark.parametrize(("cols", "granularity", "fold"), [(11008, "micro", "row"), (14336, "tile", None), (4096, "micro", None), (5120, "row", None)])
def test_widths_of_models(device, cols, granularity, fold):
    check(*inputs(2, cols, device), granularity, fold, FORMATS["e4m3"])


@pytest.mark.parametrize("granularity", ["row", "tile", "micro"])
def test_pieces_cover_a_row_once(granularity):
    for cols in (1, 31, 128, 700, 1408, 2048, 4096, 4100, 7168, 11008, 14336, 28672, module.MAX_ROW):
        o = module.row_options(cols, granularity)
        width = o["BLOCK"] * 128
        assert (o["PIECES"] - 1) * width < cols <= o["PIECES"] * width
        assert o["WHOLE"] == (o["PIECES"] * width == cols)
        assert 1 <= o["num_warps"] <= 16 and width <= 16 * 32 * o["num_warps"]
        assert o.get("maxnreg", 64) * o["num_warps"] * 32 <= 65536


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


COMPILE = """
from fp8_recipes.kernels.rmsnorm import _rmsnorm_quantize_kernel, row_options
from machine_code import show
types = dict(scale_ptr="*fp32", rstd_ptr="*fp32", payload_ptr="*u8", tile_exponent_ptr="*u8", x_ptr="*bf16", gamma_ptr="*bf16", eps="fp32")
for cols in (4096, 11008, 14336):
    for local in ("micro", "row"):
        options = dict(row_options(cols, local))
        launch = {k: options.pop(k) for k in ("num_warps", "maxnreg") if k in options}
        constants = dict(options, LOCAL=local, FOLD=local == "micro", E5M2=False)
        show(_rmsnorm_quantize_kernel, types, constants, launch, cols=cols, local=local, warps=launch["num_warps"], pieces=options["PIECES"])
"""


@pytest.mark.slow
@has_compiler
def test_machine_code_keeps_rows_in_flight():
    """Compiled for sm_90, which needs no GPU: every load of a row before the first wait, no spills, and rows enough on a multiprocessor to fill the memory."""
    found = listings(COMPILE)
    assert len(found) == 6
    for kernel, lines in found:
        cols, warps, pieces, registers = (kernel[key] for key in ("cols", "warps", "pieces", "registers"))
        waits = [i for i, line in enumerate(lines) if "SHFL" in line or "BAR.SYNC" in line]
        loads = wide_loads(lines)
        assert len(loads) == 4 * pieces, f"{kernel}: x and gamma, 32 bytes of each piece per thread"
        assert len([i for i in loads if i < waits[0]]) >= 2 * pieces, f"{kernel}: x is not in flight as a whole when the sum starts"
        assert not spills(lines), kernel
        assert len([i for i in waits if "BAR.SYNC" in lines[i]]) <= 7, f"{kernel}: a reduction per piece"
        rows = min(65536 // (-(-registers // 8) * 256 * warps), 64 // warps)
        assert rows * 2 * cols >= (80 << 10), f"{kernel}: {rows} rows on a multiprocessor"
