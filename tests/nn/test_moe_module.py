"""`nn.MoE`: router, expert bias, load balancing, shared experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_snr
from moe_cases import F, H, floor, normal

from fp8_recipes.nn import MoE, Router, load_balancing_loss, moe_experts
from fp8_recipes.nn.moe import plain_experts
from fp8_recipes.weight_scaling import ATTRIBUTE, WeightScaling


def test_router_gradient_through_prob() -> None:
    torch.manual_seed(0)
    layer = MoE(H, F, 8, 3, dtype=torch.bfloat16)
    for w in (*layer.w1, *layer.w2):
        torch.nn.init.normal_(w, std=H**-0.5)
    torch.nn.init.normal_(layer.router.weight, std=0.1)
    x, dy = normal(4, 40, H, seed=1).bfloat16().requires_grad_(), normal(4, 40, H, seed=2).bfloat16()
    y = layer(x)
    y.backward(dy)
    index = layer.router(x.detach().view(-1, H))[0]
    xd, router = x.detach().double().view(-1, H).requires_grad_(), layer.router.weight.detach().double().requires_grad_()
    chosen = (xd @ router.t()).softmax(1).gather(1, index.long())
    w1, w2 = ([w.detach().double() for w in ws] for ws in (layer.w1, layer.w2))
    want = plain_experts(xd, index, chosen / chosen.sum(1, keepdim=True), w1, w2)
    want.backward(dy.double().view(-1, H))
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert_snr(want, y.view(-1, H), floor("y"), "y")
    # Through the router flow differences of dprob (the softmax's gradient subtracts their mean), so a little of what it had over its noise is lost.
    assert_snr(router.grad, layer.router.weight.grad, floor("dprob") - 2, "router")  # type: ignore[arg-type]
    assert_snr(xd.grad, x.grad.view(-1, H), floor("dx") - 1, "x")  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8])
def test_whole_layer_against_float64(top_k: int, score: str) -> None:
    """Input, router, experts and shared experts, with an expert bias that empties one expert and an auxiliary loss beside: every gradient by value."""
    torch.manual_seed(0)
    experts, tokens = 9, 160
    layer = MoE(H, F, experts, top_k, score=score, normalize=False, scaling=1.5, expert_bias=True, shared_ffn=64, aux_loss=0.05, dtype=torch.bfloat16)
    assert layer.shared is not None and layer.router.expert_bias is not None
    for w in (*layer.w1, *layer.w2, layer.shared.first.weight, layer.shared.down.weight):
        torch.nn.init.normal_(w, std=w.shape[1] ** -0.5)
    torch.nn.init.normal_(layer.router.weight, std=0.1)
    bias = torch.linspace(-0.1, 0.1, experts)
    bias[2] = -10
    layer.router.expert_bias.copy_(bias)
    x, dy = normal(tokens, H, seed=11).bfloat16().requires_grad_(), normal(tokens, H, seed=12).bfloat16()
    y = layer(x)
    assert layer.aux_loss is not None
    torch.autograd.backward((y, layer.aux_loss), (dy, torch.ones(())))

    index = layer.router(x.detach())[0].long()
    assert not (index == 2).any(), "chosen by score + bias"
    truth = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    xd = x.detach().double().requires_grad_()
    logits = xd @ truth["router.weight"].t()
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    w1, w2 = ([truth[f"w{i}.{e}"] for e in range(experts)] for i in (1, 2))
    gate, up = (xd @ truth["shared.gate_up.weight"].t()).chunk(2, dim=1)
    shared = (torch.nn.functional.silu(gate) * up) @ truth["shared.down.weight"].t()
    want = plain_experts(xd, index, 1.5 * scores.gather(1, index), w1, w2) + shared
    share = scores / scores.sum(1, keepdim=True)
    got = torch.bincount(index.flatten(), minlength=experts) / index.numel()
    loss = 0.05 * experts * (got * share.mean(0)).sum()
    torch.autograd.backward((want, loss), (dy.double(), torch.ones((), dtype=torch.float64)))

    assert_snr(want, y, floor("y"), "y")
    torch.testing.assert_close(layer.aux_loss.double(), loss, rtol=1e-5, atol=0)
    assert_snr(xd.grad, x.grad, floor("dx") - 1, "x")  # type: ignore[arg-type]
    for name, parameter in layer.named_parameters():
        expected, gradient = truth[name].grad, parameter.grad
        if name in ("w1.2", "w2.2"):
            assert gradient is not None and not gradient.any(), "no token, no gradient"
            continue
        kind = {"w1": "dw1", "w2": "dw2", "ro": "dprob", "sh": "dw1"}[name[:2]]
        assert_snr(expected, gradient, floor(kind) - (2 if name.startswith("router") else 3), name)  # type: ignore[arg-type]


def test_router_scores_and_choice() -> None:
    x = normal(50, H, seed=3)
    torch.manual_seed(0)
    router = Router(H, 8, 2)
    logits = x @ router.weight.t()
    index, prob, share = router(x)
    assert index.dtype == torch.int32 and prob.dtype == torch.float32
    assert torch.equal(index.long(), logits.topk(2).indices)
    torch.testing.assert_close(prob, logits.gather(1, index.long()).softmax(1))  # normalised softmax over the chosen
    torch.testing.assert_close(share, logits.softmax(1))
    router.score, router.normalize, router.scaling = "sigmoid", False, 2.5
    torch.testing.assert_close(router(x)[1], 2.5 * logits.sigmoid().gather(1, index.long()))
    half = router(x.bfloat16())[1]
    assert half.dtype == torch.float32, "the router works in fp32 whatever comes in"
    for top_k_, message in ((0, "top_k=0"), (9, "top_k=9 must lie between 1 and num_experts=8")):
        with pytest.raises(ValueError, match=message):
            Router(H, 8, top_k_)
    with pytest.raises(ValueError, match="score='tanh' must be softmax or sigmoid"):
        Router(H, 8, 2, score="tanh")


def test_expert_bias_changes_the_choice_and_not_the_weight() -> None:
    x = normal(64, H, seed=4)
    torch.manual_seed(0)
    router = Router(H, 4, 1, score="sigmoid", normalize=False, expert_bias=True)
    plain = router(x)
    assert router.expert_bias is not None
    router.tokens_per_expert.zero_()
    router.expert_bias[3] = 10
    index, prob, _ = router(x)
    assert (index == 3).all()
    torch.testing.assert_close(prob[:, 0], (x @ router.weight.t()).sigmoid()[:, 3])
    assert router.tokens_per_expert.tolist() == [0, 0, 0, 64]
    router.update_expert_bias(rate=0.5)
    assert router.expert_bias.tolist() == [0.5, 0.5, 0.5, 9.5] and not router.tokens_per_expert.any()
    router.eval()
    router(x)
    assert not router.tokens_per_expert.any(), "evaluation does not count"
    assert "expert_bias" in router.state_dict() and (plain[0] != 3).any()
    with pytest.raises(ValueError, match="expert_bias=True"):
        Router(H, 4, 1).update_expert_bias()


def test_expert_bias_balances_a_skewed_router() -> None:
    torch.manual_seed(0)
    router = Router(H, 8, 2, score="sigmoid", expert_bias=True)
    with torch.no_grad():
        router.weight[:2] += 0.05  # two favourites, for inputs of positive mean
    x = normal(512, H, seed=5) + 0.3
    before = torch.bincount(router(x)[0].flatten(), minlength=8).max()
    for _ in range(60):
        router(x)
        router.update_expert_bias(rate=0.02)
    after = torch.bincount(router(x)[0].flatten(), minlength=8).max()
    assert before > 300 and after < 250, (before, after)


def test_load_balancing_loss() -> None:
    share = torch.full((12, 4), 0.25)
    index = torch.arange(12).view(12, 1) % 4
    assert load_balancing_loss(share, index) == pytest.approx(1.0)
    one = torch.zeros(12, 4)
    one[:, 2] = 1
    assert load_balancing_loss(one, torch.full((12, 1), 2)) == pytest.approx(4.0)
    assert load_balancing_loss(torch.empty(0, 4), torch.empty(0, 1, dtype=torch.int64)) == 0
    logits = normal(30, 6, seed=6).double().requires_grad_()
    chosen = logits.topk(2).indices
    assert torch.autograd.gradcheck(lambda z: load_balancing_loss(z.softmax(1), chosen), (logits,), atol=1e-4)


def test_shared_experts_and_aux_loss() -> None:
    torch.manual_seed(0)
    layer = MoE(H, F, 8, 2, shared_ffn=64, aux_loss=0.1, dtype=torch.bfloat16)
    assert layer.shared is not None and layer.shared.down.recipe.name == "moss"
    x = normal(96, H, seed=7).bfloat16().requires_grad_()
    y = layer(x)
    index, prob, share = layer.router(x)
    routed = moe_experts(x, index, prob, list(layer.w1), list(layer.w2), recipe=layer.recipe)
    assert torch.equal(y, routed + layer.shared(x))
    assert layer.aux_loss is not None
    torch.testing.assert_close(layer.aux_loss, 0.1 * load_balancing_loss(share, index))
    layer.aux_loss.backward()
    wanted = torch.autograd.grad(0.1 * load_balancing_loss(share, index), layer.router.weight)[0]
    assert wanted.any() and torch.equal(layer.router.weight.grad, wanted)  # type: ignore[arg-type]
    assert MoE(H, F, 8, 2).aux_loss is None


def test_module_trains_like_bf16() -> None:
    def losses(recipe: str) -> list[float]:
        torch.manual_seed(0)
        layer = MoE(64, 64, 8, 2, recipe=recipe, shared_ffn=64, aux_loss=1e-2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, betas=(0.9, 0.95))
        scaling = WeightScaling(interval=10)
        scaling.attach(optimizer)
        layer.track(scaling)
        x, target = normal(256, 64, seed=8), normal(256, 64, seed=9)
        history = []
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            (loss + layer.aux_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(loss.detach()))
        return history

    fp8, plain = losses("fp8_flow_moe"), losses("bf16")
    assert plain[-1] < 0.9 * plain[0]
    assert fp8[-1] == pytest.approx(plain[-1], rel=0.02) and fp8[0] == pytest.approx(plain[0], rel=1e-3)


ALONE = """
import sys
sys.modules |= dict.fromkeys(("transformer_engine", "megatron", "triton"))
import torch
from fp8_recipes.nn import MoE
layer = MoE(64, 32, 4, 2, shared_ffn=32, dtype=torch.bfloat16)
x = torch.randn(24, 64, dtype=torch.bfloat16, requires_grad=True)
layer(x).sum().backward()
assert all(p.grad is not None for p in layer.parameters()) and x.grad.isfinite().all()
"""


def test_needs_neither_megatron_nor_transformer_engine() -> None:
    """In a process where importing them fails, and Triton, which a CPU does not need."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-2000:]


def test_module_names_and_repr() -> None:
    layer = MoE(H, F, 4, 2, shared_ffn=32)
    names = set(dict(layer.named_parameters()))
    assert names == {"router.weight", *(f"w{i}.{e}" for i in (1, 2) for e in range(4)), "shared.gate_up.weight", "shared.down.weight"}
    assert "experts=4, here=4, recipe=fp8_flow_moe, weight_scale=measured (experts not tracked)" in repr(layer)
    layer.track(WeightScaling())
    assert "not tracked" not in repr(layer) and hasattr(layer.shared.down.weight, ATTRIBUTE)  # type: ignore[union-attr]
