"""RMSNorm and SwiGLU: forward and gradients against float64 and torch.autograd; quantised results are the quantised values of these."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference import dequantize, quantize, rmsnorm_quantize, swiglu_backward_quantize, swiglu_quantize, swiglu_quantize_saving
from fp8_recipes.reference.activation import swiglu, swiglu_backward, swiglu_prob_gradient

ROWS, FFN = 19, 150
FORMS = [("row", None), ("tile", None), ("micro", None), ("tile", "row"), ("micro", "row")]


def normal(rows: int, cols: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))).bfloat16()


def close(got: torch.Tensor, expected: torch.Tensor, steps: int) -> bool:
    """Within ``steps`` fp32 roundings of the float64 value; 1e-30 covers results that underflow."""
    return bool(((got.double() - expected).abs() <= steps * 2.0**-24 * expected.abs() + 1e-30).all())


def test_swiglu_and_its_gradient_are_autograd_s() -> None:
    h = normal(ROWS, 2 * FFN, 1, scale=4)
    h64 = h.double().requires_grad_()
    gate, up = h64.chunk(2, dim=1)
    y = F.silu(gate) * up
    dy = normal(ROWS, FFN, 2)
    y.backward(dy.double())
    assert close(swiglu(h), y.detach(), 16)
    got = swiglu_backward(dy, h)
    assert got.shape == (ROWS, 2 * FFN)
    error = (got.double() - h64.grad).abs()
    scale = dy.double().abs().repeat(1, 2) * h.double().abs().roll(FFN, 1).clamp(min=1) * 2  # silu' cancels near its zero at -1.28: absolute there
    assert (error <= 16 * 2.0**-24 * torch.maximum(scale, h64.grad.abs())).all()


def test_swiglu_backward_by_finite_differences() -> None:
    """A second witness that owes nothing to autograd: central differences in float64."""
    h, dy = normal(3, 8, 3).double(), normal(3, 4, 4)
    got = swiglu_backward(dy, h.bfloat16()).double()
    for j in range(8):
        step = torch.zeros_like(h)
        step[:, j] = 1e-4
        above, below = (F.silu(p[:, :4]) * p[:, 4:] for p in (h + step, h - step))
        slope = ((above - below) * dy.double()).sum(dim=1) / 2e-4
        assert torch.allclose(got[:, j], slope, rtol=1e-5, atol=1e-6)


def test_prob_and_its_gradient_are_autograd_s() -> None:
    h, dy = normal(ROWS, 2 * FFN, 20, scale=4), normal(ROWS, FFN, 21)
    prob = torch.rand(ROWS, generator=torch.Generator().manual_seed(22))
    h64, prob64 = h.double().requires_grad_(), prob.double().requires_grad_()
    gate, up = h64.chunk(2, dim=1)
    terms = F.silu(gate) * up
    y = terms * prob64[:, None]
    y.backward(dy.double())
    assert close(swiglu(h, prob), y.detach(), 16)
    error = (swiglu_backward(dy, h, prob).double() - h64.grad).abs()
    scale = dy.double().abs().repeat(1, 2) * h.double().abs().roll(FFN, 1).clamp(min=1) * 2 * prob.double()[:, None]
    assert (error <= 20 * 2.0**-24 * torch.maximum(scale, h64.grad.abs())).all()
    magnitude = (dy.double() * terms.detach()).abs().sum(1)
    assert ((swiglu_prob_gradient(dy, h).double() - prob64.grad).abs() <= 16 * 2.0**-24 * magnitude).all()
    q, dprob = swiglu_backward_quantize(dy, h, "tile", prob=prob)
    assert torch.equal(dequantize(q), dequantize(quantize(swiglu_backward(dy, h, prob), "tile")))
    assert torch.equal(dprob, swiglu_prob_gradient(dy, h))
    assert torch.equal(dequantize(swiglu_quantize(h, "tile", prob=prob)), dequantize(quantize(swiglu(h, prob), "tile")))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_saved_h_is_h_in_fp8(fmt) -> None:
    """By value: one rounding of each element under one scale per row, taken over both halves; what is computed from it is SwiGLU of those values."""
    h, dy = normal(ROWS, 2 * FFN, 30, scale=4), normal(ROWS, FFN, 31)
    prob = torch.rand(ROWS, generator=torch.Generator().manual_seed(32))
    h[3, FFN + 2] = 3000.0
    q, saved = swiglu_quantize_saving(h, "tile", fmt, prob=prob)
    assert torch.equal(dequantize(q), dequantize(swiglu_quantize(h, "tile", fmt, prob=prob))), "saving changes nothing"
    assert saved.granularity == "row" and saved.shape == h.shape and saved.format is fmt and saved.tile_exponent is None
    assert saved.nbytes() == 2 * FFN * ROWS + 4 * ROWS
    top = h.double().abs().amax(1)
    assert bool((top <= fmt.max * saved.scale.double()).all()) and bool((top > fmt.max * saved.scale.double() / 2).all())
    half_step = (h.double().abs() * 2.0 ** -(fmt.mantissa_bits + 1)).maximum(saved.scale[:, None].double() * fmt.min_subnormal / 2)
    assert ((dequantize(saved).double() - h.double()).abs() <= half_step).all()
    values = dequantize(saved)
    assert torch.equal(dequantize(swiglu_quantize(saved, "tile", prob=prob)), dequantize(quantize(swiglu(values, prob), "tile")))
    got, dprob = swiglu_backward_quantize(dy, saved, "tile", prob=prob)
    assert torch.equal(dequantize(got), dequantize(quantize(swiglu_backward(dy, values, prob), "tile")))
    assert torch.equal(dprob, swiglu_prob_gradient(dy, values))


def test_padding_rows_are_zero() -> None:
    h, dy, prob = normal(4, 64, 23), normal(4, 32, 24), torch.ones(4)
    h[2], dy[2], prob[2] = 0, 0, 0
    y, saved = swiglu_quantize_saving(h, prob=prob)
    for source in (h, saved):
        dh, dprob = swiglu_backward_quantize(dy, source, prob=prob)
        for q in (y, dh):
            assert not q.payload[2].view(torch.uint8).any()
            assert q.scale[2] == 2.0**-126
            assert (q.tile_exponent[2] == 1).all()
        assert dprob[2] == 0
    assert not saved.payload[2].view(torch.uint8).any() and saved.scale[2] == 2.0**-126


def test_saturated_gates_stay_finite() -> None:
    h = torch.tensor([[-1e4, 1e4, -88.0, 3.0, 1.0, 2.0, 3.0, 4.0]]).bfloat16()
    dy = torch.ones(1, 4).bfloat16()
    assert swiglu(h).isfinite().all()
    back = swiglu_backward(dy, h)
    assert back.isfinite().all()
    assert back[0, 1] == 2.0, "silu is the identity far to the right: dgate = dy * up"
    assert abs(back[0, 0]) < 1e-30, "and flat far to the left"


def test_rmsnorm_is_autograd_s_forward() -> None:
    x, gamma = normal(ROWS, FFN, 5, scale=30), normal(1, FFN, 6)[0]
    q, rstd = rmsnorm_quantize(x, gamma, 1e-6)
    expected = F.rms_norm(x.double(), (FFN,), gamma.double(), 1e-6)
    assert close(rstd, (x.double().square().mean(1) + 1e-6).rsqrt(), 16)
    assert torch.equal(q.scale, quantize(expected.float(), "row").scale)
    half_step = (expected.abs() * 2**-4).maximum(q.scale[:, None].double() * E4M3.min_subnormal / 2)
    assert ((dequantize(q).double() - expected).abs() <= half_step * 1.0001).all()


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rstd_gives_autograd_s_gradient_of_rmsnorm(eps: float) -> None:
    """What backward does with the returned rstd: dx = rstd * (g - xhat * mean(g * xhat)), g = dy * gamma."""
    x, gamma, dy = normal(ROWS, FFN, 7), normal(1, FFN, 8)[0], normal(ROWS, FFN, 9).double()
    _, rstd = rmsnorm_quantize(x, gamma, eps)
    x64, gamma64 = x.double().requires_grad_(), gamma.double().requires_grad_()
    F.rms_norm(x64, (FFN,), gamma64, eps).backward(dy)
    xhat = x.double() * rstd.double()[:, None]
    g = dy * gamma.double()
    dx = rstd.double()[:, None] * (g - xhat * (g * xhat).mean(1, keepdim=True))
    assert torch.allclose(dx, x64.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose((dy * xhat).sum(0), gamma64.grad, rtol=1e-5, atol=1e-6)


def test_zero_rows_of_rmsnorm_are_zero() -> None:
    x = normal(4, 64, 10)
    x[1] = 0
    q, rstd = rmsnorm_quantize(x, torch.ones(64), 1e-5)
    assert rstd[1].item() == pytest.approx(1e-5**-0.5)
    assert not dequantize(q)[1].any()
    assert q.scale[1] == 2.0**-126


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), FORMS)
def test_fused_results_are_the_quantised_fp32_values(granularity: str, fold: str | None, fmt) -> None:
    """No rounding to bf16 in between."""
    h, dy, gamma = normal(ROWS, 2 * FFN, 11, scale=3), normal(ROWS, FFN, 12), torch.linspace(0.5, 2, 2 * FFN)
    normed = h.float() * torch.rsqrt(h.float().square().mean(1) + 1e-5)[:, None] * gamma
    pairs = [
        (swiglu_quantize(h, granularity, fmt, fold=fold), swiglu(h)),
        (swiglu_backward_quantize(dy, h, granularity, fmt, fold=fold), swiglu_backward(dy, h)),
        (rmsnorm_quantize(h, gamma, 1e-5, granularity, fmt, fold=fold)[0], normed),
    ]
    for got, value in pairs:
        expected = quantize(value, granularity, fmt, fold=fold)
        assert torch.equal(got.payload.view(torch.uint8), expected.payload.view(torch.uint8))
        assert torch.equal(got.scale, expected.scale)
        assert got.granularity == (fold or granularity)
        assert got.format is fmt


def test_nan_in_one_token_stays_in_its_row() -> None:
    h, dy = normal(4, 64, 13), normal(4, 32, 14)
    h[2, 5] = torch.nan
    y, dh = dequantize(swiglu_quantize(h)), dequantize(swiglu_backward_quantize(dy, h))
    assert y[2, 5].isnan()
    assert y.isnan().sum() == 1
    assert dh[2, [5, 37]].isnan().all()
    assert dh.isnan().sum() == 2
    normed = dequantize(rmsnorm_quantize(h, torch.ones(64))[0])
    assert normed[2].isnan().all(), "the norm of a row with a NaN is NaN"
    assert normed.isnan().sum() == 64


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"h must be \[rows, 2F\] = \[gate \| up\], got an odd width 7"):
        swiglu_quantize(normal(2, 7, 15))
    with pytest.raises(ValueError, match=r"h must be \[rows, 2F\] for dy \[rows, F\]; got h \(2, 8\) and dy \(2, 8\)"):
        swiglu_backward_quantize(normal(2, 8, 16), normal(2, 8, 17))
    with pytest.raises(ValueError, match="h has tile scales; a saved h has one scale per row"):
        swiglu_quantize(quantize(normal(2, 8, 16), "tile"))
    with pytest.raises(TypeError, match="h is a ScaledTensor already; the form that saves h is for a bf16 h"):
        swiglu_quantize_saving(quantize(normal(2, 8, 16), "row"))
    with pytest.raises(ValueError, match=r"gamma must have shape \(8,\), got \(1,\)"):
        rmsnorm_quantize(normal(2, 8, 18), torch.ones(1))
    with pytest.raises(ValueError, match=r"prob must be contiguous fp32 \(2,\), one number per row of h; got torch.float32 \(2, 1\)"):
        swiglu_quantize(normal(2, 8, 19), prob=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"prob must be contiguous fp32 \(2,\).*got torch.bfloat16"):
        swiglu_backward_quantize(normal(2, 4, 16), normal(2, 8, 17), prob=torch.ones(2).bfloat16())
