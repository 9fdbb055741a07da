"""swiglu_quantize and its backward: the reference, up to the last place of exp."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, assert_quantized

from fp8_recipes import reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.kernels import rows, swiglu_backward_quantize, swiglu_quantize, swiglu_quantize_saving
from fp8_recipes.tensor import ScaledTensor

MODES = [("row", None), ("tile", None), ("micro", None), ("micro", "row"), ("tile", "row"), ("tensor", None), ("block", None)]
SHAPES = [(2, 128), (3, 832), (2, 100), (2, 96)]  # rows, F


def inputs(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(rows * cols)
    h = 3 * torch.randn(rows, 2 * cols, generator=gen)
    dy = torch.randn(rows, cols, generator=gen) * torch.exp(torch.randn(rows, 1, generator=gen) * 2)
    h[0, 0], h[0, 1] = 80.0, -120.0  # sigmoid saturates at either end
    return dy.bfloat16().to(device), h.bfloat16().to(device)


def truth(dy: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, [dgate | dup]) by autograd in fp64."""
    x = h.double().requires_grad_()
    gate, up = x.chunk(2, dim=1)
    y = torch.nn.functional.silu(gate) * up
    (grad,) = torch.autograd.grad(y, x, dy.double())
    return y.detach(), grad


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(device, shape, granularity, fold, fmt):
    dy, h = inputs(*shape, device)
    y, grad = truth(dy, h)
    assert_quantized(swiglu_quantize(h, granularity, fmt, fold=fold), reference.swiglu_quantize(h, granularity, fmt, fold=fold), y)
    actual = swiglu_backward_quantize(dy, h, granularity, fmt, fold=fold)
    assert_quantized(actual, reference.swiglu_backward_quantize(dy, h, granularity, fmt, fold=fold), grad)


def assert_prob_gradient(actual: torch.Tensor, dy: torch.Tensor, h: torch.Tensor) -> None:
    """The sum over F in fp32: a few roundings of the sum of magnitudes."""
    terms = dy.double() * truth(dy, h)[0]
    assert actual.dtype == torch.float32
    error = (actual.double() - terms.sum(1)).abs()
    assert (error <= 64 * 2.0**-24 * terms.abs().sum(1)).all(), f"largest error {error.max().item():.3e}"


