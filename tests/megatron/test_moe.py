"""Megatron's MoE layer under fp8_flow_moe: the released wheel's own layer on the CPU, its values beside stock bf16, and which way ran."""

from __future__ import annotations

import argparse

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import moe_layers as layers  # noqa: E402
from assertions import assert_bitwise, snr_db  # noqa: E402

from fp8_recipes import RecipeError  # noqa: E402
from fp8_recipes.megatron import moe, weight_scaling_hook  # noqa: E402
from fp8_recipes.megatron.weight_scaling_hook import attach  # noqa: E402
from fp8_recipes.weight_scaling import ATTRIBUTE  # noqa: E402

pytestmark = pytest.mark.usefixtures("groups")

SNR = 20.0
"""dB that one FP8 layer keeps against bf16: five E4M3 operands between x and y or dx, 31.5 dB each (docs/numerics.md), leave 24.5."""


@pytest.fixture
def calls(monkeypatch):
    """Calls of moe_experts, as (arguments, keywords): which way a layer took."""
    seen = []
    experts = moe.moe_experts

    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return experts(*args, **kwargs)

    monkeypatch.setattr(moe, "moe_experts", spy)
    return seen


def tokens(sequence=32, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sequence, batch, layers.HIDDEN, generator=generator).bfloat16() for _ in range(2)]


# --- values beside stock ----------------------------------------------------------------------------------------------------------------------------------

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
GELU = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
ROUTING = {
    "top-2": {},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "top-6": {"moe_router_topk": 6},
    "top-8, every expert": {"moe_router_topk": 8},
    "aux loss and z loss": AUX | {"moe_z_loss_coeff": 1e-2},
    "sequence aux loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "expert bias": {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "router in bf16": {"moe_router_dtype": None},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "shared experts": {"moe_shared_expert_intermediate_size": 128},
    "GeLU": GELU,
    "GeLU, top-8": GELU | {"moe_router_topk": 8},
}


@pytest.mark.parametrize("routing", ROUTING)
def test_layer_has_the_values_of_stock_bf16(calls, routing):
    """Output and every gradient, the router's with its losses, beside the same layer under Megatron's own forward."""
    layer = layers.build(layers.config_of(**ROUTING[routing]))
    if routing == "expert bias":
        layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, layers.EXPERTS))
    stock = layers.stock_bf16(layer)
    x, dy = tokens()
    y, dx, grads = layers.gradients(layer, x, dy)
    expected_y, expected_dx, expected = layers.gradients(stock, x, dy)
    assert len(calls) == 1, "the stock layer must not take our way, ours must"
    assert calls[0][1]["activation"] == ("gelu" if "GeLU" in routing else "swiglu")
    assert grads.keys() == expected.keys() and len(grads) >= 2 * layers.EXPERTS + 1
    assert snr_db(expected_y, y) > SNR and snr_db(expected_dx, dx) > SNR
    for name, truth in expected.items():
        assert snr_db(truth, grads[name]) > (15.0 if name == "router.weight" else SNR), name


def test_router_losses_reach_the_router():
    """With dy = 0 the router's gradient is that of its losses alone, and exactly stock's."""
    layer = layers.build(layers.config_of(**AUX, moe_z_loss_coeff=1e-2))
    stock = layers.stock_bf16(layer)
    x, _ = tokens()
    gradient = layers.gradients(layer, x, torch.zeros_like(x))[2]["router.weight"]
    assert gradient.abs().max() > 0
    assert_bitwise(gradient, layers.gradients(stock, x, torch.zeros_like(x))[2]["router.weight"])


