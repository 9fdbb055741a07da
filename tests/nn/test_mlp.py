"""The fused FFN: bit for bit its separate layers in fp32, every gradient against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from assertions import nodes_behind
from torch.utils.checkpoint import checkpoint

from fp8_recipes import RecipeError, from_name
from fp8_recipes.architecture import ARCHITECTURES
from fp8_recipes.monitor import Monitor
from fp8_recipes.nn import Linear, convert, fp8_linear
from fp8_recipes.nn.fog import XIELU
from fp8_recipes.nn.gpt import GPT, GPTConfig, is_high_precision
from fp8_recipes.nn.mlp import can_fuse, fp8_mlp
from fp8_recipes.weight_scaling import WeightScaling

T, H, F = 96, 64, 96
RECIPES = ["moss", "row", "moss:grad=e5m2", "row:activation_granularity=tile,grad_granularity=tile", "moss:wgrad_fold=none"]


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[torch.Tensor, ...]:
    """(x, up, down, dy)."""
    return normal(2, T // 2, H, seed=0), normal(F, H, seed=1, scale=0.3), normal(H, F, seed=2, scale=0.1), normal(2, T // 2, H, seed=3, scale=1e-3)


def separate(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: torch.nn.Module, recipe: str) -> torch.Tensor:
    h = fp8_linear(x, up, recipe=from_name(recipe))
    return fp8_linear(activation(h), down, recipe=from_name(recipe))


class ExactGelu(torch.nn.Module):
    """GeLU by erfc, as the reference writes it: torch's own differs in the last place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        from fp8_recipes.reference.gelu import gelu

        ctx.save_for_backward(x)
        return gelu(x.view(-1, x.shape[-1])).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        from fp8_recipes.reference.gelu import gelu_backward

        (x,) = ctx.saved_tensors
        return gelu_backward(dy.reshape(-1, x.shape[-1]), x.view(-1, x.shape[-1])).view(x.shape)


def gradients(y: torch.Tensor, dy: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["gelu", "xielu"])
def test_fused_equals_separate_layers(name: str, recipe: str) -> None:
    """In fp32 nothing is rounded to bf16 between the layers, so the fusion changes no bit."""
    x, up, down, dy = inputs()
    leaves = [t.requires_grad_() for t in (x, up, down)]
    activation = XIELU() if name == "xielu" else ExactGelu()
    alphas = list(activation.parameters())
    expected = separate(*leaves, activation, recipe)
    got = fp8_mlp(*leaves, activation.alpha() if name == "xielu" else None, recipe=from_name(recipe))
    assert torch.equal(got, expected)
    for a, b in zip(gradients(got, dy, leaves + alphas), gradients(expected, dy, leaves + alphas), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gelu", "xielu"])
def test_value_and_all_gradients_against_float64(name: str) -> None:
    x, up, down, dy = inputs()
    leaves = [t.requires_grad_() for t in (x, up, down)]
    activation = XIELU()
    alpha = activation.alpha().detach().requires_grad_()
    y = fp8_mlp(*leaves, alpha if name == "xielu" else None, recipe=from_name("moss"))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    a = alpha.detach().double().requires_grad_()
    h = exact[0] @ exact[1].t()
    value = torch.where(h > 0, a[0] * h * h, a[1] * (torch.expm1(h.clamp(max=0)) - h)) + h / 2
    expected = (value if name == "xielu" else torch.nn.functional.gelu(h)) @ exact[2].t()
    more = [alpha] if name == "xielu" else []
    results = [y, *gradients(y, dy, leaves + more)]
    truths = [expected, *gradients(expected, dy.double(), exact + [a] * len(more))]
    for result, truth in zip(results[:4], truths[:4], strict=True):
        noise = (result.double() - truth).square().sum()
        assert 10 * torch.log10(truth.square().sum() / noise) > 22, "three or four E4M3 roundings behind one another"
    for result, truth in zip(results[4:], truths[4:], strict=True):
        assert (result.double() - truth).abs().max() <= 0.05 * truth.abs().max()


def test_main_grad_takes_the_weight_gradients() -> None:
    x, up, down, dy = inputs()
    weights = [torch.nn.Parameter(up), torch.nn.Parameter(down)]
    fp8_mlp(x, *weights, recipe=from_name("moss")).backward(dy)
    expected = [w.grad.clone() for w in weights if w.grad is not None]
    for w in weights:
        w.grad, w.main_grad = None, torch.ones_like(w)
    fp8_mlp(x, *weights, recipe=from_name("moss")).backward(dy)
    for w, e in zip(weights, expected, strict=True):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad, 1 + e)


