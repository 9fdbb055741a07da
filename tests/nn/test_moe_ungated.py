"""Experts without a gate (GeLU, FOG-opt's and FOG-flash's; xIELU, FOG-max's) against float64: values, every gradient, what is kept, which operations run."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_snr
from moe_cases import (
    CALLS,
    FLOW,
    SAVED,
    F,
    H,
    case,
    check,
    check_nan_in_one_token,
    dalpha_noise,
    floor,
    flow,
    leaves,
    normal,
    results,
    top_k,
    truth,
    watched,
    with_main_grad,
)

from fp8_recipes import from_name, ops
from fp8_recipes.nn import MoE, fp8_mlp, moe_experts
from fp8_recipes.nn.activations import activation_of
from fp8_recipes.nn.moe import plain_experts
from fp8_recipes.weight_scaling import WeightScaling


@pytest.fixture(params=["gelu", "xielu"])
def act(request: pytest.FixtureRequest) -> str:
    return request.param


def ungated(act: str, spec: str = "fp8_flow_moe"):
    return flow(spec, activation=act)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("k", [1, 2, 6, 8])
def test_values_and_gradients(act: str, k: int, saved: str) -> None:
    c = case(top_k(160, k, 8), 8, activation=act)
    check(c, results(c, ungated(act, f"fp8_flow_moe:moe_saved={saved}")), saved)


@pytest.mark.parametrize("saved", SAVED)
def test_empty_experts_one_token_experts_and_dropped_copies(act: str, saved: str) -> None:
    index = top_k(150, 3, 4)
    index[::7, 1] = -1
    index[30] = -1  # a token without any expert
    index[5, 0], index[9, 2] = 5, 7  # experts 5 and 7 have one token each, 4 and 6 none
    c = case(index, 8, activation=act)
    got = results(c, ungated(act, f"fp8_flow_moe:moe_saved={saved}"))
    check(c, got, saved, per_expert=6.0)
    assert not got["y"][30].any() and not got["dx"][30].any()
    assert not got["dw1"][4].any() and not got["dw2"][6].any()


@pytest.mark.parametrize("name", ["all to one", "more experts than tokens", "one token", "no tokens"])
def test_uneven_routing(act: str, name: str) -> None:
    index, experts = {
        "all to one": (torch.full((140, 1), 2), 4),
        "more experts than tokens": (top_k(20, 2, 40), 40),
        "one token": (torch.tensor([[3, 0]]), 4),
        "no tokens": (torch.empty(0, 2), 4),
    }[name]
    c = case(index, experts, activation=act)
    got = results(c, ungated(act))
    if name == "no tokens":
        assert got["y"].shape == (0, H) and not any(got[name].any() for name in got if name.startswith("dw") or name == "dalpha")
    else:
        check(c, got, per_expert=6.0)


@pytest.mark.parametrize("saved", SAVED)
def test_nan_in_one_token(act: str, saved: str) -> None:
    c = case(top_k(100, 2, 6), 6, activation=act)
    check_nan_in_one_token(c, ungated(act, f"fp8_flow_moe:moe_saved={saved}"))


@pytest.mark.parametrize("spec", ["activation_granularity=micro,grad_granularity=micro", "grad=e5m2", "fold=none", "wgrad_fold=none", "promote=0"])
def test_other_recipes(act: str, spec: str) -> None:
    c = case(top_k(96, 2, 4), 4, activation=act)
    got, want = results(c, ungated(act, f"fp8_flow_moe:{spec}")), truth(c)
    if spec != "grad=e5m2":
        check(c, got)
    assert_snr(want["y"], got["y"], floor("y", activation=act), "y")
    for name in ("dx", "dw1", "dw2", "dprob"):
        assert_snr(want[name], got[name], floor(name, activation=act) - 5, name)  # a mantissa bit less in dy and dh


def test_unquantised_recipe_is_plain_torch(act: str) -> None:
    c = case(top_k(64, 2, 4), 4, activation=act)
    x = moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=from_name("bf16"), activation=act, **c.alphas)
    assert torch.equal(x, plain_experts(c.x, c.index, c.prob, c.w1, c.w2, activation_of(act), c.alpha))
    assert_snr(truth(c)["y"], x, 44, "y")


def test_the_same_operations_run_as_with_swiglu(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(top_k(160, 2, 8), 8, activation=act)
    w1, w2 = with_main_grad(c)
    scaling = WeightScaling()
    for w in (*w1, *w2):
        scaling.track(w)  # type: ignore[arg-type]
    x, prob = c.x.clone().requires_grad_(), c.prob.clone().requires_grad_()
    with watched(monkeypatch, large=160 * 2) as (calls, movements):
        moe_experts(x, c.index, prob, w1, w2, recipe=FLOW, activation=act, **c.alphas).backward(c.dy)
    assert dict(calls) == {name.replace("swiglu", act): count for name, count in CALLS.items()}
    assert movements.seen == []


@pytest.mark.parametrize(("saved", "bytes_of"), [("h", 1), ("activation", 2), ("input", 0)])
def test_bytes_kept_for_backward(act: str, saved: str, bytes_of: int) -> None:
    """Payloads of F bytes a row beside the tokens as they arrived: fc1's output, and the activation's."""
    kept: dict[int, int] = {}
    c = case(top_k(256, 2, 4), 4, activation=act)

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.float8_e4m3fn:
            kept[t.data_ptr()] = t.numel()
        return t

    w1, w2 = leaves(c)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_experts(c.x, c.index, c.prob, w1, w2, recipe=from_name(f"fp8_flow_moe:moe_saved={saved}"), activation=act, **c.alphas)
    rows = (sum(kept.values()) - 256 * H) / F
    assert rows == bytes_of * rows_of(c) and rows_of(c) >= 512


def rows_of(c) -> int:
    """Rows of the grouped buffer: as many as the groups may take at most, each a multiple of 128."""
    from fp8_recipes import ops

    return ops.rows_for(c.index.numel(), len(c.w1))


@pytest.mark.parametrize("top_k_", [1, 2, 8])
def test_module_with_router_and_shared_experts(act: str, top_k_: int) -> None:
    """Router's gradient through prob, and the shared experts' GeLU, beside float64."""
    torch.manual_seed(0)
    layer = MoE(H, F, 8, top_k_, activation=act, shared_ffn=64, normalize=False, dtype=torch.bfloat16)
    alphas = {"xielu.alpha_p", "xielu.alpha_n"} if act == "xielu" else set()
    assert layer.shared is not None and {n for n, _ in layer.shared.named_parameters()} == {"up.weight", "down.weight"} | alphas
    assert {n for n, _ in layer.named_parameters() if n.startswith("xielu")} == alphas
    assert layer.w1[0].shape == (F, H) and f"activation={act}" in repr(layer)
    for w in (*layer.w1, *layer.w2, layer.shared.first.weight, layer.shared.down.weight):
        torch.nn.init.normal_(w, std=w.shape[1] ** -0.5)
    torch.nn.init.normal_(layer.router.weight, std=0.1)
    x, dy = normal(4, 40, H, seed=1).bfloat16().requires_grad_(), normal(4, 40, H, seed=2).bfloat16()
    layer(x).backward(dy)
    index = layer.router(x.detach().view(-1, H))[0]
    xd, router = x.detach().double().view(-1, H).requires_grad_(), layer.router.weight.detach().double().requires_grad_()
    w1, w2 = ([w.detach().double() for w in ws] for ws in (layer.w1, layer.w2))
    up, down = (layer.shared.first.weight.detach().double(), layer.shared.down.weight.detach().double())
    a = activation_of(act)
    alpha, shared_alpha = (None if m.xielu is None else m.xielu.alpha().detach().double() for m in (layer, layer.shared))
    routed = plain_experts(xd, index, (xd @ router.t()).softmax(1).gather(1, index.long()), w1, w2, a, alpha)
    want = routed + a.plain(xd @ up.t(), shared_alpha) @ down.t()
    want.backward(dy.double().view(-1, H))
    assert_snr(router.grad, layer.router.weight.grad, floor("dprob", activation=act) - 2, "router")  # type: ignore[arg-type]
    assert_snr(xd.grad, x.grad.view(-1, H), floor("dx", activation=act) - 1, "x")  # type: ignore[arg-type, union-attr]


def test_shared_experts_are_the_fused_ffn(act: str) -> None:
    layer = MoE(H, F, 4, 2, activation=act, shared_ffn=64, dtype=torch.bfloat16)
    assert layer.shared is not None
    x = normal(32, H, seed=3).bfloat16()
    alpha = None if layer.shared.xielu is None else layer.shared.xielu.alpha()
    assert torch.equal(layer.shared(x), fp8_mlp(x, layer.shared.first.weight, layer.shared.down.weight, alpha, recipe=from_name("moss")))


@pytest.mark.parametrize("saved", SAVED)
def test_alphas_where_every_term_has_one_sign(saved: str) -> None:
    """Rounding averages out of such a sum, so a row too many or a forgotten probability shows: 5 experts of 8 share what 3 leave empty, garbage behind them."""
    index = top_k(160, 2, 8)
    index[index > 4] = -1
    c = case(index, 8, activation="xielu")
    c.dy, c.w2 = c.dy.abs(), [w.abs() for w in c.w2]
    got, want = results(c, ungated("xielu", f"fp8_flow_moe:moe_saved={saved}"))["dalpha"], truth(c)["dalpha"]
    assert ((got - want).abs() < 0.01 * want).all(), f"{got} is not {want}"


def test_alphas_sum_is_that_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows in use and no others, in float64, from what the operation was given; the rows behind them made NaN first."""
    original, seen = ops.xielu_backward_quantize, []

    def spoiled(da, h, alpha, *, source, **how):
        assert (source < 0).any() and h.granularity == "row"
        da[source < 0] = torch.nan
        h.scale[source < 0] = torch.nan
        seen.append((da.double(), ops.dequantize(h).double(), how["prob"].double(), source >= 0))
        return original(da, h, alpha, source=source, **how)

    monkeypatch.setattr(ops, "xielu_backward_quantize", spoiled)
    c = case(top_k(100, 3, 6), 6, activation="xielu")
    got = results(c, ungated("xielu"))["dalpha"].double()
    ((da, h, prob, used),) = seen
    weight, h = (da * prob[:, None])[used], h[used]
    left = h.clamp(max=0)
    terms = torch.stack([weight * h.clamp(min=0) ** 2, weight * (torch.expm1(left) - left)])
    assert ((got - terms.sum((1, 2))).abs() <= 1e-6 * terms.abs().sum((1, 2))).all()