def test_expert_bias_counts_tokens_as_stock_does():
    config = layers.config_of(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    layer = layers.build(config)
    x, dy = tokens()
    layers.gradients(layer, x, dy)
    assert layer.router.local_tokens_per_expert.sum() == 32 * 4 * 2


def test_evaluation_runs_the_same_way(calls):
    layer = layers.build(layers.config_of(**AUX))
    x, dy = tokens()
    y, _, _ = layers.gradients(layer, x, dy)
    layer.eval()
    with torch.no_grad(), layers.on_cpu():
        assert_bitwise(layer(x)[0], y)
    assert len(calls) == 2


def test_padding_mask_reaches_the_router():
    """Padded tokens are left out of the auxiliary loss; the mask comes [batch, sequence] and the router wants [sequence, batch]."""
    layer = layers.build(layers.config_of(**AUX))
    x, _ = tokens()
    mask = torch.zeros(4, 32, dtype=torch.bool)
    mask[1, 5:] = True
    seen = []
    layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with layers.on_cpu():
        layer(x, padding_mask=mask)
    assert torch.equal(seen[0], mask.t())


# --- from the router's map to rows ------------------------------------------------------------------------------------------------------------------------


def test_chosen_experts_are_the_map_in_rising_order():
    routing_map = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    probs = torch.rand(4, 4, dtype=torch.float64).masked_fill(~routing_map, 0.0).requires_grad_()
    index, prob = moe.chosen_experts(probs, routing_map, 2)
    assert index.dtype == torch.int32 and prob.dtype == torch.float32 and index.is_contiguous() and prob.is_contiguous()
    assert index.tolist() == [[0, 2], [1, 3], [2, -1], [-1, -1]]
    expected = [[probs[0, 0], probs[0, 2]], [probs[1, 1], probs[1, 3]], [probs[2, 2], 0.0], [0.0, 0.0]]
    assert prob.tolist() == [[float(torch.as_tensor(v).float()) for v in row] for row in expected]
    prob.backward(torch.arange(1.0, 9.0).view(4, 2))
    assert probs.grad.tolist() == [[1, 0, 2, 0], [0, 3, 0, 4], [0, 0, 5, 0], [0, 0, 0, 0]]


def test_a_chosen_expert_with_probability_zero_stays_chosen():
    """Softmax may underflow; the largest K probabilities would name another expert, and the router's gradient would go to it."""
    probs = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    index, prob = moe.chosen_experts(probs, torch.tensor([[False, False, True, True]]), 2)
    assert index.tolist() == [[2, 3]] and prob.tolist() == [[1.0, 0.0]]


# --- parameters, main_grad, scales ------------------------------------------------------------------------------------------------------------------------


def prepare_for_ddp(layer):
    """What Megatron's DistributedDataParallel puts on a parameter."""
    for parameter in layer.experts.parameters():
        parameter.main_grad = torch.full(parameter.shape, 0.5)
        parameter.grad_added_to_main_grad = False


def test_parameters_are_megatrons_own():
    layer = layers.build(layers.config_of())
    names = [name for name, _ in layer.named_parameters()]
    experts = [f"experts.linear_fc{n}.weight{e}" for n in (1, 2) for e in range(layers.EXPERTS)]
    assert names == ["router.weight", *experts]
    x, dy = tokens()
    layers.gradients(layer, x, dy)
    assert [name for name, _ in layer.named_parameters()] == names, "the flow registers nothing"
    assert not any(moe._ATTRIBUTE in key for key in layer.state_dict())


def test_gradients_of_two_microbatches_accumulate_in_main_grad():
    layer = layers.build(layers.config_of())
    batches = [tokens(seed=s) for s in (1, 2)]
    separate = [layers.gradients(layer, *b)[2] for b in batches]
    prepare_for_ddp(layer)
    assert layer.experts.linear_fc1.is_first_microbatch is False  # set by the runs above; Megatron sets it True at each step
    hooks = []
    for parameter in layer.experts.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: hooks.append(p))
    for x, dy in batches:
        grads = layers.gradients(layer, x, dy)[2]
    assert len(hooks) == 2 * 2 * layers.EXPERTS, "DistributedDataParallel's hooks wait for a gradient of every parameter"
    for name, parameter in layer.experts.named_parameters():
        first, second = (g[f"experts.{name}"].float() for g in separate)
        assert parameter.grad_added_to_main_grad and grads[f"experts.{name}"].shape == parameter.shape
        torch.testing.assert_close(parameter.main_grad, 0.5 + first + second, rtol=2e-2, atol=2e-2 * float(first.abs().max()))


def test_first_microbatch_is_over_after_the_forward_pass():
    layer = layers.build(layers.config_of())
    assert layer.experts.linear_fc1.is_first_microbatch and layer.experts.linear_fc2.is_first_microbatch
    layers.gradients(layer, *tokens())
    assert not layer.experts.linear_fc1.is_first_microbatch and not layer.experts.linear_fc2.is_first_microbatch


