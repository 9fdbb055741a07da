"""The three products under recipe options that change what is multiplied."""

from __future__ import annotations

import pytest
import torch
from assertions import snr_db

from fp8_recipes import from_name, ops
from fp8_recipes.nn import products


def operands(seed=0, tokens=96, n=48, k=64):
    g = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, n, generator=g) * torch.randn(tokens, 1, generator=g).mul(4).exp2()  # rows over many binades, as gradients have
    return dy, torch.randn(tokens, k, generator=g)


@pytest.mark.parametrize("fold", ("column_block", "tensor", "none"))
def test_wgrad_folds_agree_with_the_payloads(fold):
    recipe = from_name(f"moss:wgrad_fold={fold}")
    dy, x = operands()
    dyq, xq = products.quantize_grad(dy, recipe), products.quantize_activation(x, recipe)
    want = ops.dequantize(dyq).double().t() @ ops.dequantize(xq).double()
    got = products.wgrad(dyq, xq, recipe, out_dtype=torch.float32)
    assert snr_db(want, got) > (100 if fold == "none" else 40)


def test_unfolded_wgrad_accumulates_into_out():
    recipe = from_name("moss:wgrad_fold=none")
    dy, x = operands(1)
    dyq, xq = products.quantize_grad(dy, recipe), products.quantize_activation(x, recipe)
    start = torch.randn(dy.shape[1], x.shape[1])
    out = start.clone()
    dw = products.wgrad(dyq, xq, recipe, out_dtype=torch.float32)
    products.wgrad(dyq, xq, recipe, out=out, accumulate=True)
    assert torch.allclose(out, start + dw, rtol=1e-5, atol=1e-5)
    products.wgrad(dyq, xq, recipe, out=out, accumulate=False)
    assert torch.equal(out, dw)


def test_weight_operand_has_one_scale_for_fprop_and_dgrad():
    recipe = from_name("row")
    w = torch.nn.Parameter(torch.randn(48, 64))
    operand = products.weight_operand(w, recipe)
    row, transposed = operand.row(), operand.transposed()
    assert torch.equal(row.scale, transposed.scale)
    assert torch.equal(row.payload.view(torch.uint8).t(), transposed.payload.view(torch.uint8))


def test_cached_row_payload_is_reused_until_the_operand_is_remade():
    recipe = from_name("row:weight_cache=row")
    w = torch.nn.Parameter(torch.randn(48, 64))
    operand = products.weight_operand(w, recipe)
    first = operand.row()
    with torch.no_grad():
        w.mul_(2)
    assert operand.row() is first
    assert not torch.equal(ops.dequantize(products.weight_operand(w, recipe).row()), ops.dequantize(first))
