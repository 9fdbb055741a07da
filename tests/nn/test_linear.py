"""Forward and every gradient of the FP8 linear layer against float64, on data that is easy and data that is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fp8_recipes import RECIPES, RecipeError, from_name
from fp8_recipes.nn import Linear, convert, fp8_linear
from fp8_recipes.nn.products import check_alignment
from fp8_recipes.tensor import ScaledTensor
from fp8_recipes.weight_scaling import ATTRIBUTE, WeightScaling

FP8 = [name for name, recipe in RECIPES.items() if recipe.quantize and not recipe.stock]
T, K, N = 192, 160, 96


def snr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to noise in dB."""
    error = (actual.detach().double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / error))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, dy: torch.Tensor, recipe: str) -> tuple[torch.Tensor, ...]:
    """(y, dx, dw, db) of one forward and backward."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    b = None if b is None else b.clone().requires_grad_()
    y = fp8_linear(x, w, b, recipe=from_name(recipe))
    y.backward(dy)
    assert x.grad is not None and w.grad is not None
    return (y.detach(), x.grad, w.grad) if b is None or b.grad is None else (y.detach(), x.grad, w.grad, b.grad)


def truth(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, dy = x.double(), w.double(), dy.double()
    return x @ w.t(), dy @ w, dy.t() @ x


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("grad", ["e4m3", "e5m2"])
def test_normal_data_every_recipe(name: str, grad: str) -> None:
    # Two E4M3 operands of normal data: 31.5 dB each, 28.5 dB together. E5M2 has one mantissa bit less: 6 dB less for what it touches.
    x, w, dy = normal(T, K, seed=0), normal(N, K, seed=1) * 0.02, normal(T, N, seed=2) * 1e-4
    y, dx, dw = run(x, w, None, dy, f"{name}:grad={grad}")
    expected = truth(x, w, dy)
    floor = 28.0 if grad == "e4m3" else 24.0
    assert snr(y, expected[0]) > 28.0
    assert snr(dx, expected[1]) > floor
    assert snr(dw, expected[2]) > floor


@pytest.mark.parametrize("name", FP8)
def test_outlier_channels(name: str) -> None:
    # Four channels 300 times larger. What the row fold costs the small channels shows in dw, whose columns are the channels.
    x, w, dy = normal(T, K, seed=3), normal(N, K, seed=4) * 0.02, normal(T, N, seed=5)
    x[:, ::40] *= 300
    y, dx, dw = run(x, w, None, dy, name)
    expected = truth(x, w, dy)
    assert snr(y, expected[0]) > 27.0
    assert snr(dx, expected[1]) > 28.0
    assert snr(dw, expected[2]) > 27.0
    small = torch.ones(K, dtype=torch.bool)
    small[::40] = False
    assert snr(dw[:, small], expected[2][:, small]) > 27.0


@pytest.mark.parametrize("name", FP8)
def test_rows_of_gradient_as_small_as_they_come(name: str) -> None:
    # A tensor scale would flush them; row scales keep dx of every row. (dw sums over rows, where they do not matter.)
    x, w, dy = normal(T, K, seed=6), normal(N, K, seed=7) * 0.02, normal(T, N, seed=8)
    dy[::3] *= 1e-9
    _, dx, dw = run(x, w, None, dy, name)
    expected = truth(x, w, dy)
    if name == "moss_exact":  # E8M0 under one FP32 global scale spans 2^-127 of it: still enough
        assert snr(dx, expected[1]) > 28.0
    assert snr(dx[::3], expected[1][::3]) > 28.0
    assert snr(dw, expected[2]) > 27.0


@pytest.mark.parametrize("name", FP8)
def test_nan_in_one_token(name: str) -> None:
    x, w, dy = normal(T, K, seed=9), normal(N, K, seed=10), normal(T, N, seed=11)
    clean = run(x, w, None, dy, name)
    x[5, 7] = math.nan
    y, dx, dw = run(x, w, None, dy, name)
    assert torch.isnan(y[5]).all()
    others = torch.arange(T) != 5
    if name == "moss_exact":  # its global scale may move when the NaN hides the tensor's maximum; it does not here
        assert torch.isfinite(y[others]).all()
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(dx, clean[1])
    assert torch.isnan(dw[:, 7]).all()
    assert torch.isfinite(dw[:, torch.arange(K) != 7]).all()


def test_infinite_gradient_is_visible() -> None:
    x, w, dy = normal(T, K, seed=12), normal(N, K, seed=13), normal(T, N, seed=14)
    dy[3, 4] = math.inf
    _, dx, dw = run(x, w, None, dy, "moss")
    assert torch.isnan(dx[3]).all() and torch.isfinite(dx[torch.arange(T) != 3]).all()
    assert torch.isnan(dw[4]).all() and torch.isfinite(dw[torch.arange(N) != 4]).all()


@pytest.mark.parametrize("name", FP8)
def test_bias_and_leading_dimensions(name: str) -> None:
    x, w, b, dy = normal(3, 64, K, seed=15), normal(N, K, seed=16), normal(N, seed=17) * 100, normal(3, 64, N, seed=18)
    y, dx, dw, db = run(x, w, b, dy, name)
    flat = run(x.view(-1, K), w, None, dy.view(-1, N), name)
    assert y.shape == (3, 64, N) and dx.shape == x.shape
    torch.testing.assert_close(y.view(-1, N), flat[0] + b, rtol=1e-5, atol=1e-4)
    assert torch.equal(dx.view(-1, K), flat[1]) and torch.equal(dw, flat[2])
    torch.testing.assert_close(db, dy.sum((0, 1)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["moss", "moss_exact", "tile"])
def test_bf16_model(name: str) -> None:
    x, w, b, dy = (t.bfloat16() for t in (normal(T, K, seed=19), normal(N, K, seed=20), normal(N, seed=21), normal(T, N, seed=22)))
    results = run(x, w, b, dy, name)
    assert all(r.dtype == torch.bfloat16 for r in results)
    expected = truth(x, w, dy)
    assert min(snr(results[0] - b, expected[0]), snr(results[1], expected[1]), snr(results[2], expected[2])) > 27.5


def test_quantize_off_is_plain_torch() -> None:
    x, w, b, dy = normal(T, K, seed=23), normal(N, K, seed=24), normal(N, seed=25), normal(T, N, seed=26)
    y, dx, dw, db = run(x, w, b, dy, "bf16")
    xr, wr, br = (t.clone().requires_grad_() for t in (x, w, b))
    expected = torch.nn.functional.linear(xr, wr, br)
    expected.backward(dy)
    for actual, reference in ((y, expected), (dx, xr.grad), (dw, wr.grad), (db, br.grad)):
        assert reference is not None and torch.equal(actual, reference)


@pytest.mark.parametrize("name", ["moss", "tile", "moss_exact"])
def test_gradient_accumulation_and_main_grad(name: str) -> None:
    w = normal(N, K, seed=27)
    batches = [(normal(T, K, seed=30 + i), normal(T, N, seed=40 + i)) for i in range(3)]
    accumulated, fused = w.clone().requires_grad_(), w.clone().requires_grad_()
    fused.main_grad = torch.zeros(N, K)  # type: ignore[attr-defined]
    for x, dy in batches:
        fp8_linear(x, accumulated, recipe=from_name(name)).backward(dy)
        fp8_linear(x, fused, recipe=from_name(name)).backward(dy)
    assert fused.grad is None and accumulated.grad is not None
    torch.testing.assert_close(fused.main_grad, accumulated.grad, rtol=1e-5, atol=1e-4)  # type: ignore[attr-defined]
    assert snr(accumulated.grad, sum((dy.double().t() @ x.double() for x, dy in batches), torch.zeros(()))) > 28.0


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("main_grad", [False, True])
def test_activation_checkpoint_changes_no_bit(name: str, main_grad: bool) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = Linear(K, N, recipe=name)
        scaling = WeightScaling(interval=10)
        scaling.track(layer.weight)
        if main_grad:
            layer.weight.main_grad = torch.zeros(N, K)  # type: ignore[assignment]
        x = normal(T, K, seed=50).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.backward(normal(T, N, seed=51))
        weight_grad = layer.weight.main_grad if main_grad else layer.weight.grad
        return [y.detach(), x.grad, weight_grad, layer.bias.grad]  # type: ignore[list-item]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", ["bf16", *FP8])
def test_no_tokens(name: str) -> None:
    layer = Linear(K, N, recipe=name)
    x = torch.zeros(2, 0, K, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, N)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert layer.weight.grad is not None and not layer.weight.grad.any()
    assert layer.bias.grad is not None and not layer.bias.grad.any()


def test_saved_memory_is_one_byte_per_value_and_scales() -> None:
    saved: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    x, w = normal(T, K, seed=60).requires_grad_(), normal(N, K, seed=61).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fp8_linear(x, w, recipe=from_name("moss"))
    new = [t for t in saved if t.data_ptr() != w.data_ptr()]
    nbytes = sum(t.numel() * t.element_size() for t in new)
    assert nbytes == T * K + 4 * T + math.ceil(K / 128) * T  # payload, row scales, tile exponents


def test_backward_uses_the_scale_of_the_forward() -> None:
    # The clock moves on between forward and backward (a pipeline's delayed backward): dgrad still sees the forward's increment.
    w = normal(N, K, seed=62).requires_grad_()
    scaling = WeightScaling(interval=1000, attached=True)
    predicted = scaling.track(w)  # type: ignore[arg-type]
    seen: list[ScaledTensor] = []
    x = normal(T, K, seed=63).requires_grad_()
    y = fp8_linear(x, w, recipe=from_name("moss"), observer=lambda role, t, q: seen.append(q) if role == "weight" else None)
    before = fp8_linear(x.detach().requires_grad_(), w, recipe=from_name("moss"))
    scaling.advance(1e6)  # the next forward's scale is far coarser
    dy = normal(T, N, seed=64)
    y.backward(dy)
    later = fp8_linear(x.detach(), w, recipe=from_name("moss"))
    assert torch.equal(y, before) and not torch.equal(y, later)
    assert snr(x.grad, dy.double() @ w.detach().double()) > 28.0  # type: ignore[arg-type]
    assert predicted.anchor_step == 0 and len(seen) == 1


def test_predicted_scale_is_used_and_measured_once() -> None:
    layer = Linear(K, N, recipe="moss")
    scaling = WeightScaling(interval=3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, betas=(0.9, 0.95))
    scaling.attach(optimizer)
    state = scaling.track(layer.weight)
    anchors = []
    for i in range(6):
        layer(normal(T, K, seed=70 + i)).square().mean().backward()
        anchors.append(state.anchor_step)
        amax, increment = state.amax_and_increment(layer.weight)
        assert layer.weight.detach().abs().max() <= amax + increment
        optimizer.step()
        optimizer.zero_grad()
    assert anchors == [0, 0, 0, 3, 3, 3]


def test_weight_changed_between_forward_and_backward_is_refused() -> None:
    layer = Linear(K, N, recipe="moss")
    y = layer(normal(T, K, seed=83))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_that_need_no_gradient() -> None:
    x, w = normal(T, K, seed=80), normal(N, K, seed=81)
    frozen = w.clone().requires_grad_(False)
    trainable = x.clone().requires_grad_()
    fp8_linear(trainable, frozen, recipe=from_name("moss")).sum().backward()  # sum's gradient is expanded, not contiguous
    assert trainable.grad is not None and frozen.grad is None
    weight = w.clone().requires_grad_()
    fp8_linear(x, weight, recipe=from_name("moss")).sum().backward()
    assert weight.grad is not None and x.grad is None
    assert not fp8_linear(x, frozen, recipe=from_name("moss")).requires_grad


def test_autocast_and_second_derivative() -> None:
    layer = Linear(K, N, recipe="moss")
    x = normal(T, K, seed=82).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_strided_input_gives_what_a_contiguous_one_gives() -> None:
    w = torch.randn(32, 64)
    wide = torch.randn(2, 8, 128)
    for x in (wide[..., ::2], torch.randn(64, 2, 8).permute(1, 2, 0), torch.randn(2, 1, 64).expand(2, 8, 64)):
        assert torch.equal(fp8_linear(x, w, recipe=from_name("row")), fp8_linear(x.contiguous(), w, recipe=from_name("row")))


def test_convert_keeps_parameters_and_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(48, 32, bias=False)), torch.nn.Linear(32, 7))
    parameters = dict(model.named_parameters())
    scaling = WeightScaling()
    assert convert(model, "moss", skip=lambda name, m: m.out_features % 16 != 0, scaling=scaling) is model
    assert [type(m) is Linear for m in (model[0], model[2][0], model[3])] == [True, True, False]  # type: ignore[index]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert hasattr(model[0].weight, ATTRIBUTE) and not hasattr(model[3].weight, ATTRIBUTE)
    assert "recipe=moss" in repr(model) and "not tracked" not in repr(model)
    assert "not tracked" in repr(Linear(16, 16, recipe="moss"))
    assert isinstance(convert(torch.nn.Linear(16, 16), "row"), Linear)


@pytest.mark.parametrize("extent", ["tokens", "in_features", "out_features"])
def test_alignment_error_names_value_and_remedy(extent: str) -> None:
    extents = {"tokens": 32, "in_features": 48, "out_features": 64}
    check_alignment(torch.device("cuda"), **extents)
    extents[extent] = 40
    check_alignment(torch.device("cpu"), **extents)
    with pytest.raises(ValueError, match=f"{extent} to be a multiple of 16, got 40; pad it"):
        check_alignment(torch.device("cuda"), **extents)


def test_bad_input_is_named() -> None:
    recipe, w = from_name("moss"), torch.ones(32, 64)
    with pytest.raises(ValueError, match=r"\(4, 32\).*in_features 64"):
        fp8_linear(torch.ones(4, 32), w, recipe=recipe)
    with pytest.raises(ValueError, match=r"\(32,\), got \(31,\)"):
        fp8_linear(torch.ones(4, 64), w, torch.ones(31), recipe=recipe)
    with pytest.raises(ValueError, match=r"2-D .*\(64,\)"):
        fp8_linear(torch.ones(4, 64), torch.ones(64), recipe=recipe)
    with pytest.raises(TypeError, match="float64.*cast"):
        fp8_linear(torch.ones(4, 64, dtype=torch.float64), w, recipe=recipe)
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu"):
        fp8_linear(torch.ones(4, 64, device="meta"), w, recipe=recipe)
    with pytest.raises(ValueError, match="the bias is on meta and the weight on cpu"):
        fp8_linear(torch.ones(4, 64), w, torch.ones(32, device="meta"), recipe=recipe)
    with pytest.raises(TypeError, match="bias must be .*float64.*cast"):
        fp8_linear(torch.ones(4, 64), w, torch.ones(32, dtype=torch.float64), recipe=recipe)
    for value in ("ffn", "row"):
        with pytest.raises(RecipeError, match=f"weight_cache={value}.*weight_cache=none"):
            fp8_linear(torch.ones(4, 64), w, recipe=from_name(f"moss:weight_cache={value}"))
    with pytest.raises(ValueError, match="no torch.nn.Linear"):
        convert(torch.nn.ReLU(), "moss")
    for name in ("fog", "moss:attention=fp8", "moss:weight_cache=row"):  # at once, not at the first forward pass
        with pytest.raises(RecipeError, match="TransformerEngine's and Megatron's to run|weight_cache=row needs"):
            convert(torch.nn.Linear(16, 16), name)
    with pytest.raises(RecipeError, match="did you mean moss"):
        Linear(16, 16, recipe="mos")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("shape", [(256, 384, 512), (T, K, N)])
def test_gpu_forward_and_gradients(name: str, shape: tuple[int, int, int]) -> None:
    t, k, n = shape
    x, w, b, dy = (v.cuda().bfloat16() for v in (normal(t, k, seed=90), normal(n, k, seed=91), normal(n, seed=92), normal(t, n, seed=93)))
    y, dx, dw, db = run(x, w, b, dy, name)
    expected = truth(x, w, dy)
    assert min(snr(y, expected[0] + b), snr(dx, expected[1]), snr(dw, expected[2])) > 27.5
    torch.testing.assert_close(db.float(), dy.float().sum(0), rtol=1e-2, atol=1e-1)
    weight = w.clone().requires_grad_()
    weight.main_grad = torch.zeros(n, k, device="cuda")  # type: ignore[attr-defined]
    for _ in range(2):
        fp8_linear(x, weight, recipe=from_name(name)).backward(dy)
    assert weight.grad is None and snr(weight.main_grad, 2 * expected[2]) > 27.5  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_gpu_refuses_unaligned_extents_before_any_kernel() -> None:
    w = torch.ones(32, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="tokens to be a multiple of 16, got 40"):
        fp8_linear(torch.ones(2, 20, 64, device="cuda", dtype=torch.bfloat16), w, recipe=from_name("moss"))


def test_head_of_a_recipe_has_no_say() -> None:
    """It is about Megatron's output layer; here a layer is what its caller makes it. Each layer below has the bits of the other."""
    x, dy = torch.randn(16, K), torch.randn(16, N)
    layers = [Linear(K, N, recipe=name) for name in ("moss", "moss:head=bf16")]
    layers[1].load_state_dict(layers[0].state_dict())
    outputs = [layer(x) for layer in layers]
    for y in outputs:
        y.backward(dy)
    assert torch.equal(*outputs) and torch.equal(*(layer.weight.grad for layer in layers))


@pytest.mark.parametrize("name", ["fog", "moss:attention=fp8"])
def test_what_only_transformer_engine_can_run_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"TransformerEngine's and Megatron's to run; in plain torch use .* moss"):
        Linear(K, N, recipe=name)(torch.zeros(16, K))
