"""xIELU: value and all gradients against float64; quantised results are the quantised values of these."""

from __future__ import annotations

import pytest
import torch

from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference import dequantize, quantize, xielu_backward_quantize, xielu_quantize, xielu_quantize_saving
from fp8_recipes.reference.xielu import xielu, xielu_alpha_gradient, xielu_backward, xielu_prob_gradient

ROWS, FFN = 19, 150
FORMS = [("row", None), ("tile", None), ("micro", None), ("tile", "row"), ("micro", "row")]
ALPHAS = [(0.8, 0.8), (0.3, 2.5), (1.7, 0.55)]


def alpha_of(p: float, n: float) -> torch.Tensor:
    return torch.tensor([p, n])


def normal(rows: int, cols: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))).bfloat16()


def truth(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """xIELU of the definition, in the dtype of x and alpha."""
    return torch.where(x > 0, alpha[0] * x * x, alpha[1] * (torch.expm1(x.clamp(max=0)) - x)) + x / 2


def inputs(seed: int) -> torch.Tensor:
    """Every magnitude from 1e-9 to 300 and both signs."""
    h = normal(ROWS, FFN, seed, scale=3).float()
    h[::3] *= torch.logspace(-9, 2, FFN)
    h[0, :4] = torch.tensor([0.0, -200.0, 300.0, -1 / 32])
    return h.bfloat16()


@pytest.mark.parametrize("pair", ALPHAS, ids=str)
def test_value_and_every_gradient_are_autograd_s(pair: tuple[float, float]) -> None:
    alpha, h, dy = alpha_of(*pair), inputs(1), normal(ROWS, FFN, 2)
    prob = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    h64, alpha64, prob64 = h.double().requires_grad_(), alpha.double().requires_grad_(), prob.double().requires_grad_()
    y = truth(h64, alpha64) * prob64[:, None]
    y.backward(dy.double())
    # relative to the larger of the two summands, which cancel where y crosses zero on the left
    left = alpha64[1].detach() * (torch.expm1(h.double().clamp(max=0)) - h.double())
    size = (torch.where(h > 0, y.detach().abs() / prob.double()[:, None], left.abs()) + h.double().abs() / 2) * prob.double()[:, None]
    assert ((xielu(h, alpha, prob).double() - y.detach()).abs() <= 16 * 2.0**-24 * size).all()
    slope = 2 * alpha.max().double() * h.double().abs().clamp(min=1) + 0.5
    error = (xielu_backward(dy, h, alpha, prob).double() - h64.grad).abs()
    assert (error <= 16 * 2.0**-24 * dy.double().abs() * prob.double()[:, None] * slope).all()
    weight = (dy.double() * prob.double()[:, None]).abs()
    sizes = torch.stack([(weight * torch.where(h > 0, h.double().square(), 0)).sum(), (weight * left.abs() / alpha[1]).masked_fill(h > 0, 0).sum()])
    assert ((xielu_alpha_gradient(dy, h, prob).double() - alpha64.grad).abs() <= 1e-6 * sizes).all()
    terms = dy.double() * truth(h.double(), alpha.double())
    assert ((xielu_prob_gradient(dy, h, alpha).double() - prob64.grad).abs() <= 1e-5 * terms.abs().sum(1)).all()


def test_gradients_by_finite_differences() -> None:
    """A second witness that owes nothing to autograd: central differences in float64."""
    alpha, h, dy = alpha_of(0.8, 1.1), normal(3, 8, 4), normal(3, 8, 5)
    h64, alpha64, step = h.double(), alpha.double(), 1e-5

    def loss(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (truth(x, a) * dy.double()).sum()

    got = xielu_backward(dy, h, alpha).double()
    for index in range(h.numel()):
        delta = torch.zeros(h.numel(), dtype=torch.float64)
        delta[index] = step
        slope = (loss(h64 + delta.view(3, 8), alpha64) - loss(h64 - delta.view(3, 8), alpha64)) / (2 * step)
        assert float(got.flatten()[index]) == pytest.approx(float(slope), rel=1e-4, abs=1e-5)
    for index in range(2):
        delta = torch.zeros(2, dtype=torch.float64)
        delta[index] = step
        slope = (loss(h64, alpha64 + delta) - loss(h64, alpha64 - delta)) / (2 * step)
        assert float(xielu_alpha_gradient(dy, h)[index]) == pytest.approx(float(slope), rel=1e-5)


def test_shape_of_the_curve() -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    y = xielu(x.float()[None], alpha_of(0.8, 0.8))[0]
    assert abs(y[2000]) < 1e-12 and xielu(torch.zeros(1, 4), alpha_of(0.8, 0.8)).eq(0).all()
    slope = y.double().diff() / x.diff()
    assert slope[2000] == pytest.approx(0.5, abs=0.01) and slope[1999] == pytest.approx(0.5, abs=0.01), "slope 1/2 from both sides"
    assert slope[0] == pytest.approx(0.5 - 0.8, abs=0.01), "to the left the slope tends to 1/2 - alpha_n"
    lowest = int(y.argmin())
    assert y[lowest] < 0 and x[lowest] == pytest.approx(torch.log(torch.tensor(1 - 0.5 / 0.8)).item(), abs=0.01)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), FORMS)