def test_module_trains_its_alphas() -> None:
    """One pair for the routed experts and one for the shared, through softplus, where every term has one sign."""
    torch.manual_seed(0)
    layer = MoE(H, F, 8, 2, activation="xielu", shared_ffn=64, dtype=torch.bfloat16)
    shared = layer.shared
    assert shared is not None and shared.xielu is not None and layer.xielu is not None
    for w in (*layer.w1, shared.first.weight):
        torch.nn.init.normal_(w, std=H**-0.5)
    for w in (*layer.w2, shared.down.weight):
        w.data.abs_()
    x, dy = normal(160, H, seed=1).bfloat16(), normal(160, H, seed=2).bfloat16().abs()
    layer(x).backward(dy)
    xd, (index, prob, _) = x.double(), layer.router(x)
    act, w1, w2 = activation_of("xielu"), [w.double() for w in layer.w1], [w.double() for w in layer.w2]
    for module, experts in (
        (layer, lambda alpha: plain_experts(xd, index, prob.double(), w1, w2, act, alpha)),
        (shared, lambda alpha: act.plain(xd @ shared.first.weight.double().t(), alpha) @ shared.down.weight.double().t()),
    ):
        raw = [module.xielu.alpha_p, module.xielu.alpha_n]
        p, n = (a.detach().double().requires_grad_() for a in raw)
        alpha = torch.stack((torch.nn.functional.softplus(p), torch.nn.functional.softplus(n) + 0.5))
        experts(alpha).backward(dy.double())
        for parameter, truth_ in zip(raw, (p, n), strict=True):
            assert parameter.grad.item() == pytest.approx(truth_.grad.item(), rel=0.02)  # type: ignore[union-attr]


