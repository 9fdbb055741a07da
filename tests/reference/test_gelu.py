"""GeLU: value and gradients against float64; quantised results are the quantised values of these."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference import dequantize, gelu_backward_quantize, gelu_quantize, gelu_quantize_saving, quantize
from fp8_recipes.reference.gelu import gelu, gelu_backward, gelu_prob_gradient

ROWS, FFN = 19, 150


def normal(seed: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(ROWS, FFN, generator=torch.Generator().manual_seed(seed))).bfloat16()


def test_value_and_gradients_are_autograd_s_even_in_the_tail() -> None:
    h, dy, prob = normal(1, 3), normal(2), torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    h[0, :4] = torch.tensor([0.0, -12.0, 90.0, -1e4])
    h64, prob64 = h.double().requires_grad_(), prob.double().requires_grad_()
    y = h64 * torch.special.erfc(-h64 / 2**0.5) / 2 * prob64[:, None]
    torch.testing.assert_close(y, F.gelu(h64) * prob64[:, None], rtol=1e-9, atol=1e-15)
    y.backward(dy.double())
    assert ((gelu(h, prob).double() - y.detach()).abs() <= 64 * 2.0**-24 * (1 + h.double().square()) * y.detach().abs() + 1e-30).all()
    weight = (dy.double() * prob.double()[:, None]).abs()
    assert ((gelu_backward(dy, h, prob).double() - h64.grad).abs() <= 64 * 2.0**-24 * weight).all()
    terms = (dy.double() * F.gelu(h.double())).abs().sum(1)
    assert ((gelu_prob_gradient(dy, h).double() - prob64.grad).abs() <= 1e-5 * terms).all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("tile", None), ("micro", None), ("tile", "row"), ("micro", "row")])
def test_fused_results_are_the_quantised_fp32_values(granularity: str, fold: str | None, fmt) -> None:
    h, dy, prob = normal(4, 3), normal(5), torch.linspace(0, 1, ROWS)
    got = gelu_backward_quantize(dy, h, granularity, fmt, fold=fold, prob=prob)
    for q, value in ((gelu_quantize(h, granularity, fmt, fold=fold, prob=prob), gelu(h, prob)), (got.h, gelu_backward(dy, h, prob))):
        expected = quantize(value, granularity, fmt, fold=fold)
        assert torch.equal(q.payload.view(torch.uint8), expected.payload.view(torch.uint8)) and torch.equal(q.scale, expected.scale)
        assert q.granularity == (fold or granularity) and q.format is fmt
    assert got.prob is not None and torch.equal(got.prob, gelu_prob_gradient(dy, h))
    assert gelu_backward_quantize(dy, h, granularity, fmt, fold=fold).prob is None


def test_saved_h_is_h_in_fp8_and_stands_for_it() -> None:
    h, dy, prob = normal(9, 3), normal(10), torch.linspace(0, 1, ROWS)
    for fmt in (E4M3, E5M2):
        q, saved = gelu_quantize_saving(h, "micro", fmt, fold="row", prob=prob)
        alone = gelu_quantize(h, "micro", fmt, fold="row", prob=prob)
        assert torch.equal(q.payload.view(torch.uint8), alone.payload.view(torch.uint8)) and torch.equal(q.scale, alone.scale)
        whole = quantize(h, "row", fmt)
        assert torch.equal(saved.payload.view(torch.uint8), whole.payload.view(torch.uint8)) and torch.equal(saved.scale, whole.scale)
        assert saved.tile_exponent is None and saved.format is fmt
        values = dequantize(saved).bfloat16()  # exact: an FP8 value times a power of two
        got, want = (gelu_backward_quantize(dy, x, prob=prob) for x in (saved, values))
        assert torch.equal(got.h.payload.view(torch.uint8), want.h.payload.view(torch.uint8)) and torch.equal(got.prob, want.prob)
        assert torch.equal(gelu(saved, prob), gelu(values, prob))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"h and dy must both be \[rows, F\]; got h \(19, 150\) and dy \(19, 10\)"):
        gelu_backward_quantize(normal(6)[:, :10], normal(7))
    with pytest.raises(ValueError, match=r"prob must be contiguous fp32 \(19,\)"):
        gelu_quantize(normal(8), prob=torch.ones(3))
