"""The three products under recipe options that change what is multiplied."""

from __future__ import annotations

import weakref

import pytest
import torch
from assertions import snr_db

from fp8_recipes import from_name, ops
from fp8_recipes.nn import products
from fp8_recipes.weight_scaling import WeightScaling


def operands(seed=0, tokens=96, n=48, k=64):
    g = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, n, generator=g) * torch.randn(tokens, 1, generator=g).mul(4).exp2()  # rows over many binades, as gradients have
    return dy, torch.randn(tokens, k, generator=g)


@pytest.mark.parametrize("fold", ("column_block", "column", "tensor", "none"))
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


def same(a, b):
    """Are two payloads, their scales and what they say of themselves the same, to the bit?"""
    alike = a.granularity == b.granularity and torch.equal(a.payload.view(torch.uint8), b.payload.view(torch.uint8)) and torch.equal(a.scale, b.scale)
    rows = [q.scale.expand(q.shape[0]) if q.row_scale is None else q.row_scale for q in (a, b) if q.granularity == "tensor"]
    return alike and all(torch.equal(row, rows[0]) for row in rows)


def test_cached_row_payload_is_reused_until_the_operand_is_remade():
    recipe = from_name("row:weight_cache=row")
    w = torch.nn.Parameter(torch.randn(48, 64))
    operand = products.weight_operand(w, recipe, keep=True)
    first = operand.row()
    with torch.no_grad():
        w.mul_(2)
    assert operand.row() is first
    assert not torch.equal(ops.dequantize(products.weight_operand(w, recipe).row()), ops.dequantize(first))
    assert products.weight_operand(w, recipe).cached is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("spec", ["row", "row:weight=e5m2", "moss", "tile", "moss_exact"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (272, 400), (30, 50)], ids=str)
def test_transpose_of_the_kept_payload_is_the_transposed_cast(device, spec, shape):
    recipe = from_name(spec)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(torch.logspace(-6, 3, shape[0])[:, None]).bfloat16()
    w[3, 5], w[7, 7] = float("nan"), 0.0
    w = torch.nn.Parameter(w.to(device))
    kept, plain = products.weight_operand(w, recipe, keep=True), products.weight_operand(w, recipe)
    assert same(kept.row(), plain.row()) and kept.row() is kept.cached and plain.cached is None
    assert same(kept.transposed(), plain.transposed())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(22016, 4096), (4096, 11008)], ids=str)
def test_transpose_of_a_7bs_weight(shape):
    """The real sizes, and no byte more than the payload itself."""
    w = torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
    kept, plain = (products.weight_operand(w, from_name("row"), keep=keep) for keep in (True, False))
    kept.row()
    want = plain.transposed()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = kept.transposed()
    assert torch.cuda.max_memory_allocated() - before < w.numel() * 1.1
    assert same(got, want)


def tracked(interval=3):
    """(weight, optimizer, clock)."""
    w = torch.nn.Parameter(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.AdamW([w], lr=1e-2, betas=(0.9, 0.95))
    clock = WeightScaling(interval=interval, on_message=lambda _: None)
    clock.track(w)
    clock.attach(optimizer)
    return w, optimizer, clock


def step(w, optimizer):
    w.grad = torch.randn_like(w)
    optimizer.step()


def through_data(w, *_):
    """As Megatron's optimizer writes: no version counter moves."""
    before = w._version
    w.data = w.data  # keep memory and object
    torch.from_numpy(w.detach().numpy()).mul_(1.5)
    assert w._version == before


@pytest.mark.parametrize(
    ("spec", "change", "first"),
    [
        ("moss:weight_cache=ffn", lambda w, optimizer, clock: step(w, optimizer), False),
        ("moss:weight_cache=ffn", lambda w, optimizer, clock: (through_data(w), clock.advance(0.01)), False),
        ("moss:weight_cache=ffn", lambda w, optimizer, clock: (through_data(w), clock.reanchor()), False),
        ("moss:weight_cache=ffn", lambda w, optimizer, clock: through_data(w), True),
        ("row:weight_cache=row", lambda w, optimizer, clock: step(w, optimizer), False),
        ("row:weight_cache=row", lambda w, optimizer, clock: through_data(w), True),
        ("row:weight_cache=row", lambda w, optimizer, clock: setattr(w, "data", w.data * 2), False),
    ],
    ids=["step", "unseen-step", "reanchor", "unseen-first", "measured-step", "measured-first", "measured-memory"],
)
def test_a_changed_weight_is_cast_anew(spec, change, first):
    recipe, bare = from_name(spec), from_name(spec.partition(":")[0])
    w, optimizer, clock = tracked()
    kept = products.kept_operand(w, recipe, first=True)
    old = kept.row()
    for _ in range(3):  # later microbatches, and a recomputed one
        assert products.kept_operand(w, recipe, first=False).row() is old
    change(w, optimizer, clock)
    fresh = products.kept_operand(w, recipe, first=first)
    assert fresh is not kept
    plain = products.weight_operand(w, bare)
    assert same(fresh.row(), plain.row()) and same(fresh.transposed(), plain.transposed())
    assert not torch.equal(fresh.row().payload.view(torch.uint8), old.payload.view(torch.uint8)) or not torch.equal(fresh.row().scale, old.scale)


def test_kept_operands_follow_a_run_bit_for_bit():
    """Twelve steps of three microbatches, measured again every third step, a checkpoint loaded at the seventh."""
    recipe, bare = from_name("moss:weight_cache=ffn"), from_name("moss")
    w, optimizer, clock = tracked(interval=3)
    payloads = set()
    for i in range(12):
        if i == 6:
            with torch.no_grad():
                w.mul_(0.5)
            clock.reanchor()
        for microbatch in range(3):
            operand = products.kept_operand(w, recipe, first=microbatch == 0)
            plain = products.weight_operand(w, bare)
            assert same(operand.row(), plain.row()) and same(operand.transposed(), plain.transposed()), (i, microbatch)
            payloads.add(id(operand.row()))
        step(w, optimizer)
    assert clock.steps == 6 and len(payloads) <= 12


def test_alternating_optimizers_make_steps_of_their_own():
    """Two optimizers that step in turn are one step to the clock unless something was made of the weights in between; a kept payload is such a thing."""
    w, optimizer, clock = tracked()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-3, betas=(0.9, 0.95))
    clock.attach(other)
    recipe = from_name("moss:weight_cache=ffn")
    step(w, optimizer)
    kept = products.kept_operand(w, recipe, first=False)
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    assert products.kept_operand(w, recipe, first=False) is not kept


def test_the_old_payload_is_freed_before_the_new_one_is_made(monkeypatch):
    recipe = from_name("row:weight_cache=row")
    w = torch.nn.Parameter(torch.randn(48, 64))
    old = weakref.ref(products.kept_operand(w, recipe, first=True).row())
    seen = []
    monkeypatch.setattr(ops, "quantize_weight", lambda *a, _original=ops.quantize_weight, **k: (seen.append(old() is None), _original(*a, **k))[1])
    assert old() is not None
    products.kept_operand(w, recipe, first=True).row()
    assert seen == [True]


def test_another_recipe_makes_its_own_payload():
    w = torch.nn.Parameter(torch.randn(48, 64))
    for spec in ("row:weight_cache=ffn", "row:weight_cache=ffn,weight=e5m2"):
        recipe = from_name(spec)
        assert products.kept_operand(w, recipe, first=False).row().payload.dtype == recipe.weight_format.dtype
