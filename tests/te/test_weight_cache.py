"""FP8 weights kept over the microbatches of a step by the fused FFNs and by TransformerEngine's storages: the bits of casts made afresh, and no second copy."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

import pretend_gpu  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from fp8_recipes import from_name, ops  # noqa: E402
from fp8_recipes.te import mlp  # noqa: E402
from fp8_recipes.te.quantizers import FFN_WEIGHT, FP8Quantizer  # noqa: E402
from fp8_recipes.te.ungated_mlp import ungated_mlp  # noqa: E402
from fp8_recipes.weight_scaling import WeightScaling  # noqa: E402

HIDDEN, FFN, TOKENS, EPS = 128, 256, 64, 1e-5
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
gates = pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])


@pytest.fixture(autouse=True)
def norm_on_the_cpu(monkeypatch, request):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(mlp, "tex", SimpleNamespace(rmsnorm_bwd=pretend_gpu.rmsnorm_backward))


class FFNBlock(torch.nn.Module):
    """x + FFN(x) under the protocol of Megatron's modules: ``first`` as `megatron.mlp` tells it."""

    def __init__(self, gated, device, hidden=HIDDEN, ffn=FFN):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gamma = torch.nn.Parameter(torch.ones(hidden, dtype=torch.bfloat16, device=device)) if gated else None
        shapes = ((ffn * (1 + gated), hidden), (hidden, ffn))
        self.w1, self.w2 = (
            torch.nn.Parameter((torch.randn(s, generator=generator) * s[1] ** -0.5).bfloat16().to(device), requires_grad=True) for s in shapes
        )

    def forward(self, x, recipe, first=None):
        options = mlp.Options(recipe, EPS, first=first)
        if self.gamma is not None:
            return x + mlp.norm_swiglu_mlp(x, self.gamma, self.w1, self.w2, options)
        return x + ungated_mlp(x, self.w1, self.w2, None, options)


def batch(device, seed, hidden=HIDDEN, tokens=TOKENS):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def history(spec, gated, device, recompute):
    """Every output and gradient of 6 steps of 3 microbatches, with evaluation between steps and a checkpoint loaded after the fourth."""
    recipe, block = from_name(spec), FFNBlock(gated, device)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, betas=(0.9, 0.95))
    clock = WeightScaling(interval=2, on_message=lambda _: None)
    for w in (block.w1, block.w2):
        clock.track(w)
    clock.attach(optimizer)
    found, saved = [], None
    for step in range(6):
        for microbatch in range(3):
            x = batch(device, 10 * step + microbatch).requires_grad_()
            first = iter((microbatch == 0, False))  # the second forward pass of a recomputed microbatch is not the first
            y = checkpoint(lambda t: block(t, recipe, next(first)), x, use_reentrant=True) if recompute else block(x, recipe, next(first))  # noqa: B023
            y.square().sum().backward()
            found += [y.detach(), x.grad]
        found += [p.grad for p in block.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            found.append(block(batch(device, 99), recipe))  # evaluation
        if step == 1:
            saved = {name: value.clone() for name, value in block.state_dict().items()}
            clock.reanchor()
        if step == 3:
            block.load_state_dict(saved)
            clock.reanchor()
    return found


@devices
@gates
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("base", ["moss", "row"])
def test_training_has_the_bits_of_training_without_a_cache(device, gated, recompute, base, monkeypatch):
    want = history(base, gated, device, recompute)
    casts = []
    monkeypatch.setattr(ops, "quantize_weight", lambda *a, _cast=ops.quantize_weight, **k: (casts.append(k.get("transpose", False)), _cast(*a, **k))[1])
    got = history(f"{base}:weight_cache=ffn", gated, device, recompute)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(casts), "dgrad transposes the kept payload"
    assert len(casts) == 2 * 6 * 2, "two weights, cast once a step and once in each evaluation"


@devices
@gates
def test_a_kept_payload_is_there_once(device, gated):
    """Backward names it: what goes through save_for_backward has no payload of a weight, and two microbatches in flight share one."""
    recipe, block = from_name("row:weight_cache=ffn"), FFNBlock(gated, device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t)[1], lambda t: t):
        ys = [block(batch(device, i).requires_grad_(), recipe, i == 0) for i in range(2)]
    weights = {p.numel() for p in (block.w1, block.w2)}
    assert not [t for t in packed if t.element_size() == 1 and t.numel() in weights]
    gc.collect()
    kept = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.dtype == torch.float8_e4m3fn and o.numel() in weights]
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 2
    for y in ys:
        y.sum().backward()