def test_checkpointing_and_frozen_parts_change_no_bit() -> None:
    x, up, down, dy = inputs()
    leaves = [t.requires_grad_() for t in (x, up, down)]
    alpha = XIELU().alpha().detach().requires_grad_()

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return fp8_mlp(*tensors, recipe=from_name("moss"))

    expected = gradients(run(*leaves, alpha), dy, leaves + [alpha])
    again = gradients(checkpoint(run, *leaves, alpha, use_reentrant=False), dy, leaves + [alpha])
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)
    for i, leaf in enumerate(leaves + [alpha]):  # one gradient at a time
        alone = [t if j == i else t.detach() for j, t in enumerate(leaves + [alpha])]
        assert torch.equal(torch.autograd.grad(run(*alone), leaf, dy)[0], expected[i])


def test_no_tokens() -> None:
    _, up, down, _ = inputs()
    x, alpha = torch.zeros(0, H, requires_grad=True), XIELU().alpha().detach().requires_grad_()
    up.requires_grad_(), down.requires_grad_()
    y = fp8_mlp(x, up, down, alpha, recipe=from_name("moss"))
    assert y.shape == (0, H)
    for gradient, leaf in zip(gradients(y, y.detach(), [x, up, down, alpha]), (x, up, down, alpha), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("name", ["fog-max", "fog-opt"])
def test_model_takes_the_fused_way_and_shows_what_it_quantises(name: str) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab=32, layers=1, width=64, heads=2, ffn=64, seq=16, arch=ARCHITECTURES[name])
    scaling = WeightScaling(interval=5)
    model = convert(GPT(config), "moss", skip=is_high_precision, scaling=scaling)
    mlp = model.blocks[0].mlp
    assert can_fuse(mlp.up, mlp.down)
    tokens = torch.randint(0, 32, (2, 16))
    loss = model(tokens, tokens)
    assert "_Fp8MlpBackward" in nodes_behind(loss)
    monitor = Monitor()
    for module in model.modules():
        if isinstance(module, Linear):
            module.observer = monitor.add
    watched = model(tokens, tokens)
    watched.backward()
    assert torch.equal(loss, watched), "watching changes nothing"
    counts = monitor.read()
    inner, width = config.inner, 64
    assert counts["activation"].elements == 32 * (width + width + width + inner), "inputs of qkv, proj, up, down"
    assert counts["grad"].elements == 32 * (3 * width + width + inner + width)
    assert counts["weight"].elements == 4 * width * width + 2 * width * inner
    assert all(p.grad is not None for p in model.parameters())
    assert "_Fp8MlpBackward" not in nodes_behind(convert(GPT(config), "moss_exact", skip=is_high_precision)(tokens, tokens)), "no fold, no fusion"


def test_refusals() -> None:
    x, up, down, _ = inputs()
    with pytest.raises(ValueError, match=r"x \(2, 48, 64\), up \(96, 64\) and down \(64, 95\) must be"):
        fp8_mlp(x, up, down[:, :95], recipe=from_name("moss"))
    with pytest.raises(RecipeError, match="'tile': the fused FFN needs quantize=true, fold=row and weight_cache=none; use separate Linear layers"):
        fp8_mlp(x, up, down, recipe=from_name("tile"))
    with pytest.raises(ValueError, match="alpha must be contiguous fp32"):
        fp8_mlp(x, up, down, torch.ones(3), recipe=from_name("moss"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gelu", "xielu"])
def test_on_a_gpu(name: str) -> None:
    """bf16 on the GPU against the reference numerics of the same bf16 values on the CPU, and the same bits twice."""
    shapes = ((512, 256, 1.0), (384, 256, 0.1), (256, 384, 0.1), (512, 256, 1.0))
    x, up, down, dy = (normal(rows, cols, seed=i, scale=scale).bfloat16() for i, (rows, cols, scale) in enumerate(shapes, start=4))
    alpha = XIELU().alpha().detach() if name == "xielu" else None
    results = []
    for device in ("cuda", "cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in (x, up, down, *([alpha] if alpha is not None else []))]
        y = fp8_mlp(*leaves, recipe=from_name("moss"))
        results.append([t.detach().cpu() for t in (y, *gradients(y, dy.to(device), leaves))])
    for first, second, reference in zip(*results, strict=True):
        assert torch.equal(first, second)
        noise = (first.double() - reference.double()).square().sum()
        assert 10 * torch.log10(reference.double().square().sum() / noise) > 35