def test_bad_input_is_named(act: str) -> None:
    c = case(top_k(32, 2, 4), 4, activation=act)
    for recipe in ("fp8_flow_moe", "bf16"):
        with pytest.raises(ValueError, match=r"activation='smooth_swiglu' is none of the experts'; use swiglu, gelu, xielu"):
            moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=from_name(recipe), activation="smooth_swiglu")
        with pytest.raises(ValueError, match=r"activation='xielu' needs alpha, fp32 \(2,\) = \[alpha_p, alpha_n\]"):
            moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=from_name(recipe), activation="xielu")
        with pytest.raises(ValueError, match=r"activation='gelu' has no alpha; leave it out"):
            moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=from_name(recipe), activation="gelu", alpha=torch.ones(2))
        with pytest.raises(ValueError, match=r"alpha must be contiguous fp32 \(2,\) = \[alpha_p, alpha_n\]; got torch.bfloat16"):
            moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=from_name(recipe), activation="xielu", alpha=torch.ones(2).bfloat16())
    with pytest.raises(ValueError, match=r"activation='swiglu', w1 must be \[2F, H\] and w2 \[H, F\] per expert; got \(96, 128\) and \(128, 96\)"):
        moe_experts(c.x, c.index, c.prob, c.w1, c.w2, recipe=FLOW)
    gated = case(top_k(32, 2, 4), 4)
    with pytest.raises(ValueError, match=rf"activation='{act}', w1 must be \[F, H\] and w2 \[H, F\] per expert; got \(192, 128\) and \(128, 96\)"):
        moe_experts(c.x, c.index, c.prob, gated.w1, gated.w2, recipe=FLOW, activation=act, **c.alphas)
    with pytest.raises(ValueError, match="activation='relu'"):
        MoE(H, F, 4, 2, activation="relu")


