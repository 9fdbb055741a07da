"""rmsnorm_add and its backward: reference and kernel against float64; the gain's gradient in one order; bad rows; widths; mixed dtypes."""

from __future__ import annotations

import itertools
from functools import partial
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise, assert_nearly_bitwise
from machine_code import has_compiler, listings, spills, wide_loads, wide_stores

from fp8_recipes import kernels, reference

module = import_module("fp8_recipes.kernels.rmsnorm_add")
EPS = 1e-5
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(5, 128), (37, 96), (3, 1500), (70, 8), (1, 1), (4, 2304), (9, 2050), (2, 7168)]
"""The last: seven whole pieces; before it: one masked piece, six with a last one of 220, two warps of five with one of 256 and of 2."""
DTYPES = [(BF16, BF16, BF16), (FP32, FP32, FP32), (BF16, FP32, BF16), (BF16, BF16, FP32), (torch.float16, torch.float16, FP32)]
"""Of x, residual (y and dy) and gain."""
STEP = {BF16: 2.0**-8, torch.float16: 2.0**-11, FP32: 4e-7}
"""Half of the distance to the next number, relative."""


def inputs(rows: int, cols: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES[0]) -> tuple[torch.Tensor, ...]:
    """(dy, x, residual, gain): rows of different size, one nearly lost in eps, one all zero."""
    normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(rows * cols), device=device)
    x = normal(rows, cols) * torch.exp(normal(rows, 1))
    x[rows // 2] *= 1e-3
    x[rows // 3] = 0
    of_x, of_residual, of_gain = dtypes
    return normal(rows, cols).to(of_residual), x.to(of_x), normal(rows, cols).to(of_residual), (0.25 + normal(cols) / 8).to(of_gain)


def truth(dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y, rstd, dx, dgain) by autograd in fp64."""
    x64, gain64 = x.double().requires_grad_(), gain.double().requires_grad_()
    rstd = (x64.square().mean(dim=1) + EPS).rsqrt()
    y = residual.double() + x64 * rstd[:, None] * gain64
    return y.detach(), rstd.detach(), *torch.autograd.grad(y, (x64, gain64), dy.double())


def check(backend, dy, x, residual, gain):
    y, rstd, dx, dgain = truth(dy, x, residual, gain)
    got, got_rstd = backend.rmsnorm_add(x, residual, gain, EPS)
    assert got.dtype == residual.dtype and got_rstd.dtype == FP32 and got_rstd.shape == x.shape[:1]
    torch.testing.assert_close(got_rstd.double(), rstd, rtol=1e-6, atol=0)
    n = x.double() * rstd[:, None]
    largest = residual.double().abs() + (n * gain.double()).abs()
    assert ((got.double() - y).abs() <= STEP[residual.dtype] * y.abs() + 1e-6 * largest + 1e-30).all(), "rounded once"
    got_dx, got_dgain = backend.rmsnorm_add_backward(dy, x, gain, got_rstd)
    assert got_dx.dtype == x.dtype and got_dgain.dtype == gain.dtype and got_dgain.shape == gain.shape
    g = dy.double() * gain.double()
    largest = rstd[:, None] * (g.abs() + n.abs() * (g * n).abs().mean(dim=1, keepdim=True))
    assert ((got_dx.double() - dx).abs() <= STEP[x.dtype] * dx.abs() + 2e-6 * largest + 1e-30).all()
    assert ((got_dgain.double() - dgain).abs() <= STEP[gain.dtype] * dgain.abs() + 2e-6 * (dy.double() * n).abs().sum(dim=0) + 1e-30).all()
    assert_bitwise(backend.rmsnorm_add_backward(dy, x, gain, got_rstd)[1], got_dgain, "dgain, twice")


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(device, shape, backend):
    check(backend, *inputs(*shape, device))


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_every_tensor_has_its_own_dtype(device, dtypes, backend):
    check(backend, *inputs(11, 1500, device, dtypes))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference_in_bf16(device, shape):
    dy, x, residual, gain = inputs(*shape, device)
    (y, rstd), (expected, _) = (m.rmsnorm_add(x, residual, gain, EPS) for m in (kernels, reference))
    assert_nearly_bitwise(y, expected, 1e-3)
    (dx, dgain), (expected_dx, expected_dgain) = (m.rmsnorm_add_backward(dy, x, gain, rstd) for m in (kernels, reference))
    assert_nearly_bitwise(dx, expected_dx, 1e-3)
    assert_nearly_bitwise(dgain, expected_dgain, 0.01)


@pytest.mark.parametrize("programs", [1, 3, 8])
def test_rows_taken_in_turn(device, monkeypatch, programs):
    """Several rows a program, the last round not full."""
    monkeypatch.setattr(module, "backward_plan", lambda rows, cols, nbytes: (programs, module.row_options(cols)))
    check(kernels, *inputs(11, 640, device))


def test_plans():
    for rows, cols in itertools.product(
        (1, 100, 2048, 8192, 65536), (1, 31, 512, 1024, 2048, 2560, 4096, 4100, 5120, 6144, 7168, 8192, 12288, 16384, 20480, 32768)
    ):
        for nbytes in (4, 6, 8):
            programs, o = module.backward_plan(rows, cols, nbytes)
            assert (o["PIECES"] - 1) * o["WIDTH"] < cols <= o["PIECES"] * o["WIDTH"] and o["WHOLE"] == (o["PIECES"] * o["WIDTH"] == cols)
            threads = 32 * o["num_warps"]
            assert o["WIDTH"] <= 8 * threads and o["maxnreg"] <= 255 and o["maxnreg"] * threads <= 65536
            assert 1 <= programs <= min(rows, 132 * 32) and programs * o["maxnreg"] * threads <= 132 * 65536, "all at once"


def test_bad_rows_and_no_rows(device):
    """NaN stays in its row and reaches the gain's gradient; a zero row is its residual."""
    dy, x, residual, gain = inputs(6, 300, device)
    x[1, 7], x[4, 2] = float("nan"), float("inf")
    for backend in (reference, kernels):
        y, rstd = backend.rmsnorm_add(x, residual, gain, EPS)
        assert y[1].isnan().all() and y[4].isnan().sum() == 1 and y[[0, 2, 3, 5]].isfinite().all()
        assert_bitwise(y[2], residual[2])  # zero
        dx, dgain = backend.rmsnorm_add_backward(dy, x, gain, rstd)
        assert dx[1].isnan().all() and dx[[0, 2, 3, 5]].isfinite().all() and dgain.isnan().all()
        empty = x[:0], residual[:0]
        y, rstd = backend.rmsnorm_add(*empty, gain, EPS)
        assert y.shape == (0, 300) and rstd.shape == (0,)
        dx, dgain = backend.rmsnorm_add_backward(dy[:0], x[:0], gain, rstd)
        assert dx.shape == (0, 300) and (dgain == 0).all()


def test_bad_input(device, monkeypatch):
    dy, x, residual, gain = inputs(4, 64, device)
    rstd = torch.ones(4, device=device)
    for backend in (reference, kernels):
        with pytest.raises(ValueError, match=r"residual must have the shape of x, \(4, 64\), got \(2, 64\)"):
            backend.rmsnorm_add(x, residual[:2], gain)
        with pytest.raises(ValueError, match=r"gain must be .* of shape \(64,\).* got torch.bfloat16 \(63,\)"):
            backend.rmsnorm_add(x, residual, gain[1:])
        with pytest.raises(ValueError, match="gain must be floating"):
            backend.rmsnorm_add(x, residual, gain.int())
        with pytest.raises(ValueError, match="x of shape .* is not contiguous"):
            backend.rmsnorm_add(x.t(), residual.t(), gain[:4])
        with pytest.raises(TypeError, match="residual must be bfloat16, float16 or float32, got torch.float64"):
            backend.rmsnorm_add(x, residual.double(), gain)
        with pytest.raises(ValueError, match=r"dy must have the shape of x"):
            backend.rmsnorm_add_backward(dy[:2], x, gain, rstd)
        with pytest.raises(ValueError, match=r"rstd must be fp32 \[4\]"):
            backend.rmsnorm_add_backward(dy, x, gain, rstd[:3])
    monkeypatch.setattr(module, "MAX_ROW", 32)
    with pytest.raises(ValueError, match="64 columns; the kernels hold a row of at most 32"):
        kernels.rmsnorm_add(x, residual, gain)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (8192, 5120), (8192, 7168), (16384, 2048), (1000, 12288), (8191, 4100), (64, 32768)], ids=str)
