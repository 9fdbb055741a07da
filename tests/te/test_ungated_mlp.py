"""The fused FFN without a gate under Megatron's protocol: what `nn.mlp` computes (tests/nn/test_mlp.py has its values), gradients where Megatron wants them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

from assertions import assert_bitwise  # noqa: E402

from fp8_recipes import from_name  # noqa: E402
from fp8_recipes.nn.mlp import fp8_mlp  # noqa: E402
from fp8_recipes.te.mlp import Options  # noqa: E402
from fp8_recipes.te.ungated_mlp import ungated_mlp  # noqa: E402

TOKENS, HIDDEN, FFN = 128, 128, 256
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS // 4, 4, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN), (TOKENS // 4, 4, HIDDEN))
    x, w1, w2, dy = (torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5 if i in (1, 2) else 1).bfloat16() for i, shape in enumerate(shapes))
    return [t.to(device) for t in (x, w1, w2, dy)]


def run(function, device, xielu, prepare=None, **options):
    x, w1, w2, dy = inputs(device)
    x.requires_grad_()
    w1, w2 = torch.nn.Parameter(w1), torch.nn.Parameter(w2)
    alpha = torch.tensor((0.8, 0.9), device=device, requires_grad=True) if xielu else None
    if prepare is not None:
        prepare(w1, w2)
    y = function(x, w1, w2, alpha, **options)
    y.backward(dy)
    return y.detach(), x.grad, w1, w2, None if alpha is None else alpha.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("xielu", [False, True], ids=["gelu", "xielu"])
@pytest.mark.parametrize("spec", ["moss", "row", "moss:grad=e5m2"])
def test_bits_of_the_plain_fused_ffn(device, xielu, spec):
    recipe = from_name(spec)
    y, dx, w1, w2, dalpha = run(fp8_mlp, device, xielu, recipe=recipe)
    found = run(lambda *a: ungated_mlp(*a, Options(recipe, 0.0)), device, xielu)
    for name, actual, expected in zip(("y", "dx"), found[:2], (y, dx), strict=True):
        assert_bitwise(actual, expected, name)
    assert_bitwise(found[2].grad, w1.grad, "dw1")
    assert_bitwise(found[3].grad, w2.grad, "dw2")
    assert (dalpha is None) == (not xielu)
    if xielu:
        assert_bitwise(found[4], dalpha, "dalpha")


@pytest.mark.gpu  # the gradient that autograd sees is a dummy of TransformerEngine's, on the GPU
def test_first_microbatch_overwrites_main_grad_and_the_next_adds():
    device = "cuda"
    recipe = from_name("moss")

    def prepare(*weights):
        for weight in weights:
            weight.main_grad = torch.full(weight.shape, 7.0, device=device)
            weight.grad_added_to_main_grad = False

    plain = run(fp8_mlp, device, False, recipe=recipe)
    for accumulate in (False, True):
        found = run(lambda *a, add=accumulate: ungated_mlp(*a, Options(recipe, 0.0, fuse_wgrad=True, accumulate=add)), device, False, prepare)
        for weight, reference in zip(found[2:4], plain[2:4], strict=True):
            assert weight.grad_added_to_main_grad
            torch.testing.assert_close(weight.main_grad - (7.0 if accumulate else 0.0), reference.grad.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("spec", "rows", "words"), [("moss_exact", FFN, "has no fold"), ("moss", 2 * FFN, r"must be \[F, H\]")])
def test_refusals(spec, rows, words):
    x, _, w2, _ = inputs("cpu")
    with pytest.raises(ValueError, match=words):
        ungated_mlp(x, torch.zeros(rows, HIDDEN).bfloat16(), w2, None, Options(from_name(spec), 0.0))