@pytest.mark.parametrize(("granularity", "fold"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prob(device, shape, granularity, fold):
    dy, h = inputs(*shape, device)
    prob = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    h[1], dy[1], prob[1] = 0, 0, 0  # a padding row
    h[0, 0] = 9.0
    exact = reference_values(dy, h, prob)
    y, grad = swiglu_quantize(h, granularity, fold=fold, prob=prob), swiglu_backward_quantize(dy, h, granularity, fold=fold, prob=prob)
    assert_quantized(y, reference.swiglu_quantize(h, granularity, fold=fold, prob=prob), exact[0])
    assert_quantized(grad[0], reference.swiglu_backward_quantize(dy, h, granularity, fold=fold, prob=prob)[0], exact[1])
    assert_prob_gradient(grad[1], dy, h)
    assert grad[1][1] == 0
    assert not y.payload[1].view(torch.uint8).any() and not grad[0].payload[1].view(torch.uint8).any()
    assert torch.equal(swiglu_backward_quantize(dy, h, granularity, fold=fold, prob=prob)[1], grad[1])


def reference_values(dy: torch.Tensor, h: torch.Tensor, prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`truth` with y times prob."""
    y, grad = truth(dy, h)
    return y * prob.double()[:, None], grad * prob.double()[:, None]


def test_prob_of_one_changes_nothing(device):
    dy, h = inputs(4, 256, device)
    ones = torch.ones(4, device=device)
    assert_bitwise(swiglu_quantize(h, "micro", fold="row", prob=ones), swiglu_quantize(h, "micro", fold="row"))
    assert_bitwise(swiglu_backward_quantize(dy, h, "micro", fold="row", prob=ones)[0], swiglu_backward_quantize(dy, h, "micro", fold="row"))


SAVED = [(shape, "row", None, FORMATS["e4m3"]) for shape in SHAPES]
SAVED += [((3, 832), "row", None, FORMATS["e5m2"]), ((5, 128), "micro", "row", FORMATS["e5m2"]), ((5, 128), "tile", None, FORMATS["e4m3"])]
SAVED += [((4, 100), "micro", "row", FORMATS["e4m3"]), ((5, 128), "tensor", None, FORMATS["e4m3"])]


@pytest.mark.parametrize(("shape", "granularity", "fold", "fmt"), SAVED, ids=str)
def test_saved_h(device, shape, granularity, fold, fmt):
    """The same read also gives h in FP8, bit for bit; what is computed from that is the reference's result of the same bytes."""
    dy, h = inputs(*shape, device)
    prob = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    q, saved = swiglu_quantize_saving(h, granularity, fmt, fold=fold, prob=prob)
    expected_q, expected = reference.swiglu_quantize_saving(h, granularity, fmt, fold=fold, prob=prob)
    assert_bitwise(saved, expected)
    assert_bitwise(q, swiglu_quantize(h, granularity, fmt, fold=fold, prob=prob), "the product without saving")
    assert_quantized(q, expected_q, reference_values(dy, h, prob)[0])
    exact = reference_values(dy, reference.dequantize(saved), prob)
    again = swiglu_quantize(saved, granularity, fmt, fold=fold, prob=prob)
    assert_quantized(again, reference.swiglu_quantize(saved, granularity, fmt, fold=fold, prob=prob), exact[0])
    grad, dprob = swiglu_backward_quantize(dy, saved, granularity, fmt, fold=fold, prob=prob)
    assert_quantized(grad, reference.swiglu_backward_quantize(dy, saved, granularity, fmt, fold=fold, prob=prob)[0], exact[1])
    assert_prob_gradient(dprob, dy, reference.dequantize(saved))
    assert_quantized(swiglu_backward_quantize(dy, saved), reference.swiglu_backward_quantize(dy, saved), truth(dy, reference.dequantize(saved))[1])


def test_saved_h_of_padding_zero_and_bad_rows(device):
    dy, h = inputs(5, 256, device)
    h[1] = 0
    h[2, 7], h[2, 256 + 9], h[3, 256] = torch.nan, torch.inf, -torch.inf
    prob = torch.ones(5, device=device)
    dy[1], prob[1] = 0, 0
    q, saved = swiglu_quantize_saving(h, prob=prob)
    assert_bitwise(saved, reference.swiglu_quantize_saving(h)[1])
    assert not saved.payload[1].view(torch.uint8).any() and saved.scale[1] == 2.0**-126
    assert reference.dequantize(saved).isnan().nonzero().tolist() == [[2, 7], [2, 265], [3, 256]], "what is not finite is NaN, alone"
    assert reference.dequantize(q).isnan().nonzero().tolist() == [[2, 7], [2, 9], [3, 0]]
    grad, dprob = swiglu_backward_quantize(dy, saved, prob=prob)
    assert reference.dequantize(grad).isnan().nonzero().tolist() == [[2, 7], [2, 9], [2, 263], [3, 0]], "dup does not read up"
    assert dprob.isnan().tolist() == [False, False, True, True, False] and dprob[1] == 0
    assert not grad.payload[1].view(torch.uint8).any()


def test_formats_of_saved_h_and_of_the_gradient_differ(device):
    dy, h = inputs(4, 128, device)
    saved = swiglu_quantize_saving(h, fmt=FORMATS["e5m2"])[1]
    assert_quantized(swiglu_backward_quantize(dy, saved), reference.swiglu_backward_quantize(dy, saved), truth(dy, reference.dequantize(saved))[1])
    saved.payload.view(torch.uint8)[1, 3] = 0x7C  # Inf of E5M2
    assert reference.dequantize(swiglu_backward_quantize(dy, saved)).isnan().nonzero().tolist() == [[1, 3], [1, 131]]


def test_rows_too_wide_for_registers(device, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 256)
    dy, h = inputs(3, 384, device)
    y, grad = truth(dy, h)
    assert_quantized(swiglu_quantize(h, "micro", fold="row"), reference.swiglu_quantize(h, "micro", fold="row"), y)
    assert_quantized(swiglu_backward_quantize(dy, h), reference.swiglu_backward_quantize(dy, h), grad)
    q, saved = swiglu_quantize_saving(h)
    assert_bitwise(saved, reference.swiglu_quantize_saving(h)[1])
    assert_quantized(q, reference.swiglu_quantize(h), y)
    assert_quantized(swiglu_backward_quantize(dy, saved), reference.swiglu_backward_quantize(dy, saved), truth(dy, reference.dequantize(saved))[1])


def test_bad_elements_stay_alone(device):
    dy, h = inputs(4, 256, device)
    h[1, 7], h[2, 256 + 9], dy[3] = float("nan"), float("inf"), 0.0
    y = reference.dequantize(swiglu_quantize(h, "micro", fold="row"))
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 7] = expected[2, 9] = True
    assert torch.equal(y.isnan(), expected)
    grad = reference.dequantize(swiglu_backward_quantize(dy, h, "micro", fold="row"))
    expected = torch.zeros_like(grad, dtype=torch.bool)
    expected[1, 7] = expected[1, 256 + 7] = expected[2, 9] = True
    assert torch.equal(grad.isnan(), expected)
    assert (grad[3] == 0).all()


def test_bad_input(device):
    dy, h = inputs(4, 128, device)
    for operation in (swiglu_quantize, swiglu_quantize_saving):
        with pytest.raises(ValueError, match="odd width 255"):
            operation(h[:, :255].contiguous())
    with pytest.raises(ValueError, match="2F"):
        swiglu_backward_quantize(dy, h[:, :128].contiguous())
    with pytest.raises(ValueError, match="prob must be contiguous fp32"):
        swiglu_quantize(h, prob=torch.ones(8, device=device)[::2])
    with pytest.raises(ValueError, match="prob must be contiguous fp32"):
        swiglu_backward_quantize(dy, h, prob=torch.ones(3, device=device))
    saved = swiglu_quantize_saving(h)[1]
    with pytest.raises(TypeError, match="h is a ScaledTensor already; the form that saves h is for a bf16 h"):
        swiglu_quantize_saving(saved)
    with pytest.raises(ValueError, match="h has tile scales; a saved h has one scale per row"):
        swiglu_backward_quantize(dy, reference.quantize(h, "tile"))
    with pytest.raises(ValueError, match="h.payload of strides .* is not contiguous"):
        swiglu_quantize(ScaledTensor(saved.payload.t().contiguous().t(), saved.scale, "row"))
    with pytest.raises(ValueError, match="2F"):
        swiglu_backward_quantize(dy[:2], saved)
    with pytest.raises(ValueError, match="empty"):
        swiglu_quantize(h[:0])
    with pytest.raises(ValueError, match="empty"):
        swiglu_backward_quantize(dy[:0], h[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4096, 11008), (1024, 14336), (1024, 2816)], ids=str)
@pytest.mark.parametrize(("granularity", "fold"), MODES[:4])
def test_real_sizes(device, shape, granularity, fold):
    dy, h = inputs(*shape, device)
    y, grad = truth(dy, h)
    for fmt in FORMATS.values():
        assert_quantized(swiglu_quantize(h, granularity, fmt, fold=fold), reference.swiglu_quantize(h, granularity, fmt, fold=fold), y)
        actual = swiglu_backward_quantize(dy, h, granularity, fmt, fold=fold)
        assert_quantized(actual, reference.swiglu_backward_quantize(dy, h, granularity, fmt, fold=fold), grad)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 1408), (4096, 2048), (8192, 768), (1024, 11008)], ids=str)
