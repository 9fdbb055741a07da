"""xielu_quantize and its backward: the reference, up to the last places of exp; the gradient of the alphas in one order, always."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, assert_quantized

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.kernels import rows, xielu_backward_quantize, xielu_quantize, xielu_quantize_saving

MODES = [("row", None), ("tile", None), ("micro", None), ("micro", "row"), ("tile", "row"), ("tensor", None), ("block", None)]
SHAPES = [(2, 128), (3, 832), (2, 100), (2, 96)]  # rows, F


def inputs(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dy, h, alpha): one row of values around the series' end, one element far out at either side."""
    gen = torch.Generator().manual_seed(rows * cols)
    h = 3 * torch.randn(rows, cols, generator=gen)
    dy = torch.randn(rows, cols, generator=gen) * torch.exp(torch.randn(rows, 1, generator=gen) * 2)
    h[-1] *= 0.02
    h[0, 0], h[0, 1], h[0, 2] = 80.0, -120.0, 0.0
    return dy.bfloat16().to(device), h.bfloat16().to(device), torch.tensor([0.8, 0.9], device=device)


def truth(dy: torch.Tensor, h: torch.Tensor, alpha: torch.Tensor, prob: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """(y, dh, dalpha, what dalpha's terms add up to in magnitude) by autograd in fp64."""
    x, a = h.double().requires_grad_(), alpha.double().requires_grad_()
    weight = dy.double() if prob is None else dy.double() * prob.double()[:, None]
    y = torch.where(x > 0, a[0] * x * x, a[1] * (torch.expm1(x.clamp(max=0)) - x)) + x / 2
    dh, dalpha = torch.autograd.grad(y, (x, a), weight, retain_graph=True)
    (size,) = torch.autograd.grad(y, a, weight.abs())  # both derivatives by alpha are positive
    y = y.detach()
    return y if prob is None else y * prob.double()[:, None], dh, dalpha, size


def check_alpha(actual: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    assert actual.dtype == torch.float32 and actual.shape == (2,)
    error = (actual.double() - expected).abs() / size
    assert (error <= 2e-6).all(), f"dalpha is off by {error.tolist()} of the sum of magnitudes"


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xielu(device, shape, granularity, fold, fmt):
    dy, h, alpha = inputs(*shape, device)
    y, dh, dalpha, size = truth(dy, h, alpha)
    assert_quantized(xielu_quantize(h, alpha, granularity, fmt, fold=fold), reference.xielu_quantize(h, alpha, granularity, fmt, fold=fold), y)
    actual = xielu_backward_quantize(dy, h, alpha, granularity, fmt, fold=fold)
    assert_quantized(actual.h, reference.xielu_backward_quantize(dy, h, alpha, granularity, fmt, fold=fold).h, dh)
    check_alpha(actual.alpha, dalpha, size)
    assert actual.prob is None
    assert_bitwise(xielu_backward_quantize(dy, h, alpha, granularity, fmt, fold=fold).alpha, actual.alpha)


@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prob(device, shape, granularity, fold):
    dy, h, alpha = inputs(*shape, device)
    prob = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    h[1], dy[1], prob[1] = 0, 0, 0  # a padding row
    y, dh, dalpha, size = truth(dy, h, alpha, prob)
    q = xielu_quantize(h, alpha, granularity, fold=fold, prob=prob)
    actual = xielu_backward_quantize(dy, h, alpha, granularity, fold=fold, prob=prob)
    assert_quantized(q, reference.xielu_quantize(h, alpha, granularity, fold=fold, prob=prob), y)
    assert_quantized(actual.h, reference.xielu_backward_quantize(dy, h, alpha, granularity, fold=fold, prob=prob).h, dh)
    check_alpha(actual.alpha, dalpha, size)
    terms = dy.double() * truth(dy, h, alpha)[0]
    assert actual.prob is not None and actual.prob.dtype == torch.float32
    assert ((actual.prob.double() - terms.sum(1)).abs() <= 4e-6 * terms.abs().sum(1)).all()
    assert actual.prob[1] == 0
    assert not q.payload[1].view(torch.uint8).any() and not actual.h.payload[1].view(torch.uint8).any()


def test_prob_of_one_changes_nothing(device):
    dy, h, alpha = inputs(4, 256, device)
    ones = torch.ones(4, device=device)
    assert_bitwise(xielu_quantize(h, alpha, "micro", fold="row", prob=ones), xielu_quantize(h, alpha, "micro", fold="row"))
    one, none = (xielu_backward_quantize(dy, h, alpha, "micro", fold="row", prob=p) for p in (ones, None))
    assert_bitwise(one.h, none.h)
    assert_bitwise(one.alpha, none.alpha)


SAVED = [(shape, "row", None, FORMATS["e4m3"]) for shape in SHAPES]
SAVED += [((3, 832), "row", None, FORMATS["e5m2"]), ((5, 128), "micro", "row", FORMATS["e5m2"]), ((5, 128), "tile", None, FORMATS["e4m3"])]
SAVED += [((5, 128), "tensor", None, FORMATS["e4m3"])]


@pytest.mark.parametrize(("shape", "granularity", "fold", "fmt"), SAVED, ids=str)
def test_saved_h(device, shape, granularity, fold, fmt):
    """The same read also gives h in FP8, bit for bit; what is computed from that is the reference's result of the same bytes."""
    dy, h, alpha = inputs(*shape, device)
    prob = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    q, saved = xielu_quantize_saving(h, alpha, granularity, fmt, fold=fold, prob=prob)
    assert_bitwise(saved, reference.xielu_quantize_saving(h, alpha, granularity, fmt, fold=fold, prob=prob)[1])
    assert_bitwise(q, xielu_quantize(h, alpha, granularity, fmt, fold=fold, prob=prob), "the activation without saving")
    y, dh, dalpha, size = truth(dy, reference.dequantize(saved), alpha, prob)
    again = xielu_quantize(saved, alpha, granularity, fmt, fold=fold, prob=prob)
    assert_quantized(again, reference.xielu_quantize(saved, alpha, granularity, fmt, fold=fold, prob=prob), y)
    actual = xielu_backward_quantize(dy, saved, alpha, granularity, fmt, fold=fold, prob=prob)
    assert_quantized(actual.h, reference.xielu_backward_quantize(dy, saved, alpha, granularity, fmt, fold=fold, prob=prob).h, dh)
    check_alpha(actual.alpha, dalpha, size)
    terms = dy.double() * truth(dy, reference.dequantize(saved), alpha)[0]
    assert ((actual.prob.double() - terms.sum(1)).abs() <= 4e-6 * terms.abs().sum(1)).all()


@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("micro", "row"), ("tensor", None)])
def test_rows_that_hold_nothing_add_nothing_to_the_alphas(device, granularity, fold):
    """Behind the groups in use a grouped buffer holds what was in memory: NaN here. Its rows count for no sum; the others' bits do not move."""
    dy, h, alpha = inputs(6, 256, device)
    prob = torch.rand(6, generator=torch.Generator().manual_seed(1)).to(device)
    source = torch.tensor([3, 0, -1, 7, -1, -1], dtype=torch.int32, device=device)
    zeros = [t.clone() for t in (dy, h, prob)]
    for t, garbage in zip((dy, h, prob), zeros, strict=True):
        t[source < 0], garbage[source < 0] = torch.nan, 0
    how = {"granularity": granularity, "fold": fold}
    actual = xielu_backward_quantize(dy, h, alpha, prob=prob, source=source, **how)
    expected = xielu_backward_quantize(*zeros[:2], alpha, prob=zeros[2], **how)
    assert_bitwise(actual.alpha, expected.alpha)
    check_alpha(actual.alpha, *truth(*zeros[:2], alpha, zeros[2])[2:])
    check_alpha(reference.xielu_backward_quantize(dy, h, alpha, prob=prob, source=source, **how).alpha, *truth(*zeros[:2], alpha, zeros[2])[2:])
    assert torch.equal(actual.prob[source >= 0], expected.prob[source >= 0])