@pytest.mark.gpu
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("shape", [(300, 2, 8, 256, 192), (512, 8, 64, 512, 384), (7, 2, 16, 256, 96), (200, 1, 4, 1024, 2112)])
def test_gpu_values_and_gradients(act: str, shape: tuple[int, ...], saved: str) -> None:
    tokens, k, experts, hidden, ffn = shape
    index = top_k(tokens, k, experts)
    index[::9, 0] = -1
    c = case(index, experts, hidden=hidden, ffn=ffn, activation=act).to("cuda")
    run = ungated(act, f"fp8_flow_moe:moe_saved={saved}")
    got = results(c, run)
    check(c, got, saved, per_expert=6.0)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), results(c, run).values(), strict=True)), "two runs, the same bits"


@pytest.mark.gpu
def test_gpu_agrees_with_the_reference(act: str) -> None:
    c = case(top_k(200, 2, 8), 8, hidden=256, ffn=192, activation=act)
    want, got = results(c, ungated(act)), results(c.to("cuda"), ungated(act))
    for name in want:  # as for SwiGLU: the accumulator's 14 bits, and here the fitted tail
        if name != "dalpha":
            assert_snr(want[name], got[name].cpu(), 31.0, name)
    if act == "xielu":
        assert ((want["dalpha"] - got["dalpha"].cpu()).abs() <= 2 * dalpha_noise(c, "h")).all()
