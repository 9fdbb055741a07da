"""Split, tanh and rotation of queries and keys as one operation inside Megatron's SelfAttention, beside the way through Megatron's own parts."""

from __future__ import annotations

import types
import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import fog_models as models  # noqa: E402
from assertions import nodes_behind  # noqa: E402

from fp8_recipes.architecture import from_name  # noqa: E402

FLASH = from_name("fog-flash")


def build(seed=2, **changes):
    """GPTModel of fog-flash with alphas away from their initial value."""
    torch.manual_seed(seed)
    model = models.build(FLASH, **changes)
    with torch.no_grad():
        for index, layer in enumerate(model.decoder.layers):
            layer.self_attention.q_layernorm.alpha.fill_(0.8 + index)
            layer.self_attention.k_layernorm.alpha.fill_(1.3 - index / 2)
    return model


def trained(model):
    """(loss, gradients) of one step."""
    with models.on_cpu():
        loss = models.run(model, *models.batch()).mean()
        loss.backward()
    return loss.detach(), models.gradients(model)


def ways(model):
    """Names of the autograd functions of this package that one pass of the attention of the first layer meets."""
    return nodes_behind(attend(model.decoder.layers[0].self_attention)) & {"_BoundAndRotatedBackward", "_TanhBackward"}


def attend(attention, x=None, *, positions=models.SEQ, **kwargs):
    """Output of an attention layer of `x` [s, b, h], causal."""
    if x is None:
        x = hidden()
    dim = attention.hidden_size_per_attention_head
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(positions).float(), frequency).repeat(1, 2)[:, None, None]
    mask = torch.ones(1, 1, len(x), len(x), dtype=torch.bool).triu(1)
    with models.on_cpu():
        return attention(x, attention_mask=mask, **{"rotary_pos_emb": angles} | kwargs)[0]


def go_apart(attention):
    """Megatron's way from now on, rotation in torch."""
    attention.separate, attention.config.apply_rope_fusion = "asked by the test", False


def hidden(dtype=torch.float32):
    return torch.randn(models.SEQ, models.BATCH, models.WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()


@pytest.mark.parametrize("groups_", [models.GROUPS, models.HEADS, 1], ids=lambda n: f"{models.HEADS} heads, {n} groups")
def test_loss_and_gradients_are_those_of_megatrons_parts(groups, groups_):
    one, apart = (build(apply_rope_fusion=fused, num_query_groups=groups_) for fused in (True, False))
    assert ways(one) == {"_BoundAndRotatedBackward"} and ways(apart) == {"_TanhBackward"}
    (loss, gradients), (expected_loss, expected) = trained(one), trained(apart)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == expected[name].dtype and gradient.shape == expected[name].shape
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_bf16_rounds_less_often(groups):
    """Both ways beside fp32; of the two, the one operation is not the farther one."""
    attention, rounded = (build().decoder.layers[0].self_attention for _ in range(2))
    with torch.no_grad():
        for parameter, source in zip(rounded.bfloat16().parameters(), attention.parameters(), strict=True):
            source.copy_(parameter)
    weights = [p for p in attention.parameters() if p.requires_grad]
    dy = hidden().detach().bfloat16()
    x = hidden(torch.bfloat16)
    exact = torch.autograd.grad(attend(attention, x.float()), weights, dy.float())
    errors = []
    for go in (lambda _: None, go_apart):
        go(rounded)
        found = torch.autograd.grad(attend(rounded, x), [p for p in rounded.parameters() if p.requires_grad], dy)
        errors.append([((f.float() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)])
    for name, one, apart in zip([n for n, _ in attention.named_parameters()], *errors, strict=True):
        if "alpha" in name:
            assert one < 0.1, f"{name}: {one:.2e}"  # sums that nearly cancel
        else:
            assert one < 0.02 and one <= 1.1 * apart, f"{name}: {one:.2e}, separately {apart:.2e}"


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ],
    ids=["full", "core_attn"],
)
def test_recompute_changes_no_bit(groups, monkeypatch, recompute):
    from megatron.core.tensor_parallel import random as megatron_random

    generator = torch.Generator()
    monkeypatch.setattr(megatron_random, "_get_all_rng_states", lambda: (torch.get_rng_state(), generator.get_state(), {}))
    monkeypatch.setattr(megatron_random, "_set_all_rng_states", lambda *_: None)
    loss, gradients = trained(build())
    again = build(**recompute)
    again_loss, again_gradients = trained(again)
    assert torch.equal(loss, again_loss) and all(torch.equal(gradients[name], g) for name, g in again_gradients.items())


def test_only_the_projection_is_kept(groups):
    attention = build().decoder.layers[0].self_attention
    kept = []
    for go in (lambda _: None, go_apart):
        go(attention)
        seen = {}

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = hidden()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = attend(attention, x)
        kept.append(sum(seen.values()))
        del out
    queries = 4 * models.SEQ * models.BATCH * models.WIDTH
    assert kept[0] <= kept[1] - queries, "no copy of the queries"


def test_hooks_of_the_modules_that_have_the_alphas_run(groups):
    """Data parallelism waits for a parameter's all-gather in a hook of its module (--overlap-param-gather)."""
    attention = build().decoder.layers[0].self_attention
    seen = []
    for module in attention.modules():
        module.register_forward_pre_hook(lambda module, _: seen.extend(module.parameters(recurse=False)))
    attend(attention)
    assert sum(p is attention.q_layernorm.alpha for p in seen) == 1 and sum(p is attention.k_layernorm.alpha for p in seen) == 1