def test_alphas_at_zero_and_far_from_the_start(device):
    """alpha_n below 1/2 makes the left side rise, alpha_p = 0 leaves x / 2 on the right."""
    dy, h, _ = inputs(3, 256, device)
    for pair in ((0.0, 0.5), (5.0, 0.1)):
        alpha = torch.tensor(pair, device=device)
        y, dh, dalpha, size = truth(dy, h, alpha)
        assert_quantized(xielu_quantize(h, alpha), reference.xielu_quantize(h, alpha), y)
        actual = xielu_backward_quantize(dy, h, alpha)
        assert_quantized(actual.h, reference.xielu_backward_quantize(dy, h, alpha).h, dh)
        check_alpha(actual.alpha, dalpha, size)


def test_rows_too_wide_for_registers(device, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 256)
    dy, h, alpha = inputs(3, 384, device)
    assert not rows.is_fused(h.shape, "micro", "row", None), "the way that is meant"
    y, dh, dalpha, size = truth(dy, h, alpha)
    assert_quantized(xielu_quantize(h, alpha, "micro", fold="row"), reference.xielu_quantize(h, alpha, "micro", fold="row"), y)
    actual = xielu_backward_quantize(dy, h, alpha)
    assert_quantized(actual.h, reference.xielu_backward_quantize(dy, h, alpha).h, dh)
    check_alpha(actual.alpha, dalpha, size)
    q, saved = xielu_quantize_saving(h, alpha)
    assert_bitwise(saved, reference.xielu_quantize_saving(h, alpha)[1])
    assert_quantized(q, reference.xielu_quantize(h, alpha), y)
    y, dh, dalpha, size = truth(dy, reference.dequantize(saved), alpha)
    assert_quantized(xielu_quantize(saved, alpha), reference.xielu_quantize(saved, alpha), y)
    check_alpha(xielu_backward_quantize(dy, saved, alpha).alpha, dalpha, size)