@devices
@gates
def test_outside_a_step_nothing_is_read_or_left(device, gated):
    recipe, block = from_name("row:weight_cache=ffn"), FFNBlock(gated, device)
    x = batch(device, 0)
    with torch.no_grad():
        block(x, recipe, None)
        assert not hasattr(block.w1, "fp8_kept_operand")
        kept = block(x, recipe, True)
        for p in (block.w1, block.w2):
            p.data.mul_(0.5)  # in the same memory, and no version counter moves
        assert torch.equal(block(x, recipe, False), kept), "as the caller says: the same step"
        assert torch.equal(block(x, recipe, None), block(x, from_name("row"))) and not torch.equal(block(x, recipe, None), kept)
        assert torch.equal(block(x, recipe, True), block(x, from_name("row")))


@pytest.mark.parametrize(("value", "of_ffn", "kept"), [("none", True, False), ("ffn", False, False), ("ffn", True, True), ("row", False, True)])
def test_storages_keep_what_their_module_caches(value, of_ffn, kept):
    """The storage that TransformerEngine's module caches over microbatches keeps the payload; one made for a single pass does not."""
    recipe = from_name(f"row:weight_cache={value}")
    quantizer, w = FP8Quantizer(recipe, "weight"), torch.nn.Parameter(batch("cpu", 0))
    if of_ffn:
        setattr(w, FFN_WEIGHT, True)
    single = quantizer.quantize(w)
    single.operand.row()
    assert single.operand.cached is None
    quantizer.internal = False  # as TransformerEngine's quantize_weight does around the call for a cached storage
    storage = quantizer.quantize(w)
    first = storage.operand.row()
    tensors, saved = storage.prepare_for_saving()
    assert (storage.operand.cached is first) == kept and all(t.element_size() > 1 for t in tensors)
    saved.restore_from_saved(tensors)
    want = ops.quantize_weight(w.detach(), saved.operand.amax, transpose=True)
    assert torch.equal(saved.operand.transposed().payload.view(torch.uint8), want.payload.view(torch.uint8))
    with torch.no_grad():
        w.mul_(2)
    storage.quantize_(w)
    assert (storage.operand.row() is storage.operand.row()) == kept
    assert torch.equal(storage.dequantize(), ops.dequantize(quantizer.quantize(w).operand.row(), w.dtype))


@pytest.mark.gpu
@gates
def test_memory_is_one_byte_per_parameter(gated):
    """Resident: a byte per parameter and no more. Peak of a step: that byte above the peak without a cache, at most."""
    resident, peak, hidden, ffn = {}, {}, 1024, 4096
    FFNBlock(gated, "cuda", hidden, ffn)(batch("cuda", 0, hidden, 512).requires_grad_(), from_name("row")).sum().backward()  # the library's workspaces
    for value in ("none", "ffn"):
        recipe, block = from_name(f"row:weight_cache={value}"), FFNBlock(gated, "cuda", hidden, ffn)
        for w in (block.w1, block.w2):
            w.grad = torch.zeros_like(w)
        for step in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for microbatch in range(3):
                block(batch("cuda", microbatch, hidden, 512).requires_grad_(), recipe, microbatch == 0).sum().backward()
            resident[value] = torch.cuda.memory_allocated() - before if step == 0 else resident[value]
            peak[value] = torch.cuda.max_memory_allocated() - before + (resident[value] if step else 0)
    parameters = block.w1.numel() + block.w2.numel()
    slack = parameters // 4  # the allocator hands out somewhat larger blocks
    assert abs(resident["none"]) < slack and abs(resident["ffn"] - parameters) < slack
    assert peak["ffn"] <= peak["none"] + parameters + slack
