"""gelu_quantize and its backward: the reference, up to what the fitted tail crosses of rounding boundaries."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, assert_quantized

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.kernels import gelu_backward_quantize, gelu_quantize, gelu_quantize_saving, rows
from fp8_recipes.reference.gelu import gelu, gelu_backward

MODES = [("row", None), ("tile", None), ("micro", None), ("micro", "row"), ("tile", "row"), ("tensor", None), ("block", None)]
SHAPES = [(2, 128), (3, 832), (2, 100)]  # rows, F


def inputs(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(rows * cols)
    h = 3 * torch.randn(rows, cols, generator=gen)
    dy = torch.randn(rows, cols, generator=gen) * torch.exp(torch.randn(rows, 1, generator=gen) * 2)
    h[-1] *= 0.02
    h[0, 0], h[0, 1], h[0, 2] = 80.0, -120.0, 0.0
    return dy.bfloat16().to(device), h.bfloat16().to(device)


def truth(dy: torch.Tensor, h: torch.Tensor, prob: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, dh) by autograd in fp64."""
    x = h.double().requires_grad_()
    y = torch.nn.functional.gelu(x)
    if prob is not None:
        y = y * prob.double()[:, None]
    (dh,) = torch.autograd.grad(y, x, dy.double())
    return y.detach(), dh


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu(device, shape, granularity, fold, fmt):
    dy, h = inputs(*shape, device)
    y, dh = truth(dy, h)
    assert_quantized(gelu_quantize(h, granularity, fmt, fold=fold), reference.gelu_quantize(h, granularity, fmt, fold=fold), y)
    actual = gelu_backward_quantize(dy, h, granularity, fmt, fold=fold)
    assert_quantized(actual.h, reference.gelu_backward_quantize(dy, h, granularity, fmt, fold=fold).h, dh)
    assert actual.prob is None


@pytest.mark.parametrize(("granularity", "fold"), MODES)
def test_prob(device, granularity, fold):
    dy, h = inputs(5, 832, device)
    prob = torch.rand(5, generator=torch.Generator().manual_seed(1)).to(device)
    h[1], dy[1], prob[1] = 0, 0, 0  # a padding row
    y, dh = truth(dy, h, prob)
    q, actual = gelu_quantize(h, granularity, fold=fold, prob=prob), gelu_backward_quantize(dy, h, granularity, fold=fold, prob=prob)
    assert_quantized(q, reference.gelu_quantize(h, granularity, fold=fold, prob=prob), y)
    assert_quantized(actual.h, reference.gelu_backward_quantize(dy, h, granularity, fold=fold, prob=prob).h, dh)
    terms = dy.double() * truth(dy, h)[0]
    assert actual.prob is not None and actual.prob.dtype == torch.float32 and actual.prob[1] == 0
    assert ((actual.prob.double() - terms.sum(1)).abs() <= 1e-5 * terms.abs().sum(1)).all()
    assert not q.payload[1].view(torch.uint8).any() and not actual.h.payload[1].view(torch.uint8).any()
    assert_bitwise(gelu_quantize(h, granularity, fold=fold, prob=torch.ones_like(prob)), gelu_quantize(h, granularity, fold=fold))


SAVED = [(shape, "row", None, FORMATS["e4m3"]) for shape in SHAPES]
SAVED += [((3, 832), "row", None, FORMATS["e5m2"]), ((5, 128), "micro", "row", FORMATS["e5m2"]), ((5, 128), "tile", None, FORMATS["e4m3"])]
SAVED += [((4, 100), "micro", "row", FORMATS["e4m3"]), ((5, 128), "tensor", None, FORMATS["e4m3"])]


@pytest.mark.parametrize(("shape", "granularity", "fold", "fmt"), SAVED, ids=str)
def test_saved_h(device, shape, granularity, fold, fmt):
    """The same read also gives h in FP8, bit for bit; what is computed from that is the reference's result of the same bytes."""
    dy, h = inputs(*shape, device)
    prob = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    q, saved = gelu_quantize_saving(h, granularity, fmt, fold=fold, prob=prob)
    assert_bitwise(saved, reference.gelu_quantize_saving(h, granularity, fmt, fold=fold, prob=prob)[1])
    assert_bitwise(q, gelu_quantize(h, granularity, fmt, fold=fold, prob=prob), "the activation without saving")
    y, dh = truth(dy, reference.dequantize(saved), prob)
    again = gelu_quantize(saved, granularity, fmt, fold=fold, prob=prob)
    assert_quantized(again, reference.gelu_quantize(saved, granularity, fmt, fold=fold, prob=prob), y)
    actual = gelu_backward_quantize(dy, saved, granularity, fmt, fold=fold, prob=prob)
    expected = reference.gelu_backward_quantize(dy, saved, granularity, fmt, fold=fold, prob=prob)
    assert_quantized(actual.h, expected.h, dh)
    terms = dy.double() * truth(dy, reference.dequantize(saved))[0]
    assert ((actual.prob.double() - terms.sum(1)).abs() <= 1e-5 * terms.abs().sum(1)).all()
    assert torch.equal(gelu_backward_quantize(dy, saved, granularity, fmt, fold=fold, prob=prob).prob, actual.prob)