def test_pre_forward_hooks_of_the_linears_run():
    """DistributedDataParallel waits in them for gathered parameters."""
    layer = layers.build(layers.config_of())
    seen = []
    for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2):
        linear.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    layers.gradients(layer, *tokens())
    assert seen == ["TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"]


def test_predicted_scales_of_the_experts_follow_the_optimizer():
    layer = layers.build(layers.config_of())
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=1e-3, betas=(0.9, 0.95))
    clock = attach([layer], optimizer, interval=500, experts=True)
    weights = list(layer.experts.parameters())
    assert all(getattr(w, ATTRIBUTE).clock is clock for w in weights) and not hasattr(layer.router.weight, ATTRIBUTE)
    x, dy = tokens()
    for step in range(3):
        layers.gradients(layer, x, dy)
        optimizer.step()
        assert clock.steps == step + 1
    for weight in weights:
        scale = getattr(weight, ATTRIBUTE)
        assert scale.anchor_step == 0, "measured once, at the first use"
        amax, increment = scale.amax_and_increment(weight)
        assert float(weight.detach().abs().max()) <= float(amax) + increment


def test_dense_recipes_do_not_track_experts():
    layer = layers.build(layers.config_of())
    attach([layer], torch.optim.AdamW(layer.parameters(), betas=(0.9, 0.95)), interval=5)
    assert not any(hasattr(w, ATTRIBUTE) for w in layer.parameters())


@pytest.mark.parametrize(
    ("recipe", "tracked"), [("fp8_flow_moe", (True, True)), ("fp8_flow_moe:dense=bf16", (False, True)), ("fp8_flow_moe:weight_scale=measured", (True, False))]
)
def test_only_weights_that_are_predicted_are_tracked(monkeypatch, recipe, tracked):
    """(dense, experts) for each recipe; moss predicts."""
    asked = []
    monkeypatch.setattr(weight_scaling_hook, "attach", lambda chunks, optimizer, **kwargs: asked.append((kwargs["dense"], kwargs["experts"])))
    monkeypatch.setattr(weight_scaling_hook.report, "precision_table", lambda args, chunks: "")
    weight_scaling_hook.on_model_and_optimizer(argparse.Namespace(fp8="e4m3", fp8_recipe=recipe), [], None)
    assert asked == [tracked]


@pytest.mark.parametrize("recipes", [("fp8_flow_moe", None), (None, "fp8_flow_moe")], ids=["flow to bf16", "bf16 to flow"])
def test_checkpoint_of_one_recipe_loads_under_the_other(tmp_path, recipes):
    """torch_dist, as Megatron saves: same keys, same values, whichever way the layer runs."""
    pytest.importorskip("psutil", reason="psutil is not installed; Megatron's torch_dist writer needs it (pip install psutil)")
    from megatron.core import dist_checkpointing

    source, target = (layers.build(layers.config_of(fp8=r and "e4m3", fp8_recipe=r or "delayed"), seed=seed) for seed, r in enumerate(recipes))
    if recipes[0]:
        layers.gradients(source, *tokens())  # what a run leaves on the modules must not reach the checkpoint
    with layers.on_cpu():
        dist_checkpointing.save(source.sharded_state_dict(prefix="mlp."), str(tmp_path))
        loaded = dist_checkpointing.load(target.sharded_state_dict(prefix="mlp."), str(tmp_path))
    target.load_state_dict({key.removeprefix("mlp."): value for key, value in loaded.items()})
    for (name, expected), (other, got) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        assert name == other
        assert_bitwise(got, expected, name)


# --- recompute --------------------------------------------------------------------------------------------------------------------------------------------