def test_real_sizes(device, shape):
    for dtypes in DTYPES[:3]:
        check(kernels, *inputs(*shape, device, dtypes))
    test_kernel_is_the_reference_in_bf16(device, shape)


COMPILE = """
from fp8_recipes.kernels.rmsnorm_add import _rmsnorm_add_backward_kernel, _rmsnorm_add_kernel, backward_plan, row_options
from machine_code import show
types = dict(rstd_ptr="*fp32", partial_ptr="*fp32", rows="i32", cols="i32", eps="fp32")
for cols in (2048, 4096, 5120, 6144, 7168, 8192, 16384):
    for kernel, constants in ((_rmsnorm_add_kernel, row_options(cols)), (_rmsnorm_add_backward_kernel, backward_plan(8192, cols)[1])):
        options = {k: v for k, v in constants.items() if k in ("num_warps", "maxnreg")}
        constants = {k: v for k, v in constants.items() if k not in options}
        show(kernel, types, constants, options, "*bf16", name=kernel.__name__, cols=cols, warps=options["num_warps"], pieces=constants["PIECES"])
"""


@pytest.mark.slow
@has_compiler
def test_machine_code_keeps_rows_in_flight():
    """Compiled for sm_90, which needs no GPU: every load of a row before the sum waits, no spills, and rows enough on a multiprocessor to fill the memory."""
    found = listings(COMPILE)
    assert len(found) == 14
    for kernel, lines in found:
        cols, warps, pieces, registers = (kernel[key] for key in ("cols", "warps", "pieces", "registers"))
        wait = next(i for i, line in enumerate(lines) if "BAR.SYNC" in line or "STG" in line)
        loads = wide_loads(lines)
        assert len([i for i in loads if i < wait]) >= 2 * pieces, f"{kernel}: a row is not in flight as a whole when the sum starts"
        assert not spills(lines), kernel
        assert wide_stores(lines) >= pieces, f"{kernel}: narrow stores"
        rows = min(65536 // (-(-registers // 8) * 256 * warps), 64 // warps, 32)
        assert rows * 4 * cols >= (56 << 10), f"{kernel}: {rows} rows on a multiprocessor"
