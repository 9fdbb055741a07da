"""--fp8-recipe fp8_flow_moe through Megatron's real parser: what is filled in, every refusal by name, what passes, and the start-up report of a real model."""

from __future__ import annotations

import pytest
from meta_model import reports

from fp8_recipes import RecipeError
from fp8_recipes.megatron import arguments

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

MOE = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-grouped-gemm --moe-token-dispatcher-type alltoall "
    "--moe-router-dtype fp32 --moe-aux-loss-coeff 1e-2"
)


def prepared(parse, flags, base=MOE, recipe="fp8_flow_moe"):
    args = parse(f"--fp8-recipe {recipe} {base} {flags}")
    return args, arguments.prepare(args)


REFUSALS = {
    "--moe-expert-capacity-factor 1.0": "--moe-expert-capacity-factor 1.0",
    "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity": "--moe-pad-expert-input-to-capacity",
    "--moe-expert-rank-capacity-factor 1.5": "--moe-expert-rank-capacity-factor",
    "--moe-router-topk 9": "--moe-router-topk 9",
    "--moe-apply-probs-on-input": "--moe-apply-probs-on-input",
    "--moe-latent-size 64": "--moe-latent-size",
    "--moe-token-dispatcher-type allgather": "use --moe-token-dispatcher-type alltoall",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep": "--moe-flex-dispatcher-backend hybridep",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep": "--moe-flex-dispatcher-backend ncclep",
    "--squared-relu": "activation --squared-relu",
    "--quick-geglu": "activation --quick-geglu",
    "--activation-func-clamp-value 7.0": "--activation-func-clamp-value",
    "--glu-linear-offset 1.0": "--glu-linear-offset",
    "--moe-single-grouped-weight": "--moe-single-grouped-weight",
    "--moe-mlp-glu-interleave-size 32": "--moe-mlp-glu-interleave-size",
    "--moe-use-upcycling": "--moe-use-upcycling",
    "--moe-shared-expert-intermediate-size 128 --moe-shared-expert-overlap": "--moe-shared-expert-overlap",
    "--use-grouped-gemm-for-shared-expert": "--use-grouped-gemm-for-shared-expert",
    "--moe-paged-stash": "--moe-paged-stash",
    "--tensor-model-parallel-size 2 --sequence-parallel": "--expert-tensor-parallel-size 2",
    "--expert-tensor-parallel-size 2": "--expert-tensor-parallel-size 2",
    "--expert-tensor-parallel-num-weight-shards 2": "--expert-tensor-parallel-num-weight-shards",
    "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1": "without --sequence-parallel",
    "--delay-wgrad-compute": "--delay-wgrad-compute",
    "--overlap-moe-expert-parallel-comm": "--overlap-moe-expert-parallel-comm",
    "--overlap-dispatch-backward-with-experts-wgrad": "--overlap-dispatch-backward-with-experts-wgrad",
    "--mtp-num-layers 1": "--mtp-num-layers 1",
    "--moe-ffn-hidden-size 136": "--moe-ffn-hidden-size is 136",
    "--moe-shared-expert-intermediate-size 24": "--moe-shared-expert-intermediate-size / TP 1 is 24",
    "--fp8-param-gather": "--fp8-param-gather",
    "--cuda-graph-impl local": "--cuda-graph-impl local",
    "--use-transformer-engine-op-fuser": "--use-transformer-engine-op-fuser",
    "--use-megatron-fsdp": "--use-megatron-fsdp",
    "--fine-grained-activation-offloading": "--fine-grained-activation-offloading",
    "--adam-beta1 0.99 --adam-beta2 0.95": "--adam-beta1 0.99",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_refusals_name_the_flag(parse, flags):
    args, _ = prepared(parse, flags)
    problems = arguments.validate(args)
    assert any(REFUSALS[flags] in p for p in problems), problems
    assert len(problems) <= 2, "one cause, one sentence (or two flags, two sentences)"
    with pytest.raises(RecipeError, match="fp8_flow_moe cannot be honoured"):
        arguments.check(args)


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        ("--moe-grouped-gemm", "--moe-grouped-gemm is missing"),
        ("--moe-token-dispatcher-type alltoall", "--moe-token-dispatcher-type allgather (Megatron's default)"),
    ],
)
def test_missing_flags_are_named(parse, absent, words):
    args, _ = prepared(parse, "", base=MOE.replace(absent, ""))
    assert any(words in p for p in arguments.validate(args))