def test_saved_h_of_padding_and_bad_rows(device):
    dy, h = inputs(5, 256, device)
    h[1] = 0
    h[2, 7], h[3, 9] = torch.nan, -torch.inf
    prob = torch.ones(5, device=device)
    dy[1], prob[1] = 0, 0
    q, saved = gelu_quantize_saving(h, prob=prob)
    assert_bitwise(saved, reference.gelu_quantize_saving(h, prob=prob)[1])
    assert not saved.payload[1].view(torch.uint8).any() and saved.scale[1] == 2.0**-126
    bad = [[2, 7], [3, 9]]
    assert reference.dequantize(saved).isnan().nonzero().tolist() == bad, "what is not finite is NaN, alone"
    assert reference.dequantize(q).isnan().nonzero().tolist() == bad
    actual = gelu_backward_quantize(dy, saved, prob=prob)
    assert reference.dequantize(actual.h).isnan().nonzero().tolist() == bad
    assert actual.prob.isnan().tolist() == [False, False, True, True, False] and actual.prob[1] == 0
    assert not actual.h.payload[1].view(torch.uint8).any()


def test_the_fitted_tail(device):
    """Every group holds one value, so E4M3 shows its relative error: none is a whole step from float64, far into the tail."""
    h = torch.zeros(16, 32, 32, device=device)
    h[:, :, 0] = torch.linspace(-12, 6, 512, device=device).view(16, 32)
    h = h.bfloat16().view(16, 1024)
    one = torch.zeros_like(h)
    one[:, ::32] = 1
    for q, exact in ((gelu_quantize(h, "micro"), gelu(h.double())), (gelu_backward_quantize(one, h, "micro").h, gelu_backward(one, h))):
        got, exact = reference.dequantize(q)[:, ::32].double(), exact[:, ::32].double()
        assert ((got - exact).abs() <= (2**-4 + 1e-5) * exact.abs() + 1e-36).all()


def test_rows_too_wide_for_registers(device, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 256)
    dy, h = inputs(3, 384, device)
    assert not rows.is_fused(h.shape, "micro", "row", None), "the way that is meant"
    y, dh = truth(dy, h)
    assert_quantized(gelu_quantize(h, "micro", fold="row"), reference.gelu_quantize(h, "micro", fold="row"), y)
    assert_quantized(gelu_backward_quantize(dy, h).h, reference.gelu_backward_quantize(dy, h).h, dh)
    q, saved = gelu_quantize_saving(h)
    assert_bitwise(saved, reference.gelu_quantize_saving(h)[1])
    assert_quantized(q, reference.gelu_quantize(h), y)
    y, dh = truth(dy, reference.dequantize(saved))
    assert_quantized(gelu_quantize(saved), reference.gelu_quantize(saved), y)
    assert_quantized(gelu_backward_quantize(dy, saved).h, reference.gelu_backward_quantize(dy, saved).h, dh)


def test_bad_elements_stay_alone(device):
    dy, h = inputs(4, 256, device)
    h[1, 7], h[2, 9], dy[3] = float("nan"), float("inf"), 0.0
    expected = torch.zeros(4, 256, dtype=torch.bool, device=device)
    expected[1, 7] = expected[2, 9] = True
    assert torch.equal(reference.dequantize(gelu_quantize(h, "micro", fold="row")).isnan(), expected)
    dh = reference.dequantize(gelu_backward_quantize(dy, h, "micro", fold="row").h)
    assert torch.equal(dh.isnan(), expected) and (dh[3] == 0).all()


def test_bad_input(device):
    dy, h = inputs(4, 128, device)
    with pytest.raises(ValueError, match=r"h and dy must both be \[rows, F\]"):
        gelu_backward_quantize(dy[:, :64].contiguous(), h)
    with pytest.raises(ValueError, match="prob must be contiguous fp32"):
        gelu_quantize(h, prob=torch.ones(8, device=device)[::2])
    with pytest.raises(ValueError, match="empty"):
        gelu_quantize(h[:0])
    with pytest.raises(ValueError, match="empty"):
        gelu_backward_quantize(dy[:0], h[:0])
    _, saved = gelu_quantize_saving(h)
    for module in (gelu_quantize_saving, reference.gelu_quantize_saving):
        with pytest.raises(TypeError, match="h is a ScaledTensor already; the form that saves h is for a bf16 h"):
            module(saved)
    tiles = reference.quantize(h, "tile")
    with pytest.raises(ValueError, match="h has tile scales; a saved h has one scale per row"):
        gelu_quantize(tiles)
    with pytest.raises(ValueError, match="h has tile scales"):
        gelu_backward_quantize(dy, tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 6144), (4096, 12288), (4096, 21504), (8192, 2112)], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES[:4])
def test_real_sizes(device, shape, granularity, fold):
    dy, h = inputs(*shape, device)
    prob = torch.rand(shape[0], device=device)
    for fmt in FORMATS.values():
        for p in (None, prob):
            y, dh = truth(dy, h, p)
            options = {"fold": fold, "prob": p}
            assert_quantized(gelu_quantize(h, granularity, fmt, **options), reference.gelu_quantize(h, granularity, fmt, **options), y)
            actual = gelu_backward_quantize(dy, h, granularity, fmt, **options)
            assert_quantized(actual.h, reference.gelu_backward_quantize(dy, h, granularity, fmt, **options).h, dh)
            q, saved = gelu_quantize_saving(h, granularity, fmt, **options)
            assert_bitwise(saved, reference.gelu_quantize_saving(h, granularity, fmt, **options)[1])
            assert_bitwise(q, gelu_quantize(h, granularity, fmt, **options), "the activation without saving")
            _, dh = truth(dy, reference.dequantize(saved), p)
            actual = gelu_backward_quantize(dy, saved, granularity, fmt, **options)
            assert_quantized(actual.h, reference.gelu_backward_quantize(dy, saved, granularity, fmt, **options).h, dh)