def saved_bytes(layer, x):
    """Bytes that autograd keeps for backward while the layer runs, parameters and the input not counted."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), layers.on_cpu():
        y, _ = layer(x)
    del y
    return sum(kept.values())


def test_recompute_keeps_fp8_only_and_changes_no_value(calls):
    x, dy = tokens()
    results, kept, saved = {}, {}, {}
    for name, modules in (("none", None), ("moe_act", ["moe_act"]), ("moe", ["moe"])):
        selective = {} if modules is None else {"recompute_granularity": "selective", "recompute_modules": modules}
        layer = layers.build(layers.config_of(fp8_recipe="fp8_flow_moe:moe_saved=activation", **selective))
        results[name] = layers.gradients(layer, x, dy)
        saved[name] = calls[-1][1]["recipe"].moe_saved
        kept[name] = saved_bytes(layer, x.requires_grad_())
    assert saved == {"none": "activation", "moe_act": "h", "moe": "input"}
    copies, wide = 32 * 4 * 2, 2 * layers.FFN
    assert kept["none"] - kept["moe_act"] >= copies * layers.FFN, "the SwiGLU's output, one byte a value"
    assert kept["moe_act"] - kept["moe"] >= copies * wide, "fc1's output, one byte a value"
    for name in ("moe_act", "moe"):
        assert_bitwise(results[name][0], results["none"][0])
        for parameter, gradient in results["none"][2].items():
            assert snr_db(gradient, results[name][2][parameter]) > 24, parameter


def test_moe_recompute_covers_the_shared_experts():
    config = layers.config_of(recompute_granularity="selective", recompute_modules=["moe"], moe_shared_expert_intermediate_size=128)
    layer = layers.build(config)
    assert layer.moe_layer_recompute and not layer.shared_experts_recompute
    moe.flow_of(layer, moe.recipe_of(layer))
    assert layer.shared_experts_recompute


# --- which layers -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "stock"), [(1, True), (2, False), (3, False), (4, True)])
def test_first_and_last_layers_stay_megatrons(calls, monkeypatch, number, stock):
    layer = layers.build(layers.config_of(first_last_layers_bf16=True), layer_number=number)
    assert (moe.stock_reason(layer) == "bf16 (first / last)") == stock
    assert (moe.describe(layer) == "Megatron's own modules, bf16 (first / last)") == stock
    if stock:
        layer.experts = layers.StockExperts(layer.experts)
        layer.token_dispatcher = layers.stock_bf16(layers.build(layers.config_of())).token_dispatcher
    layers.gradients(layer, *tokens())
    assert len(calls) == (0 if stock else 1)


def test_precision_file_of_the_experts_wins(calls):
    layer = layers.build(layers.config_of())
    layer.experts.linear_fc1.te_quant_params = object()
    assert moe.recipe_of(layer) is None
    assert moe.describe(layer) == "Megatron's own modules, as the precision file says"


@pytest.mark.parametrize("recipe", ["moss", "tensorwise", "delayed"])
def test_other_recipes_leave_the_layer_alone(recipe):
    assert moe.recipe_of(layers.build(layers.config_of(fp8_recipe=recipe))) is None


def test_description_says_what_runs():
    text = moe.describe(layers.build(layers.config_of()))
    assert text == "8 local experts as one FP8 function from router to combined output; no dispatch (one rank); kept for backward: h"
    assert moe.describe(layers.build(layers.config_of(**GELU))) == f"{text}; gelu without a gate"


BAD_LAYERS = {
    "SequentialMLP": {"moe_grouped_gemm": False},
    "neither SwiGLU": {"activation_func": torch.nn.functional.gelu},
    "nor, without a gate, exact GeLU": {"gated_linear_unit": False, "activation_func": torch.nn.functional.silu},
    "exact GeLU or xIELU": GELU | {"use_te_activation_func": True},
    "capacity factor": {"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "aux_loss"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "--moe-apply-probs-on-input": {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
}


@pytest.mark.parametrize("words", BAD_LAYERS)
def test_layers_that_cannot_be_honoured_are_refused(calls, words):
    layer = layers.build(layers.config_of(**BAD_LAYERS[words]))
    with pytest.raises(RecipeError, match=words):
        moe.describe(layer)
    with pytest.raises(RecipeError, match="cannot run MoE layer 2"), layers.on_cpu():
        layer(tokens()[0])
    assert not calls


def test_graph_parts_are_refused():
    layer = layers.build(layers.config_of())
    with pytest.raises(RuntimeError, match="--cuda-graph-impl none"):
        layer(tokens()[0], intermediate_tensors=(1, 2))