@pytest.mark.parametrize(("absent", "words"), [("--disable-bias-linear", "--disable-bias-linear is missing")])
def test_missing_dense_flags_are_named(parse, base_flags, absent, words):
    args = parse(f"--fp8-recipe fp8_flow_moe {MOE}", base=base_flags.replace(absent, ""))
    arguments.prepare(args)
    assert any(words in p for p in arguments.validate(args))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", []),
        ("--recompute-granularity selective --recompute-modules moe_act", []),
        ("--openai-gelu", ["activation --openai-gelu: the experts compute SwiGLU (--swiglu) or, without a flag, exact GeLU; drop the flag"]),
        ("--use-te-activation-func", ["--use-te-activation-func: TransformerEngine's GeLU is the tanh approximation"]),
        ("--activation-func-clamp-value 7.0", ["--activation-func-clamp-value / --glu-linear-offset: the experts compute plain SwiGLU or GeLU"]),
    ],
)
def test_experts_without_a_gate(parse, base_flags, flags, words):
    """Without --swiglu Megatron's activation is the exact GeLU, and so is ours."""
    args = parse(f"--fp8-recipe fp8_flow_moe {MOE} {flags}", base=base_flags.replace("--swiglu ", ""))
    arguments.prepare(args)
    problems = arguments.validate(args)
    assert len(problems) == len(words) and all(w in p for w, p in zip(words, problems, strict=True)), problems


def test_dense_models_are_sent_to_a_dense_recipe(parse):
    args, _ = prepared(parse, "", base="")
    assert [p for p in arguments.validate(args) if "--num-experts is missing" in p and "--fp8-recipe moss" in p]


def test_dense_recipes_send_moe_models_here(parse):
    args, _ = prepared(parse, "", recipe="moss")
    assert any("use --fp8-recipe fp8_flow_moe" in p for p in arguments.validate(args))


SUPPORTED = [
    "",
    "--expert-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 --expert-model-parallel-size 2",
    "--pipeline-model-parallel-size 2",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
    "--moe-permute-fusion --moe-router-fusion --moe-router-padding-for-quantization",
    "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 256 --moe-shared-expert-gate",
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss",
    "--moe-router-load-balancing-type global_aux_loss --moe-z-loss-coeff 1e-3",
    "--moe-router-topk 8 --moe-router-num-groups 4 --moe-router-group-topk 4",
    "--recompute-granularity selective --recompute-modules moe moe_act layernorm shared_experts",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--first-last-layers-bf16 --no-gradient-accumulation-fusion --overlap-grad-reduce --overlap-param-gather",
    "--moe-router-force-load-balancing",
    "--multi-latent-attention",
]


@pytest.mark.parametrize("flags", SUPPORTED)
def test_supported_combinations_pass(parse, flags):
    args, notes = prepared(parse, flags)
    assert arguments.validate(args) == [] and notes == []
    assert args.fp8 == "e4m3"


@pytest.fixture
def hopper(monkeypatch):
    """Megatron asks for the GPU's generation when --moe-grouped-gemm is given."""
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_other_layers_run_the_dense_recipe(configure, hopper):
    from megatron.core import fp8_utils

    _, container = configure(f"--fp8-recipe fp8_flow_moe:interval=70 {MOE}")
    recipe = fp8_utils.get_fp8_recipe(container.model.transformer).qfactory.recipe
    assert (recipe.name, recipe.interval, recipe.moe) == ("moss", 70, "none")


