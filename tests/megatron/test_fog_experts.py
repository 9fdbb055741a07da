"""FOG with experts under fp8_flow_moe: the released wheel's GPTModel on the CPU, its loss and every gradient beside Megatron's own experts in bf16."""

from __future__ import annotations

import copy
import unittest.mock
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import fog_models as models  # noqa: E402
import moe_layers as layers  # noqa: E402
from assertions import snr_db  # noqa: E402
from meta_model import reports  # noqa: E402

from fp8_recipes import RecipeError, ops  # noqa: E402
from fp8_recipes.architecture import from_name  # noqa: E402
from fp8_recipes.megatron import arguments, fog, moe  # noqa: E402

pytestmark = pytest.mark.usefixtures("groups")

EXPERTS, EXPERT_FFN = 8, 96
SNR = 19.0
"""dB that a gradient keeps through two layers, each of five E4M3 operands in a row (24.5 dB, docs/numerics.md) behind post-norms that raise small branches."""


def build(architecture, recipe: str | None):
    """GPTModel whose attention is Megatron's local one in bf16 and whose experts are TransformerEngine's grouped linears, in the FP8 flow or, without a recipe,
    by `moe_layers.StockExperts`."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = models.config_of(
        architecture,
        num_moe_experts=EXPERTS,
        moe_router_topk=EXPERTS,  # of so few tokens, one that goes elsewhere for a rounding in the layer before would be most of the difference
        moe_ffn_hidden_size=EXPERT_FFN,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall" if recipe else "allgather",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        expert_tensor_parallel_size=1,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        fp8_recipe=recipe or "delayed",
    )
    with unittest.mock.patch.object(LocalSpecProvider, "grouped_mlp_modules", lambda _, grouped: TESpecProvider().grouped_mlp_modules(grouped)):
        spec = fog.block_spec(architecture, config)
    torch.manual_seed(0)
    with models.on_cpu(experts=True), layers.pretend_gpu():
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=models.VOCAB,
            max_sequence_length=models.SEQ,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ).bfloat16()
    return model


def run(model):
    """(loss, gradients by name)."""
    with models.on_cpu(experts=True), layers.on_cpu():
        loss = models.run(model, *models.batch()).float().mean()
        loss.backward()
    return loss.detach(), {n.replace("experts.experts.", "experts."): p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["fog-flash", "fog-opt", "op", "fog-max"])
@pytest.mark.parametrize("recipe", ["fp8_flow_moe:dense=bf16", "fp8_flow_moe:dense=bf16,moe_saved=activation"])
def test_loss_and_every_gradient_are_those_of_stock_experts(name, recipe, monkeypatch):
    taken: list[str] = []
    sizes: list[torch.Tensor] = []  # of xIELU's alphas' gradients if the terms of those sums had random signs; last layer first
    experts, backward = moe.moe_experts, ops.xielu_backward_quantize

    def spy(x, *args, **kwargs):
        taken.append(kwargs["activation"])
        return experts(x, *args, **kwargs)

    def sized(da, h, alpha, **how):
        gradients = backward(da, h, alpha, **how)
        weight, x = da.float() * how["prob"][:, None], ops.dequantize(h)
        weight[how["source"] < 0] = 0
        sizes.append(torch.stack([(weight * x.clamp(min=0) ** 2).norm(), (weight * (torch.expm1(x.clamp(max=0)) - x.clamp(max=0))).norm()]))
        return gradients

    monkeypatch.setattr(moe, "moe_experts", spy)
    monkeypatch.setattr(ops, "xielu_backward_quantize", sized)
    architecture = from_name(name)
    ours, stock = build(architecture, recipe), build(architecture, None)
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    for layer in stock.decoder.layers:
        layer.mlp.experts = layers.StockExperts(layer.mlp.experts)
    assert not any("layernorm" in key and "weight" in key for key in ours.state_dict() if "q_" not in key and "k_" not in key), "no norm in front of anything"
    (loss, gradients), (expected_loss, expected) = run(ours), run(stock)
    activation = architecture.activation
    assert taken == [activation] * models.LAYERS, "our model's layers took our way, the other's did not"
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3)
    assert gradients.keys() == expected.keys()
    compared = 0
    for key, truth in expected.items():
        if truth is None or not truth.any():
            assert gradients[key] is None or not gradients[key].any(), key
        elif truth.numel() > 1:
            assert snr_db(truth, gradients[key]) > SNR, f"{key}: {snr_db(truth, gradients[key]):.1f} dB"
            compared += 1
    assert compared > models.LAYERS * 8
    for index, layer in enumerate(ours.decoder.layers):
        gain = gradients[f"decoder.layers.{index}.mlp_bda.post.weight"]
        assert gain.abs().sum() > 0 and f"{activation} without a gate" in moe.describe(layer.mlp)
        if activation == "xielu":
            for which, alpha in enumerate(("alpha_p", "alpha_n")):
                key = f"decoder.layers.{index}.mlp.experts.activation_func.{alpha}"
                slope = layer.mlp.experts.activation_func.get_parameter(alpha).float().sigmoid()  # of softplus
                size = sizes[models.LAYERS - 1 - index][which] * slope
                assert (gradients[key] - expected[key]).abs() <= 4 * 10 ** (-SNR / 20) * size, key


MOE = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-router-dtype fp32 "
    "--moe-aux-loss-coeff 1e-2"
)


@pytest.fixture
def plain(base_flags):
    return base_flags.replace("--swiglu ", "").replace("--normalization RMSNorm ", "")


def test_reports_of_real_models_say_what_runs(plain):
    """GPTModel of the released wheel from the launcher's own path: FOG-flash and FOG-max with a dense first layer and shared experts, FOG-opt with experts
    alone."""
    shared = "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 256"
    lines, alone, trained = reports(
        f"{plain} {MOE} {shared} --fog flash --fp8-recipe fp8_flow_moe",
        f"{plain} {MOE} --fog opt --fp8-recipe fp8_flow_moe:dense=bf16",
        f"{plain} {MOE} {shared} --fog max --fp8-recipe fp8_flow_moe",
    )
    flow = "8 local experts as one FP8 function from router to combined output; no dispatch (one rank); kept for backward: h; gelu without a gate"
    for expected in (
        "decoder.layers.*.mlp.linear_fc1 1 768x256 FP8 moss",
        "decoder.layers.*.mlp.router 2-4 8x256 bf16, products in fp32",
        "decoder.layers.*.mlp.experts.linear_fc1 2-4 8 of 192x256 FP8 fp8_flow_moe",
        "decoder.layers.*.mlp.experts.linear_fc2 2-4 8 of 256x192 FP8 fp8_flow_moe",
        "decoder.layers.*.mlp.shared_experts.linear_fc1 2-4 384x256 FP8 moss",
        "decoder.layers.*.mlp_bda.post 1-4 256 bf16 (norm)",
        f"MoE layers 2-4: {flow}",
        "4 MLPs: in FP8 layers fc1, activation and fc2 as one function",
        "output_layer - 256x256 FP8 moss, dy e5m2",
        "TRACKED 65",  # 4 attentions, 1 dense FFN and 3 shared ones of 2 linears each, 3 layers of 8 experts with 2, the head
    ):
        assert expected in lines, expected
    assert lines[1].startswith("fog-flash(pre_norm=false") and lines[2].startswith("fp8_flow_moe(") and lines[3].startswith("other layers: moss(")
    assert not any("pre_mlp_layernorm" in line or "input_layernorm" in line or "final_layernorm" in line for line in lines + alone)
    for expected in (
        "decoder.layers.*.mlp.activation_func 1 1 bf16",
        "decoder.layers.*.mlp.experts.activation_func 2-4 1 bf16",
        "decoder.layers.*.mlp.shared_experts.activation_func 2-4 1 bf16",
        "decoder.layers.*.mlp.experts.linear_fc1 2-4 8 of 192x256 FP8 fp8_flow_moe",
        f"MoE layers 2-4: {flow.replace('gelu', 'xielu')}, one trained pair for all experts of a layer",
        "4 MLPs: in FP8 layers fc1, activation and fc2 as one function",
        "TRACKED 65",
    ):
        assert expected in trained, expected
    assert f"MoE layers 1-4: {flow}" in alone and "decoder.layers.*.self_attention.linear_qkv 1-4 768x256 bf16" in alone
    assert "output_layer - 256x256 bf16" in alone


@pytest.mark.parametrize(
    ("flags", "widths"),
    [
        ("--fog flash", (768, 192, None)),
        ("--fog max --moe-shared-expert-intermediate-size 256", (768, 192, 384)),
        ("--fog opt --moe-shared-expert-intermediate-size 256", (768, 192, 384)),
        ("--fog opt --ffn-width-factor 1 --moe-shared-expert-intermediate-size 256", (512, 128, 256)),
        ("--arch op --fp8-recipe fp8_flow_moe:dense=row", (768, 192, None)),
        ("--arch olmo2", (512, 128, None)),
        ("", (512, 128, None)),
    ],
)
def test_architecture_and_recipe_configure_together(configure, plain, monkeypatch, flags, widths):
    """(dense FFN, experts, shared experts). Without an architecture and without --swiglu: Megatron's plain GeLU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))  # --moe-grouped-gemm asks
    args, container = configure(f"--fp8-recipe fp8_flow_moe {MOE} {flags}", base=plain)
    config = container.model.transformer
    assert (config.ffn_hidden_size, config.moe_ffn_hidden_size, config.moe_shared_expert_intermediate_size) == widths
    assert moe.activation_of(SimpleNamespace(config=config, activation_func=config.activation_func)) == ("swiglu" if "olmo2" in flags else "gelu")
    assert args.fp8_recipe.startswith("fp8_flow_moe")


