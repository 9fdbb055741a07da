"""FOG's parts and whole models of every architecture: values and all gradients against float64, initial statistics, grouped queries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8_recipes.architecture import ARCHITECTURES, FOG_MAX, LLAMA3, SMOOTH_SWIGLU, from_name
from fp8_recipes.nn.fog import XIELU, LayerScale, PostNorm, RMSNorm, TanhBound, _as_rows, smooth_swiglu
from fp8_recipes.nn.gpt import GPT, GPTConfig

B, S, D = 2, 7, 48


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float = 2e-6) -> None:
    """Largest error relative to the largest value."""
    assert got is not None and expected is not None and got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


def perturbed(module: nn.Module, seed: int) -> nn.Module:
    """Parameters away from their initial values, which are often ones and hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return module


def xielu64(x: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor) -> torch.Tensor:
    p, n = F.softplus(alpha_p), 0.5 + F.softplus(alpha_n)
    return torch.where(x > 0, p * x * x, n * (torch.expm1(x.clamp(max=0)) - x)) + x / 2


def norm64(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if weight is None else y * weight


def stream() -> torch.Tensor:
    return normal(B, S, D, seed=14)


class OntoStream(PostNorm):
    """A post-norm as a function of x alone."""

    def __init__(self) -> None:
        super().__init__(D, gain=0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, stream().to(x.dtype))


PARTS = {
    "xielu": (lambda: XIELU(), lambda x, alpha_p, alpha_n: xielu64(x, alpha_p, alpha_n)),
    "tanh": (lambda: TanhBound(0.5), lambda x, alpha: torch.tanh(alpha * x)),
    "post-norm": (lambda: OntoStream(), lambda x, weight: stream().double() + norm64(x, weight)),
    "norm": (lambda: RMSNorm(D), norm64),
    "frozen norm": (lambda: RMSNorm(D, trained=False), lambda x: norm64(x, None)),
    "layer scale": (lambda: LayerScale(D, 0.25), lambda x, weight: x * weight),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_and_all_its_gradients(name: str) -> None:
    make, formula = PARTS[name]
    part = perturbed(make(), 1)
    x, dy = normal(B, S, D, seed=2, scale=2).requires_grad_(), normal(B, S, D, seed=3)
    y = part(x)
    y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    parameters = {key: p.detach().double().requires_grad_() for key, p in part.named_parameters()}
    expected = formula(x64, **parameters)
    expected.backward(dy.double())
    assert_close(y.detach(), expected.detach())
    assert_close(x.grad, x64.grad)
    for key, p in part.named_parameters():
        assert_close(p.grad, parameters[key].grad)
    half = part(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.detach().float(), expected.detach(), 2**-7)


@pytest.mark.parametrize("name", PARTS)
def test_part_passes_gradcheck_of_what_it_needs(name: str) -> None:
    """Only the gradients asked for: x alone, parameters alone."""
    make, _ = PARTS[name]
    part, x = make(), normal(B, S, D, seed=4)
    both = x.clone().requires_grad_()
    part(both).sum().backward()
    for p in part.parameters():
        p.requires_grad_(False)
    alone = x.clone().requires_grad_()
    part(alone).sum().backward()
    assert torch.equal(alone.grad, both.grad)
    for p in part.parameters():
        p.requires_grad_()
        p.grad = None
    if list(part.parameters()):
        part(x).sum().backward()
        assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_post_norm_hands_the_residual_its_gradient_and_keeps_what_it_must(dtype: torch.dtype) -> None:
    """The residual sets the result's dtype. Kept: x, the gains and one number per row, or nothing."""
    part = perturbed(PostNorm(D, gain=0.25), 1)
    x, residual, dy = normal(B, S, D, seed=2).bfloat16(), stream().to(dtype), normal(B, S, D, seed=3).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    for wants_x, wants_residual, train_gain in ((True, True, True), (False, True, False), (False, False, False), (False, True, True), (True, False, False)):
        part.weight.grad = None
        a, b, kept = x.clone().requires_grad_(wants_x), residual.clone().requires_grad_(wants_residual), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            y = part(a, b, train_gain)
        assert y.dtype == dtype and y.requires_grad == (wants_x or wants_residual or train_gain)
        assert sorted(kept) == (sorted([(B, S, D), (D,), (B * S,)]) if wants_x or train_gain else [])
        if y.requires_grad:
            y.backward(dy)
        assert (a.grad is not None and a.grad.dtype == torch.bfloat16) == wants_x and (part.weight.grad is not None) == train_gain
        assert torch.equal(b.grad, dy) if wants_residual else b.grad is None
    assert "48, eps=1e-05" in str(part)


def test_tanh_of_queries_inside_a_joint_projection() -> None:
    """Any layout gives the same bits, and queries are read where they are."""
    joint = normal(2, 5, 6, 8, seed=13)
    for x in (joint, joint[:, :, :4], joint[:, :, 4:5], joint.transpose(1, 2), joint[..., :3], joint[:0], joint[:, :1, :1], joint[0, 0, 0]):
        assert torch.equal(TanhBound(0.7)(x), TanhBound(0.7)(x.contiguous())), x.shape
    assert _as_rows(joint[:, :, :4]).shape == (10, 32) and _as_rows(joint[:, :, :4]).data_ptr() == joint.data_ptr()
    assert _as_rows(joint).shape == (60, 8) and _as_rows(joint[:, :1]).data_ptr() == joint.data_ptr()
    assert _as_rows(joint[..., :1].expand(2, 5, 6, 8)).is_contiguous()


def test_initial_values() -> None:
    assert XIELU().alpha().tolist() == pytest.approx([0.8, 0.8], rel=1e-6)
    assert TanhBound().alpha.item() == 0.5 and TanhBound().alpha.shape == ()
    assert (PostNorm(D, gain=0.25).weight == 0.25).all() and (RMSNorm(D).weight == 1).all() and (LayerScale(D, 0.25).weight == 0.25).all()
    assert RMSNorm(D, trained=False).state_dict() == {} and "no gain" in str(RMSNorm(D, trained=False)) and "alpha_p=0.8" in str(XIELU())


def test_smooth_swiglu_changes_the_range_and_nothing_else() -> None:
    gate, up, down, dy = normal(5, 32, seed=5, scale=30), normal(5, 32, seed=6), normal(16, 32, seed=7), normal(5, 16, seed=8)
    gate[2] = 0
    tensors = [t.double().requires_grad_() for t in (gate, up, down)]
    y, s = smooth_swiglu(tensors[0], tensors[1])
    out = (y @ tensors[2].t()) * s
    out.backward(dy.double())
    plain = [t.double().requires_grad_() for t in (gate, up, down)]
    expected = (F.silu(plain[0]) * plain[1]) @ plain[2].t()
    expected.backward(dy.double())
    torch.testing.assert_close(out, expected)
    for a, b in zip(tensors, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(s[:, 0], gate.abs().amax(1).double().where(gate.abs().amax(1) > 0, 1.0)) and y.isfinite().all()
    assert y.abs().max() <= up.abs().max()


def model64(config: GPTConfig, p: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float64 from the parameters, written from the paper's equations and not from nn/gpt.py."""
    arch, heads, groups, size = config.arch, config.heads, config.groups, config.head
    x = p["embedding.weight"][tokens] * (1 / config.init_std if arch.embedding == "unit" else 1)
    batch, seq, _ = x.shape
    angle = torch.arange(seq, dtype=torch.float64)[:, None] * config.rope_base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turn = torch.polar(torch.ones_like(angle), angle)
    causal = torch.ones(seq, seq, dtype=torch.bool).triu(1)

    def rotary(t: torch.Tensor) -> torch.Tensor:
        z = torch.complex(t[..., : size // 2], t[..., size // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    def bound(t: torch.Tensor, name: str) -> torch.Tensor:
        if arch.qk == "tanh":
            return torch.tanh(p[f"{name}.alpha"] * t)
        return t if arch.qk == "none" else norm64(t, p.get(f"{name}.weight"))

    def post(y: torch.Tensor, name: str) -> torch.Tensor:
        if arch.post_norm:
            return norm64(y, p[f"{name}.weight"])
        return y * p[f"{name}.weight"] if arch.layer_scale else y

    for i in range(config.layers):
        block = f"blocks.{i}"
        h = norm64(x, p[f"{block}.attention_norm.weight"]) if arch.pre_norm else x
        wq, wk, wv = p[f"{block}.attention.qkv.weight"].split((heads * size, groups * size, groups * size))
        q, k, v = ((h @ w.t()).view(batch, seq, -1, size).transpose(1, 2) for w in (wq, wk, wv))
        q, k = rotary(bound(q, f"{block}.attention.q_norm")), rotary(bound(k, f"{block}.attention.k_norm"))
        k, v = k.repeat_interleave(heads // groups, dim=1), v.repeat_interleave(heads // groups, dim=1)
        scores = (q @ k.transpose(-1, -2) * (arch.softmax_gain / math.sqrt(size))).masked_fill(causal, -math.inf)
        a = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, -1) @ p[f"{block}.attention.proj.weight"].t()
        x = x + post(a, f"{block}.attention_post")
        h = norm64(x, p[f"{block}.mlp_norm.weight"]) if arch.pre_norm else x
        if arch.gated:
            gate, up = (h @ p[f"{block}.mlp.gate_up.weight"].t()).chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = h @ p[f"{block}.mlp.up.weight"].t()
            activation = f"{block}.mlp.activation"
            h = F.gelu(h) if arch.activation == "gelu" else xielu64(h, p[f"{activation}.alpha_p"], p[f"{activation}.alpha_n"])
        x = x + post(h @ p[f"{block}.mlp.down.weight"].t(), f"{block}.mlp_post")
    return (norm64(x, p["norm.weight"]) if arch.final_norm else x) @ p["head.weight"].t()


@pytest.mark.parametrize("kv_heads", [0, 2, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_and_all_its_gradients(name: str, kv_heads: int) -> None:
    config = GPTConfig(vocab=40, layers=2, width=D, heads=4, ffn=64, seq=S, kv_heads=kv_heads, arch=ARCHITECTURES[name])
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():  # weights large enough that every nonlinearity works
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(0.2 * torch.randn(p.shape))
    tokens = torch.randint(0, 40, (B, S + 1), generator=torch.Generator().manual_seed(9))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    parameters = {key: p.detach().double().requires_grad_() for key, p in model.named_parameters()}
    expected = F.cross_entropy(model64(config, parameters, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, p in model.named_parameters():
        assert_close(p.grad, parameters[key].grad, 2e-4)
    assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == config.parameters


def streams(name: str, layers: int = 16, width: int = 128) -> tuple[GPT, list[torch.Tensor]]:
    """A fresh model and its residual stream after the embedding and after every block."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab=512, layers=layers, width=width, heads=4, seq=32, arch=from_name(name)))
    x = model.embedding(torch.randint(0, 512, (4, 32))) * model.multiplier
    found = [x]
    for block in model.blocks:
        found.append(block(found[-1], model.rope))
    return model, found


@pytest.mark.parametrize("name", ["fog-max", "fog-opt", "fog-flash"])
def test_fog_starts_with_a_unit_stream_and_branches_of_one_over_sqrt_depth(name: str) -> None:
    model, found = streams(name)
    assert found[0].std().item() == pytest.approx(1.0, abs=0.03), "embedding multiplier 1 / 0.02"
    block = model.blocks[0]
    assert block.attention.proj.weight.std().item() == pytest.approx(0.02, rel=0.05), "no smaller than the rest: the norm follows"
    before = block.attention(found[0], model.rope)
    energy, rms = before.square().mean(-1), block.attention_post(before, torch.zeros_like(before)).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, 0.25 * (energy / (energy + 1e-5)).sqrt())
    assert rms.min() > 0.22, "every token's branch has RMS 1 / sqrt(16), less what eps takes"
    assert (block.mlp_post.weight == 0.25).all() and block.mlp_post.weight.requires_grad
    # 32 branches of variance 1/16 on a unit stream: 3 if independent
    assert found[-1].square().mean().item() == pytest.approx(3.0, rel=0.4)
    assert found[-1].square().mean() > found[8].square().mean() > found[1].square().mean()


def test_baselines_start_as_they_should() -> None:
    _, llama = streams("llama3")
    assert llama[0].std().item() == pytest.approx(0.02, rel=0.03)
    op, found = streams("op")
    assert found[0].std().item() == pytest.approx(1.0, abs=0.03)
    assert (op.blocks[0].attention_post.weight == 0.25).all() and isinstance(op.blocks[0].attention_post, LayerScale)
    olmo, _ = streams("olmo2")
    assert (olmo.blocks[0].mlp_post.weight == 1).all() and olmo.blocks[0].attention.q_norm.weight is not None
    fog, _ = streams("fog-max")
    assert fog.blocks[0].attention.q_norm.weight is None and not any("norm" in key and "post" not in key for key in fog.state_dict())
    for model in (op, olmo, fog):
        for key, p in model.named_parameters():
            if p.dim() == 2 and "proj" not in key and "down" not in key:
                assert p.std().item() == pytest.approx(0.02, rel=0.05)


def test_queries_and_keys_are_bounded() -> None:
    """Whatever the projections do, FOG's logits are at most softmax_gain * sqrt(E); Llama3's are not."""
    largest = {}
    for name in ("llama3", "fog-max", "fog-flash"):
        model, _ = streams(name, layers=1)
        attention, x = model.blocks[0].attention, normal(1, 32, 128, seed=11, scale=100)
        q, k, _ = attention.qkv(x).view(1, 32, 3, 4, 32).permute(2, 0, 3, 1, 4)
        largest[name] = (attention.q_norm(q) @ attention.k_norm(k).transpose(-1, -2)).abs().max().item() * attention.scale
    bound = math.sqrt(2) * math.sqrt(32)
    assert largest["fog-max"] <= bound * 1.001 and largest["fog-flash"] <= bound * 1.001 < largest["llama3"]


def test_smooth_swiglu_model_equals_llama3() -> None:
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(12))
    logits = []
    for arch in (LLAMA3, SMOOTH_SWIGLU):
        torch.manual_seed(2)
        logits.append(GPT(GPTConfig(width=64, heads=2, ffn=96, seq=16, arch=arch))(tokens))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="heads=4 must be a multiple of kv_heads=3"):
        GPTConfig(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="kv_heads=-1"):
        GPTConfig(heads=4, kv_heads=-1)
    with pytest.raises(ValueError, match="333 is odd, use an even width"):
        GPT(GPTConfig(ffn=333, arch=FOG_MAX))