def test_bad_elements_stay_alone(device):
    dy, h, alpha = inputs(4, 256, device)
    h[1, 7], h[2, 9], dy[3] = float("nan"), float("inf"), 0.0
    expected = torch.zeros(4, 256, dtype=torch.bool, device=device)
    expected[1, 7] = expected[2, 9] = True
    y = reference.dequantize(xielu_quantize(h, alpha, "micro", fold="row"))
    gradients = xielu_backward_quantize(dy, h, alpha, "micro", fold="row")
    dh = reference.dequantize(gradients.h)
    assert torch.equal(y.isnan(), expected) and torch.equal(dh.isnan(), expected)
    assert (dh[3] == 0).all()
    assert not gradients.alpha[0].isfinite()  # visible where it belongs: the sum over x > 0 holds the Inf


def test_bad_input(device):
    dy, h, alpha = inputs(4, 128, device)
    with pytest.raises(ValueError, match="alpha must be contiguous fp32"):
        xielu_quantize(h, alpha.double())
    with pytest.raises(ValueError, match=r"h and dy must both be \[rows, F\]"):
        xielu_backward_quantize(dy[:, :64].contiguous(), h, alpha)
    with pytest.raises(ValueError, match="prob must be contiguous fp32"):
        xielu_quantize(h, alpha, prob=torch.ones(8, device=device)[::2])
    with pytest.raises(ValueError, match="empty"):
        xielu_quantize(h[:0], alpha)
    with pytest.raises(ValueError, match="empty"):
        xielu_backward_quantize(dy[:0], h[:0], alpha)
    for module in (xielu_backward_quantize, reference.xielu_backward_quantize):
        with pytest.raises(ValueError, match=r"source must be contiguous int32 \(4,\), one number per row of h; got torch.int64"):
            module(dy, h, alpha, source=torch.zeros(4, dtype=torch.int64, device=device))
    _, saved = xielu_quantize_saving(h, alpha)
    for module in (xielu_quantize_saving, reference.xielu_quantize_saving):
        with pytest.raises(TypeError, match="h is a ScaledTensor already; the form that saves h is for a bf16 h"):
            module(saved, alpha)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 6144), (4096, 12288), (4096, 21504), (8192, 2112)], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES[:4])
def test_real_sizes(device, shape, granularity, fold):
    dy, h, alpha = inputs(*shape, device)
    prob = torch.rand(shape[0], device=device)
    for fmt in FORMATS.values():
        for p in (None, prob):
            y, dh, dalpha, size = truth(dy, h, alpha, p)
            options = {"fold": fold, "prob": p}
            assert_quantized(xielu_quantize(h, alpha, granularity, fmt, **options), reference.xielu_quantize(h, alpha, granularity, fmt, **options), y)
            actual = xielu_backward_quantize(dy, h, alpha, granularity, fmt, **options)
            assert_quantized(actual.h, reference.xielu_backward_quantize(dy, h, alpha, granularity, fmt, **options).h, dh)
            check_alpha(actual.alpha, dalpha, size)
            assert_bitwise(xielu_backward_quantize(dy, h, alpha, granularity, fmt, **options).alpha, actual.alpha)
            q, saved = xielu_quantize_saving(h, alpha, granularity, fmt, **options)
            assert_bitwise(saved, reference.xielu_quantize_saving(h, alpha, granularity, fmt, **options)[1])
            assert_bitwise(q, xielu_quantize(h, alpha, granularity, fmt, **options), "the activation without saving")
            _, dh, dalpha, size = truth(dy, reference.dequantize(saved), alpha, p)
            actual = xielu_backward_quantize(dy, saved, alpha, granularity, fmt, **options)
            assert_quantized(actual.h, reference.xielu_backward_quantize(dy, saved, alpha, granularity, fmt, **options).h, dh)
            check_alpha(actual.alpha, dalpha, size)