@pytest.mark.parametrize("recipe", ["fp8_flow_moe:attention=fp8", "fp8_flow_moe --fp8-attention"])
def test_attention_in_fp8_beside_experts(configure, plain, monkeypatch, recipe):
    """Every product of the block: experts in the flow, linears under moss, attention in TransformerEngine's FP8."""
    from megatron.core import fp8_utils

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    args, container = configure(f"--fog flash --fp8-recipe {recipe} {MOE} --num-attention-heads 2", base=plain)
    assert args.fp8_recipe == "fp8_flow_moe:attention=fp8" and arguments.fp8_attention(args)
    built = fp8_utils.get_fp8_recipe(container.model.transformer)
    assert built.fp8_dpa and (built.qfactory.recipe.name, built.qfactory.recipe.moe) == ("moss", "none")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--arch smooth-swiglu", r"--num-experts 8: smooth_swiglu has a factor per token behind the FFN, which is not built for experts; use --fog or swiglu"),
        ("--fog flash --moe-ffn-hidden-size 136", r"--moe-ffn-hidden-size is 204: FP8 products need multiples of 16"),
        ("--fog flash --use-te-activation-func", r"--use-te-activation-func: TransformerEngine's GeLU is the tanh approximation"),
    ],
)
def test_what_experts_cannot_do_is_refused_at_start(configure, plain, flags, words):
    with pytest.raises(RecipeError, match=words):
        configure(f"--fp8-recipe fp8_flow_moe {MOE} {flags}", base=plain)