def test_experts_only(configure, hopper):
    """dense=bf16: Megatron sees a bf16 run, the MoE layers still take our way and are still checked."""
    args, container = configure(f"--fp8-recipe fp8_flow_moe:dense=bf16 {MOE}")
    assert container.model.transformer.fp8 is None
    assert arguments.in_force(args) == arguments.in_force(container.model.transformer) == "fp8_flow_moe:dense=bf16"
    with pytest.raises(RecipeError, match="--moe-latent-size"):
        configure(f"--fp8-recipe fp8_flow_moe:dense=bf16 {MOE} --moe-latent-size 64")


def test_hybrid_is_said_to_be_the_experts_only(parse):
    args, notes = prepared(parse, "--fp8-format hybrid")
    assert args.fp8_recipe == "fp8_flow_moe:grad=e5m2" and "experts' gradients in E5M2" in notes[0]
    assert arguments.resolve(args.fp8_recipe).dense_recipe.grad == "e4m3"


def test_measured_scales_need_no_bound_on_adam(parse):
    betas = "--adam-beta1 0.99 --adam-beta2 0.95"
    assert arguments.validate(prepared(parse, betas, recipe="fp8_flow_moe:weight_scale=measured,dense=row")[0]) == []
    assert arguments.validate(prepared(parse, betas, recipe="fp8_flow_moe:weight_scale=measured")[0]), "moss still predicts"


def test_reports_of_real_models_say_which_layers_flow(base_flags):
    """GPTModel of the released wheel: first layer dense, three MoE layers, the last of them in bf16; then one with bf16 around the experts."""
    first_last = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 0 --num-layers-at-end-in-bf16 1"
    lines, experts_only = reports(
        f"{base_flags} {MOE} --fp8-recipe fp8_flow_moe --moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 256 {first_last}",
        f"{base_flags} {MOE} --fp8-recipe fp8_flow_moe:dense=bf16 --recompute-granularity selective --recompute-modules moe",
    )
    assert lines[1].startswith("fp8_flow_moe(") and lines[2].startswith("other layers: moss(")
    assert "head=fp8" in lines[1] and "head=fp8" in lines[2] and "output_layer - 256x256 FP8 moss, dy e5m2" in lines
    assert "decoder.layers.*.mlp.experts.linear_fc1 2-3 8 of 256x256 FP8 fp8_flow_moe" in lines
    assert "decoder.layers.*.mlp.experts.linear_fc2 4 8 of 256x128 bf16 (first / last)" in lines
    assert "decoder.layers.*.mlp.shared_experts.linear_fc1 2-3 512x256 FP8 moss" in lines
    assert "decoder.layers.*.self_attention.linear_qkv 1-3 768x256 FP8 moss" in lines
    assert "decoder.layers.*.mlp.linear_fc1 1 1024x256 FP8 moss" in lines
    assert "decoder.layers.*.mlp.router 2-4 8x256 bf16, products in fp32" in lines
    flow = "8 local experts as one FP8 function from router to combined output; no dispatch (one rank); kept for backward: h"
    assert f"MoE layers 2-3: {flow}" in lines
    assert "MoE layers 4: Megatron's own modules, bf16 (first / last)" in lines
    assert "1 MLPs: in FP8 layers norm, fc1, SwiGLU and fc2 as one function" in lines
    assert "TRACKED 65" in lines  # 4 attentions and 1 dense MLP of 2 linears each, 3 shared MLPs of 2, 3 layers of 8 experts with 2, the head
    assert "output_layer - 256x256 bf16" in experts_only and "head=bf16" in experts_only[1]
    assert "decoder.layers.*.self_attention.linear_qkv 1-4 768x256 bf16" in experts_only
    assert "decoder.layers.*.mlp.experts.linear_fc1 1-4 8 of 256x256 FP8 fp8_flow_moe" in experts_only
    assert [line for line in experts_only if line.startswith("MoE layers 1-4: 8 local experts") and line.endswith("kept for backward: input")]