def test_prob_real_sizes(device, shape):
    dy, h = inputs(*shape, device)
    prob = torch.rand(shape[0], device=device)
    y, grad = reference_values(dy, h, prob)
    for granularity, fold in MODES[:4]:
        assert_quantized(swiglu_quantize(h, granularity, fold=fold, prob=prob), reference.swiglu_quantize(h, granularity, fold=fold, prob=prob), y)
        actual, dprob = swiglu_backward_quantize(dy, h, granularity, fold=fold, prob=prob)
        assert_quantized(actual, reference.swiglu_backward_quantize(dy, h, granularity, fold=fold, prob=prob)[0], grad)
        assert_prob_gradient(dprob, dy, h)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 1408), (4096, 2048), (8192, 768), (1024, 7168), (1024, 11008)], ids=str)
def test_saved_h_real_sizes(device, shape):
    dy, h = inputs(*shape, device)
    prob = torch.rand(shape[0], device=device)
    for fmt in FORMATS.values():
        q, saved = swiglu_quantize_saving(h, "row", fmt, prob=prob)
        assert_bitwise(saved, reference.swiglu_quantize_saving(h, "row", fmt)[1])
        assert_quantized(q, reference.swiglu_quantize(h, "row", fmt, prob=prob), reference_values(dy, h, prob)[0])
        exact = reference_values(dy, reference.dequantize(saved), prob)
        for granularity, fold in MODES[:4]:
            q = swiglu_quantize(saved, granularity, fold=fold, prob=prob)
            assert_quantized(q, reference.swiglu_quantize(saved, granularity, fold=fold, prob=prob), exact[0])
            actual, dprob = swiglu_backward_quantize(dy, saved, granularity, fold=fold, prob=prob)
            assert_quantized(actual, reference.swiglu_backward_quantize(dy, saved, granularity, fold=fold, prob=prob)[0], exact[1])
            assert_prob_gradient(dprob, dy, reference.dequantize(saved))
