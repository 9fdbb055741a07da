"""tanh_bound and its backward: reference and kernel against float64, from strided rows; alpha's gradient in one order."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, assert_nearly_bitwise

from fp8_recipes import kernels, reference

SHAPES = [(5, 128), (37, 96), (3, 1500), (300, 8), (1, 1)]


def inputs(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dy, x, alpha): values of all sizes, saturated and tiny ones among them."""
    gen = torch.Generator().manual_seed(rows + cols)
    x = torch.randn(rows, cols, generator=gen) * torch.exp(2 * torch.randn(rows, cols, generator=gen))
    x.view(-1)[0] = 200.0
    x.view(-1)[x.numel() // 2] = -1e-3
    dy = torch.randn(rows, cols, generator=gen)
    return dy.to(dtype).to(device), x.to(dtype).to(device), torch.tensor(0.5, device=device)


def truth(dy: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y, dx, dalpha, sum of magnitudes of dalpha's terms) in fp64: by 1 / cosh^2, since autograd's 1 - tanh^2 is zero from |z| = 19 on, in fp64 too."""
    z = alpha.double() * x.double()
    dz = dy.double() / torch.cosh(z).square()
    x64, a64 = x.double().requires_grad_(), alpha.double().requires_grad_()
    y = torch.tanh(a64 * x64)
    witness = torch.autograd.grad(y, (x64, a64), dy.double())
    torch.testing.assert_close(witness, (dz * alpha.double(), (dz * x.double()).sum()), rtol=1e-9, atol=1e-12)
    return y.detach(), dz * alpha.double(), (dz * x.double()).sum(), (dz * x.double()).abs().sum()


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(device, shape, dtype, backend):
    dy, x, alpha = inputs(*shape, dtype, device)
    y, dx, dalpha, size = truth(dy, x, alpha)
    step = 1e-5 if dtype == torch.float32 else 2.0**-8
    got = backend.tanh_bound(x, alpha)
    assert got.dtype == dtype and ((got.double() - y).abs() <= step * y.abs() + 1e-30).all()
    got_dx, got_dalpha = backend.tanh_bound_backward(dy, x, alpha)
    assert got_dx.dtype == dtype and ((got_dx.double() - dx).abs() <= (1.01 * step + 2e-7 * x.double().abs()) * dx.abs() + 1e-30).all()
    assert got_dalpha.dtype == torch.float32 and got_dalpha.shape == () and (got_dalpha.double() - dalpha).abs() <= 4e-6 * size + 1e-30
    assert_bitwise(backend.tanh_bound_backward(dy, x, alpha)[1], got_dalpha)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference_in_bf16(device, shape):
    dy, x, alpha = inputs(*shape, torch.bfloat16, device)
    assert_nearly_bitwise(kernels.tanh_bound(x, alpha), reference.tanh_bound(x, alpha), 1e-3)
    assert_nearly_bitwise(kernels.tanh_bound_backward(dy, x, alpha)[0], reference.tanh_bound_backward(dy, x, alpha)[0], 2e-3)


def test_strided_rows(device):
    """Queries inside a joint projection [rows, q | k | v]."""
    dy, joint, alpha = inputs(20, 96, torch.bfloat16, device)
    for part in (slice(0, 48), slice(48, 80)):
        x, g = joint[:, part], dy[:, part]
        assert_bitwise(kernels.tanh_bound(x, alpha), kernels.tanh_bound(x.contiguous(), alpha))
        for a, b in zip(kernels.tanh_bound_backward(g, x, alpha), kernels.tanh_bound_backward(g.contiguous(), x.contiguous(), alpha), strict=True):
            assert_bitwise(a, b)


def test_bad_elements_and_no_elements(device):
    dy, x, alpha = inputs(4, 64, torch.bfloat16, device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for backend in (reference, kernels):
        y = backend.tanh_bound(x, alpha)
        assert y.isnan().sum() == 1 and y[1, 3].isnan() and y[2, 5] == 1
        dx, dalpha = backend.tanh_bound_backward(dy, x, alpha)
        assert dx.isnan().sum() == 1 and dx[1, 3].isnan() and dalpha.isnan()
        assert backend.tanh_bound(x[:0], alpha).shape == (0, 64)
        dx, dalpha = backend.tanh_bound_backward(dy[:0], x[:0], alpha)
        assert dx.shape == (0, 64) and dalpha == 0


def test_bad_input(device):
    dy, x, alpha = inputs(4, 64, torch.bfloat16, device)
    for backend in (reference, kernels):
        with pytest.raises(ValueError, match="contiguous rows"):
            backend.tanh_bound(x.t(), alpha)
        with pytest.raises(TypeError, match="got torch.float64"):
            backend.tanh_bound(x.double(), alpha)
        with pytest.raises(ValueError, match="alpha must be a 0-dim fp32"):
            backend.tanh_bound(x, alpha[None])
        with pytest.raises(ValueError, match="one shape"):
            backend.tanh_bound_backward(dy[:2], x, alpha)


@pytest.mark.gpu
def test_real_sizes(device):
    """Queries and keys of the 8B geometry, 8192 tokens, inside their joint projection."""
    dy, joint, alpha = inputs(8192, 6144, torch.bfloat16, device)
    for part in (slice(0, 4096), slice(4096, 5120)):
        x, g = joint[:, part], dy[:, part]
        assert_nearly_bitwise(kernels.tanh_bound(x, alpha), reference.tanh_bound(x, alpha), 1e-3)
        dx, dalpha = kernels.tanh_bound_backward(g, x, alpha)
        assert_nearly_bitwise(dx, reference.tanh_bound_backward(g, x, alpha)[0], 2e-3)
        _, _, exact, size = truth(g, x, alpha)
        assert (dalpha.double() - exact).abs() <= 4e-6 * size
        assert_bitwise(kernels.tanh_bound_backward(g, x, alpha)[1], dalpha)