def test_passes_without_gradients_and_evaluation(groups):
    model = build()
    attention = model.decoder.layers[0].self_attention
    expected = attend(attention).detach()
    with torch.no_grad():
        assert torch.equal(attend(attention), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(attend(attention.eval()), expected)


STATIC = [
    ({"apply_rope_fusion": False}, "--no-rope-fusion"),
    ({"rotary_interleaved": True}, "--rotary-interleaved"),
    ({"no_rope_freq": [1, 0]}, "--no-rope-freq: no rotary positions in this layer"),
    ({"mrope_section": [2, 3, 3]}, "--mrope-section"),
    ({"test_mode": True}, "test_mode"),
    ({"kv_channels": 24}, "heads of size 24"),
]


@pytest.mark.parametrize(("changes", "reason"), STATIC, ids=[reason.split(":")[0] for _, reason in STATIC])
def test_layers_that_go_megatrons_way(groups, changes, reason):
    from fp8_recipes.megatron import fog_attention, report

    model = build(**changes)
    first, second = (layer.self_attention for layer in model.decoder.layers)
    assert first.separate == reason and (second.separate is None) == ("no_rope_freq" in changes)
    lines = report._attention([model])
    assert lines[0] == f"attention of layers {'1' if len(lines) == 2 else '1-2'}: split, tanh and rotation one by one: {reason}"
    assert lines[1:] in ([], ["attention of layers 2: split, tanh and rotation as one operation"])
    if first.config.apply_rope_fusion:
        return  # TransformerEngine's rotation would need a GPU
    assert ways(model) == {"_TanhBackward"} and fog_attention.describe(first).endswith(reason)


def test_rules_about_ranks_and_factors(groups):
    from fp8_recipes.megatron.fog_attention import static_reason

    attention = build().decoder.layers[0].self_attention
    assert static_reason(attention) is None
    attention.world_size = 2 * models.GROUPS
    assert static_reason(attention) == "fewer query groups than tensor-parallel ranks"
    attention.world_size, attention._yarn_concentration_factor = 1, 1.1
    assert static_reason(attention) == "YaRN's factor on cosines and sines"
    attention._yarn_concentration_factor = 1.0
    for flag in ("attention_output_gate", "fine_grained_activation_offloading"):
        setattr(attention.config, flag, True)
        assert static_reason(attention) == f"--{flag.replace('_', '-')}"
        setattr(attention.config, flag, False)


def test_calls_that_go_megatrons_way(groups, monkeypatch):
    """By their reason; and one of them, a model without rotary positions, all the way."""
    from megatron.core.inference.utils import InferenceMode

    from fp8_recipes.megatron import fog_attention

    attention = build().decoder.layers[0].self_attention
    x, head = hidden(), models.WIDTH // models.HEADS
    angles = torch.zeros(models.SEQ, 1, 1, head)

    def reason(rotary=angles, args=(), **kwargs):
        return fog_attention.call_reason(attention, x, rotary, args, kwargs)

    assert reason() is None and reason(attention_bias=x, packed_seq_params=None) is None
    assert reason(packed_seq_params=types.SimpleNamespace(qkv_format="thd")) == "called with packed_seq_params"
    assert reason(inference_context=object(), sequence_len_offset=x) == "called with inference_context, sequence_len_offset"
    assert reason(args=(None,)) == "called with arguments by position"
    wanted = f"not contiguous fp32 ({models.SEQ}, 1, 1, {head})"
    assert reason(None) == f"rotary positions are NoneType, {wanted}"
    assert reason((angles, angles)) == f"rotary positions are tuple, {wanted}"
    for other in (angles[..., : head // 2], angles[:-1], angles.expand(-1, 2, -1, -1), angles.double()):
        assert reason(other) == f"rotary positions are {other.dtype} {tuple(other.shape)}, {wanted}"
    monkeypatch.setattr(fog_attention, "LARGEST_ANGLE", models.SEQ - 1)
    assert reason() == f"more than {models.SEQ - 1} positions"
    monkeypatch.setattr(InferenceMode, "_is_active", True)
    assert reason() == "an inference engine is active"
    monkeypatch.undo()
    fog_attention._warn.cache_clear()
    with pytest.warns(UserWarning, match="operation by operation: rotary positions are NoneType"):
        without = attend(attention, x, rotary_pos_emb=None)
    go_apart(attention)
    assert torch.equal(without, attend(attention, x, rotary_pos_emb=None))
    attention.separate, attention.config.apply_rope_fusion = None, True
    zero = attend(attention, x, rotary_pos_emb=angles)
    torch.testing.assert_close(zero, without, rtol=1e-5, atol=1e-6)  # no angle, no rotation


def test_checkpoints_have_the_same_entries(groups):
    """Written one way and read the other."""
    one, apart = (build(seed, apply_rope_fusion=fused) for seed, fused in ((2, True), (3, False)))
    state = {key: value for key, value in apart.state_dict().items() if value is not None}
    assert {key for key, value in one.state_dict().items() if value is not None} == set(state)
    for ours, theirs in ((one, apart), (apart, one)):
        assert list(ours.sharded_state_dict()) == list(theirs.sharded_state_dict())
    one.load_state_dict(apart.state_dict())
    assert trained(one)[0].item() == pytest.approx(trained(apart)[0].item(), rel=1e-6)