def test_fused_results_are_the_quantised_fp32_values(granularity: str, fold: str | None, fmt) -> None:
    alpha, h, dy, prob = alpha_of(0.8, 0.8), normal(ROWS, FFN, 6, scale=3), normal(ROWS, FFN, 7), torch.linspace(0, 1, ROWS)
    got = xielu_backward_quantize(dy, h, alpha, granularity, fmt, fold=fold, prob=prob)
    pairs = [
        (xielu_quantize(h, alpha, granularity, fmt, fold=fold, prob=prob), xielu(h, alpha, prob)),
        (got.h, xielu_backward(dy, h, alpha, prob)),
    ]
    for q, value in pairs:
        expected = quantize(value, granularity, fmt, fold=fold)
        assert torch.equal(q.payload.view(torch.uint8), expected.payload.view(torch.uint8))
        assert torch.equal(q.scale, expected.scale)
        assert q.granularity == (fold or granularity) and q.format is fmt
    assert got.alpha is not None and got.prob is not None
    assert torch.equal(got.alpha, xielu_alpha_gradient(dy, h, prob))
    assert torch.equal(got.prob, xielu_prob_gradient(dy, h, alpha))
    assert xielu_backward_quantize(dy, h, alpha, granularity, fmt, fold=fold).prob is None


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_saved_h_is_h_in_fp8_and_stands_for_it(fmt) -> None:
    alpha, h, dy, prob = alpha_of(0.8, 0.9), normal(ROWS, FFN, 6, scale=3), normal(ROWS, FFN, 7), torch.linspace(0, 1, ROWS)
    q, saved = xielu_quantize_saving(h, alpha, "micro", fmt, fold="row", prob=prob)
    alone, whole = xielu_quantize(h, alpha, "micro", fmt, fold="row", prob=prob), quantize(h, "row", fmt)
    assert torch.equal(q.payload.view(torch.uint8), alone.payload.view(torch.uint8)) and torch.equal(q.scale, alone.scale)
    assert torch.equal(saved.payload.view(torch.uint8), whole.payload.view(torch.uint8)) and torch.equal(saved.scale, whole.scale)
    assert saved.tile_exponent is None and saved.format is fmt
    values = dequantize(saved).bfloat16()  # exact: an FP8 value times a power of two
    assert torch.equal(xielu(saved, alpha, prob), xielu(values, alpha, prob))
    got, want = (xielu_backward_quantize(dy, x, alpha, prob=prob) for x in (saved, values))
    assert torch.equal(got.h.payload.view(torch.uint8), want.h.payload.view(torch.uint8)) and torch.equal(got.h.scale, want.h.scale)
    assert torch.equal(got.alpha, want.alpha) and torch.equal(got.prob, want.prob)  # type: ignore[arg-type]


def test_rows_that_hold_nothing_add_nothing_to_the_alphas() -> None:
    alpha, h, dy, prob = alpha_of(0.8, 0.9), normal(4, 64, 10), normal(4, 64, 11), torch.ones(4)
    source = torch.tensor([5, -1, 0, -1], dtype=torch.int32)
    used = source >= 0
    expected = xielu_alpha_gradient(dy[used], h[used], prob[used])
    h[1], dy[3] = torch.nan, torch.inf
    assert torch.equal(xielu_backward_quantize(dy, h, alpha, prob=prob, source=source).alpha, expected)  # type: ignore[arg-type]
    assert not xielu_backward_quantize(dy, h, alpha, prob=prob).alpha.isfinite().any()  # type: ignore[union-attr]


def test_nan_stays_in_its_element_and_shows_in_the_alphas() -> None:
    alpha, h, dy = alpha_of(0.8, 0.8), normal(4, 64, 8), normal(4, 64, 9)
    h[2, 5], h[3, 7] = torch.nan, torch.inf
    y, gradients = dequantize(xielu_quantize(h, alpha)), xielu_backward_quantize(dy, h, alpha)
    dh = dequantize(gradients.h)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[2, 5] = expected[3, 7] = True
    assert torch.equal(y.isnan(), expected) and torch.equal(dh.isnan(), expected)
    assert gradients.alpha is not None and not gradients.alpha.isfinite().any()


def test_padding_rows_are_zero() -> None:
    alpha, h, dy, prob = alpha_of(0.8, 0.8), normal(4, 64, 10), normal(4, 64, 11), torch.ones(4)
    h[2], dy[2], prob[2] = 0, 0, 0
    gradients = xielu_backward_quantize(dy, h, alpha, prob=prob)
    for q in (xielu_quantize(h, alpha, prob=prob), gradients.h):
        assert not q.payload[2].view(torch.uint8).any() and q.scale[2] == 2.0**-126
    assert gradients.prob is not None and gradients.prob[2] == 0


def test_refusals() -> None:
    h = normal(2, 8, 12)
    with pytest.raises(ValueError, match=r"alpha must be contiguous fp32 \(2,\) = \[alpha_p, alpha_n\]; got torch.float32 \(3,\)"):
        xielu_quantize(h, torch.ones(3))
    with pytest.raises(ValueError, match="got torch.bfloat16"):
        xielu_quantize(h, torch.ones(2).bfloat16())
    with pytest.raises(ValueError, match=r"h and dy must both be \[rows, F\]; got h \(2, 8\) and dy \(2, 4\)"):
        xielu_backward_quantize(normal(2, 4, 13), h, alpha_of(0.8, 0.8))
    with pytest.raises(ValueError, match=r"prob must be contiguous fp32 \(2,\)"):
        xielu_quantize(h, alpha_of(0.8, 0.8), prob=torch.ones(3))
