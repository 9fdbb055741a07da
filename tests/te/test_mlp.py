"""The fused RMSNorm + SwiGLU MLP against float64: output and every gradient, main_grad, recompute."""

from __future__ import annotations

import math

import pytest
import torch

from fp8_recipes import from_name

pytestmark = pytest.mark.gpu
TOKENS, HIDDEN, FFN, EPS = 512, 512, 1024, 1e-5


def snr(reference, value):
    error = (reference.double() - value.double()).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(reference.double().square().sum().item() / error)


def parameters(seed=0):
    torch.manual_seed(seed)
    gamma = (1 + 0.1 * torch.randn(HIDDEN, device="cuda")).bfloat16()
    w1 = (torch.randn(2 * FFN, HIDDEN, device="cuda") * HIDDEN**-0.5).bfloat16()
    w2 = (torch.randn(HIDDEN, FFN, device="cuda") * FFN**-0.5).bfloat16()
    return [torch.nn.Parameter(p) for p in (gamma, w1, w2)]


def truth(x, dy, gamma, w1, w2, offset=0.0):
    args = [t.detach().double().requires_grad_() for t in (x, gamma, w1, w2)]
    xf, g, a, b = args
    n = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + EPS) * (g + offset)
    gate, up = (n @ a.t()).chunk(2, dim=-1)
    y = (torch.nn.functional.silu(gate) * up) @ b.t()
    y.backward(dy.double())
    return [y.detach(), *(t.grad for t in args)]


def run(x, dy, params, **options):
    from fp8_recipes.te.mlp import Options, norm_swiglu_mlp

    recipe = from_name(options.pop("recipe", "moss"))
    x = x.detach().clone().requires_grad_()
    y = norm_swiglu_mlp(x, *params, Options(recipe, EPS, **options))
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("recipe", ("moss", "row", "moss:grad=e5m2"))
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_values_and_gradients(recipe, offset):
    gamma, w1, w2 = params = parameters()
    gamma.data -= offset
    x = torch.randn(64, TOKENS // 64, HIDDEN, device="cuda").bfloat16()
    dy = (torch.randn_like(x) * 1e-4).bfloat16()
    y, dx = run(x, dy, params, recipe=recipe, zero_centered_gamma=offset == 1.0)
    got = [y, dx, gamma.grad, w1.grad, w2.grad]
    for name, want, value in zip(("y", "dx", "dgamma", "dw1", "dw2"), truth(x, dy, *params, offset), got, strict=True):
        level = snr(want, value.view_as(want))
        assert level > (19 if "e5m2" in recipe and name != "y" else 22), f"{name}: {level:.1f} dB"


def test_main_grad_is_accumulated_and_overwritten():
    _, w1, w2 = params = parameters()
    x, dy = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16(), torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    run(x, dy, params)
    want = [w.grad.float() for w in (w1, w2)]
    for w in (w1, w2):
        w.grad, w.main_grad, w.grad_added_to_main_grad = None, torch.full_like(w, 3.0, dtype=torch.float32), False
    run(x, dy, params, fuse_wgrad=True, accumulate=False)
    run(x, dy, params, fuse_wgrad=True, accumulate=True)
    for w, g in zip((w1, w2), want, strict=True):
        assert w.grad_added_to_main_grad and snr(2 * g, w.main_grad) > 40


def test_recompute_is_bitwise():
    from torch.utils.checkpoint import checkpoint

    from fp8_recipes.te.mlp import Options, norm_swiglu_mlp

    x, dy = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16(), torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    params, again = parameters(), parameters()
    _, dx = run(x, dy, params)
    xr = x.clone().requires_grad_()
    options = Options(from_name("moss"), EPS)
    checkpoint(lambda t: norm_swiglu_mlp(t, *again, options), xr, use_reentrant=False).backward(dy)
    assert torch.equal(dx, xr.grad)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, again, strict=True))


def test_bad_input_is_refused():
    from fp8_recipes.te.mlp import Options, norm_swiglu_mlp

    gamma, w1, w2 = parameters()
    x = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="no fold"):
        norm_swiglu_mlp(x, gamma, w1, w2, Options(from_name("moss_exact"), EPS))
    with pytest.raises(ValueError, match=r"\[2F, H\]"):
        norm_swiglu_mlp(x, gamma, w1[:-16], w2, Options(from_name("moss"), EPS))
    with pytest.raises(ValueError, match="tokens to be a multiple of 16, got 10"):
        norm_swiglu_mlp(x[:10], gamma, w1, w2, Options(from_name("moss"), EPS))
