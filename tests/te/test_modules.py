"""Recipes in TransformerEngine modules: values of outputs and every gradient, and one test for each trap of the custom-recipe path."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytestmark = pytest.mark.gpu
RECIPES = ("moss", "row", "moss_exact", "tile", "moss:grad=e5m2", "moss:weight_cache=row", "row:wgrad_fold=tensor", "moss:wgrad_fold=none")
TOKENS, HIDDEN, FFN = 512, 512, 1024


@pytest.fixture(autouse=True)
def repeatable_attention(monkeypatch):
    """Two runs are compared bit for bit below; attention's backward pass is repeatable when TransformerEngine is asked for it before the layer is built."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


def snr(reference: torch.Tensor, value: torch.Tensor) -> float:
    reference, value = reference.double(), value.double()
    error = (reference - value).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(reference.square().sum().item() / error)


def run(module, x, dy, recipe=None, **kwargs):
    """Forward and backward; {name: tensor} of the output and every gradient."""
    import transformer_engine.pytorch as te

    from fp8_recipes.te import recipe as te_recipe

    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    with te.autocast(enabled=recipe is not None, recipe=te_recipe(recipe) if recipe else None):
        y = module(x, **kwargs)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def data(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


KINDS = ("Linear", "LayerNormLinear", "LayerNormMLP", "TransformerLayer")
FUSED = {"fuse_wgrad_accumulation": True}


def build(kind, bias=False, hidden=HIDDEN, ffn=FFN, **options):
    """A module of each kind, bf16, and the shapes of its input and output."""
    import transformer_engine.pytorch as te

    options = {"bias": bias, "params_dtype": torch.bfloat16, **options}
    if kind != "Linear":
        options["normalization"] = "RMSNorm"
    if kind in ("LayerNormMLP", "TransformerLayer"):
        options["activation"] = "swiglu"
    if kind == "TransformerLayer":
        options = {"hidden_dropout": 0, "attention_dropout": 0, "self_attn_mask_type": "causal", "fuse_qkv_params": True, **options}
        return te.TransformerLayer(hidden, ffn, 4, **options), (TOKENS // 2, 2, hidden), (TOKENS // 2, 2, hidden)
    return getattr(te, kind)(hidden, ffn, **options), (TOKENS, hidden), (TOKENS, hidden if kind == "LayerNormMLP" else ffn)


def check(got, want, floor_y, floor_grad):
    assert got.keys() == want.keys()
    for name, reference in want.items():
        level = snr(reference, got[name])
        assert level > (floor_y if name == "y" else floor_grad), f"{name}: {level:.1f} dB"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", (False, True))
def test_linear_matches_bf16(recipe, bias):
    import transformer_engine.pytorch as te

    module = te.Linear(HIDDEN, FFN, bias=bias, params_dtype=torch.bfloat16)
    x, dy = data(TOKENS, HIDDEN), data(TOKENS, FFN, scale=1e-4)
    check(run(module, x, dy, recipe), run(module, x, dy), 27, 22 if "e5m2" in recipe else 27)


@pytest.mark.parametrize("recipe", ("moss", "tile"))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_modules_match_bf16(recipe, bias, kind):
    module, x, dy = build(kind, bias)
    layer = kind == "TransformerLayer"
    x, dy = data(*x), data(*dy, scale=1 if layer else 1e-4)
    check(run(module, x, dy, recipe), run(module, x, dy), 20 if layer else 22, 13 if layer else 20)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_fused_wgrad_accumulation_writes_main_grad(kind, bias):
    """Upstream's custom_gemm drops `out` and `accumulate`: main_grad silently stays as it was."""
    torch.manual_seed(0)
    plain, x, dy = build(kind, bias)
    fused, _, _ = build(kind, bias, **FUSED)
    fused.load_state_dict(plain.state_dict())
    weights = {n: p for n, p in fused.named_parameters() if p.dim() == 2}
    start = {n: torch.randn_like(p, dtype=torch.float32) * 1e-3 for n, p in weights.items()}
    for n, p in weights.items():
        p.main_grad = start[n].clone()
    x, dy = data(*x), data(*dy, scale=1e-3)
    want = run(plain, x, dy, "moss")
    for _ in range(2):
        got = run(fused, x, dy, "moss")
    for n, p in weights.items():
        assert snr(2 * want[n].float(), p.main_grad - start[n]) > 40, n
    for n, p in fused.named_parameters():
        assert p.dim() == 2 or snr(want[n], got[n]) > 40, n  # biases and gains: of the last microbatch


@pytest.mark.parametrize("spec", ("moss", "moss:weight_cache=row"))
@pytest.mark.parametrize("kind", KINDS)
def test_weight_cache_over_microbatches(kind, spec):
    """A cached storage must survive being saved for backward: forward, forward, backward, backward, then a new step."""
    import transformer_engine.pytorch as te

    from fp8_recipes.te import recipe as te_recipe

    module, x_shape, dy_shape = build(kind)
    batches = [(data(*x_shape), data(*dy_shape)) for _ in range(2)]
    for _step in range(2):
        want = [run(module, x, dy, spec) for x, dy in batches]
        module.zero_grad(set_to_none=True)
        xs = [x.detach().clone().requires_grad_() for x, _ in batches]
        with te.autocast(recipe=te_recipe(spec)):
            ys = [module(x, is_first_microbatch=i == 0) for i, x in enumerate(xs)]
        for y, (_, dy) in zip(ys, batches, strict=True):
            y.backward(dy)
        for y, x, w in zip(ys, xs, want, strict=True):
            assert torch.equal(y, w["y"]) and torch.equal(x.grad, w["dx"])
        for n, p in module.named_parameters():
            assert snr(want[0][n].float() + want[1][n].float(), p.grad) > 40, n
        with torch.no_grad():
            for p in module.parameters():  # the next step sees other weights
                p.mul_(2).add_(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_recompute_is_bitwise(kind):
    import transformer_engine.pytorch as te

    from fp8_recipes.te import recipe as te_recipe

    module, x, dy = build(kind)
    x, dy = data(*x), data(*dy)
    want = run(module, x, dy, "moss")
    module.zero_grad(set_to_none=True)
    xr = x.detach().clone().requires_grad_()
    with te.autocast(recipe=te_recipe("moss")):
        y = te.checkpoint(module, xr)
    y.backward(dy)
    assert torch.equal(y, want["y"]) and torch.equal(xr.grad, want["dx"])
    for n, p in module.named_parameters():
        assert torch.equal(p.grad, want[n]), n


def test_quantizers_live_through_autocast_calls():
    import transformer_engine.pytorch as te

    module = te.Linear(HIDDEN, FFN, bias=False, params_dtype=torch.bfloat16)
    x, dy = data(TOKENS, HIDDEN), data(TOKENS, FFN)
    run(module, x, dy, "moss")
    first = module.quantizers["scaling_fwd"][0]
    run(module, x, dy, "moss")
    assert module.quantizers["scaling_fwd"][0] is first


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_recipe_is_in_the_checkpoint(tmp_path, kind):
    """Saved under moss, loaded under another recipe, under bf16, and back: same weights, same outputs."""
    module, x, dy = build(kind)
    x, dy = data(*x), data(*dy)
    want = run(module, x, dy, "moss")
    torch.save(module.state_dict(), tmp_path / "w.pt")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    extra = [v for name, v in state.items() if name.endswith("_extra_state")]
    assert extra and all(v is None or v.numel() == 0 for v in extra)
    for spec in ("row", None, "moss"):
        other, _, _ = build(kind)
        if spec:
            run(other, x, dy, spec)  # its quantizers exist before the load
        other.load_state_dict(copy.deepcopy(state))
        got = run(other, x, dy, spec)
        assert torch.equal(got["y"], want["y"]) if spec == "moss" else snr(want["y"], got["y"]) > 20


def test_saved_activation_is_one_byte_per_value():
    import transformer_engine.pytorch as te

    from fp8_recipes.te import recipe as te_recipe

    module = te.Linear(2048, 2048, bias=False, params_dtype=torch.bfloat16)
    x = data(8192, 2048).requires_grad_()

    def held(recipe):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with te.autocast(enabled=recipe is not None, recipe=te_recipe(recipe) if recipe else None):
            y = module(x * 1)
        grown = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        del y
        return grown

    held("moss"), held(None)
    assert held("moss") < 0.56 * held(None)


@pytest.mark.parametrize(("tokens", "features"), ((24, 512), (512, 520)))
def test_misaligned_dims_are_refused(tokens, features):
    import transformer_engine.pytorch as te

    module = te.Linear(features, FFN, bias=False, params_dtype=torch.bfloat16)
    with pytest.raises((ValueError, AssertionError), match="multiple|divisible"):
        run(module, data(tokens, features), data(tokens, FFN), "moss")


def test_automatic_scaling_predicts_and_covers():
    import transformer_engine.pytorch as te

    from fp8_recipes import te as fp8_te

    module = te.Linear(HIDDEN, HIDDEN, bias=False, params_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.95))
    scaling = fp8_te.automatic_scaling(module, optimizer, interval=5)
    x, dy = data(TOKENS, HIDDEN), data(TOKENS, HIDDEN)
    for step in range(12):
        run(module, x, dy, "moss")
        state = module.weight.fp8_predicted_scale
        amax, increment = state.amax_and_increment(module.weight)
        assert (amax + increment).item() >= module.weight.abs().max().item(), step
        assert scaling.steps - state.anchor_step < 5
        optimizer.step()
    assert scaling.steps == 12


@pytest.mark.parametrize("fused", (True, False))
def test_every_weight_of_a_layer_is_predicted(fused, monkeypatch, recwarn):
    """Separate weights of Q, K and V too, which TransformerEngine joins to a new tensor at every forward pass."""
    from fp8_recipes import te as fp8_te
    from fp8_recipes import weight_scaling

    measured = []
    monkeypatch.setattr(weight_scaling, "measure_amax", lambda w, group=None, _real=weight_scaling.measure_amax: (measured.append(w.shape), _real(w, group))[1])
    module, x, dy = build("TransformerLayer", fuse_qkv_params=fused)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95))
    fp8_te.automatic_scaling(module, optimizer, interval=5)
    x, dy = data(*x), data(*dy)
    for _ in range(3):
        run(module, x, dy, "moss")
        optimizer.step()
    assert sorted(measured) == sorted([(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)])
    assert not [w for w in recwarn.list if "automatic scaling" in str(w.message)]


def test_grouped_linear_is_refused_with_the_reason():
    import transformer_engine.pytorch as te

    from fp8_recipes import RecipeError
    from fp8_recipes.te import recipe as te_recipe

    module = te.GroupedLinear(2, HIDDEN, FFN, bias=False, params_dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match="GroupedLinear"), te.autocast(recipe=te_recipe("moss")):
        module(data(256, HIDDEN), [128, 128])


def test_no_tokens_are_refused_with_the_way_out():
    module, (_, *features), _ = build("Linear")
    with pytest.raises(ValueError, match="no tokens: .*Skip the layer"):
        run(module, data(0, *features), data(0, FFN), "moss")


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_in_one_token_stays_there(bad):
    import transformer_engine.pytorch as te

    module = te.Linear(HIDDEN, FFN, bias=False, params_dtype=torch.bfloat16)
    x, dy = data(TOKENS, HIDDEN), data(TOKENS, FFN)
    x[7, 3] = bad
    got = run(module, x, dy, "moss")
    bad = got["y"].isnan().any(dim=1)
    assert bad[7] and bad.sum() == 1
    assert got["weight"].isnan().any()
