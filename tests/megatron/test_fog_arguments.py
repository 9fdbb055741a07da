"""Flags of the architectures and of FP8 attention through Megatron's real parser and configuration: what they set, what they print, what they refuse."""

from __future__ import annotations

import pytest

from fp8_recipes.recipe import RecipeError

HEADS_OF_128 = "--num-attention-heads 2"
XIELU_EXPERTS = "--fog max --num-experts 8 --moe-grouped-gemm"


@pytest.fixture
def plain(base_flags):
    """The base flags without --swiglu and --normalization, which an architecture sets."""
    return base_flags.replace("--swiglu ", "").replace("--normalization RMSNorm ", "")


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("fp8_recipes: ")]


class TestArchitecture:
    @pytest.mark.parametrize(
        ("flags", "expected", "ffn", "printed"),
        [
            ("--fog flash", "fog-flash", 768, ("qk=tanh", "activation=gelu")),
            ("--fog opt", "fog-opt", 768, ("qk=rmsnorm_frozen", "activation=gelu")),
            ("--fog max", "fog-max", 768, ("qk=rmsnorm_frozen", "activation=xielu")),
            ("--arch op", "op", 768, ("layer_scale=true", "qk=rmsnorm,")),
            ("--arch olmo2", "olmo2", 512, ("post_norm=true", "activation=swiglu")),
            ("--fog flash --ffn-width-factor 1", "fog-flash", 512, ("activation=gelu",)),
            ("--fog max --softmax-gain 2", "fog-max", 768, ("softmax_gain=2.0",)),
            ("--no-pre-norm --post-norm --post-norm-gain depth --activation xielu", "custom", 512, ("post_norm_gain=depth", "activation=xielu")),
            ("--layer-scale --no-final-norm --qk-bound tanh --qk-tanh-alpha 1 --embedding-norm unit", "custom", 512, ("tanh_alpha=1.0", "embedding=unit")),
        ],
    )
    def test_what_a_flag_sets_is_printed_and_reaches_the_config(self, configure, plain, capsys, flags, expected, ffn, printed):
        from fp8_recipes.megatron import fog
        from fp8_recipes.megatron.fog_arguments import architecture_of

        args, container = configure(flags, base=plain)
        architecture = architecture_of(args)
        assert architecture.name == expected
        notes = " ".join(lines(capsys))
        assert expected in notes and all(words in notes for words in printed)
        config = container.model.transformer
        assert container.model.transformer_layer_spec is fog.layer_spec
        assert config.ffn_hidden_size == ffn and config.gated_linear_unit == architecture.gated
        assert config.normalization == "RMSNorm"
        fog.apply_to_config(architecture, config)
        assert config.softmax_scale == pytest.approx(architecture.softmax_gain / 8) and config.qk_layernorm == (architecture.qk != "none")
        assert config.embedding_multiplier == (50 if architecture.embedding == "unit" else 1)

    def test_numbers_of_the_paper_are_printed(self, configure, plain, capsys):
        configure(f"--fog max {HEADS_OF_128}", base=plain)
        assert "fp8_recipes: softmax scale 0.125, embedding multiplier 50, initial gain of a branch's output 0.5" in lines(capsys)

    def test_what_differs_from_the_paper_is_told_and_left_alone(self, parse, plain):
        from fp8_recipes.megatron import fog_arguments

        def told(flags, base=plain):
            return [note for note in fog_arguments.prepare(parse(f"{flags} {HEADS_OF_128}", base=base)) if "the paper's" in note]

        other = plain.replace("--disable-bias-linear", "").replace("--position-embedding-type rope", "--position-embedding-type learned_absolute")
        assert other != plain and told("--fog flash") == [] and told("--arch op", other) == []
        positions, biases = told("--fog flash", other)
        assert positions == "fog-flash: positions are learned_absolute; the paper's are rotary: --position-embedding-type rope"
        assert biases.endswith("have none: --disable-bias-linear")
        (qkv,) = told("--fog max --add-qkv-bias")
        assert qkv == "fog-max: Q, K and V have biases; the paper's have none: drop --add-qkv-bias"

    def test_without_a_flag_everything_stays_megatrons(self, configure, capsys):
        args, container = configure()
        assert args.spec is None and container.model.transformer_layer_spec is None and not lines(capsys)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--fog max --swiglu", r"--swiglu: fog-max has activation=xielu, which has no gate; drop --swiglu"),
            ("--fog max --squared-relu", r"--squared-relu: fog-max has activation=xielu; drop the flag"),
            ("--fog flash --openai-gelu", r"--openai-gelu: fog-flash has activation=gelu"),
            ("--fog max --activation gelu", r"^--activation: .*contradicts the name: fog-max has activation=xielu \(fog-opt has activation=gelu\)"),
            ("--fog flash --qk-bound rmsnorm", r"^--qk-bound: .*fog-flash has qk=tanh"),
            ("--fog flash --layer-scale", r"^--layer-scale: .*two gains"),
            ("--fog flash --post-norm-gain one", r"^--post-norm-gain: .*fog-flash has post_norm_gain=depth"),
            ("--fog flash --arch op", r"--fog flash and --arch op: two architectures"),
            ("--arch fog-flsh", r"did you mean fog-flash"),
            ("--fog max --qk-layernorm", r"--qk-layernorm: a norm with trained gains, and fog-max has qk=rmsnorm_frozen"),
            ("--fog max --qk-l2-norm", r"--qk-l2-norm"),
            ("--fog max --normalization LayerNorm", r"--normalization LayerNorm: these architectures have RMSNorm"),
            ("--fog max --apply-layernorm-1p", r"--apply-layernorm-1p"),
            ("--fog max --fused-residual-rmsnorm", r"--fused-residual-rmsnorm: is about the norm on a branch's input"),
            ("--fog max --recompute-granularity selective --recompute-modules layernorm", r"--recompute-modules layernorm: is about the norm"),
            ("--fog max --apply-residual-connection-post-layernorm", r"--apply-residual-connection-post-layernorm"),
            ("--fog max --use-mup", r"--use-mup"),
            ("--fog max --use-te-activation-func", r"--use-te-activation-func: TransformerEngine's GeLU is the tanh approximation"),
            ("--fog max --num-experts 8", r"--moe-grouped-gemm is missing: fog-max has activation=xielu, whose trained pair all experts of a layer share"),
            (f"{XIELU_EXPERTS} --transformer-impl local", r"--transformer-impl local: .*whose trained pair .*use transformer_engine"),
            (f"{XIELU_EXPERTS} --use-grouped-gemm-for-shared-expert", r"--use-grouped-gemm-for-shared-expert: has no xIELU"),
            (f"{XIELU_EXPERTS} --moe-use-upcycling", r"--moe-use-upcycling: would leave the dense FFN's trained pair behind"),
            ("--arch smooth-swiglu --num-experts 8", r"--num-experts 8: smooth_swiglu has a factor per token behind the FFN"),
            ("--fog flash --num-experts 8 --moe-ffn-hidden-size 33", r"--ffn-width-factor 1.5 times --moe-ffn-hidden-size 33 is 49.5"),
            ("--fog max --spec a b", r"--spec a b: the architecture is itself a layer spec"),
            ("--fog max --use-checkpoint-args", r"--use-checkpoint-args: would take the FFN's width from the checkpoint"),
            ("--fog max --mtp-num-layers 1", r"--mtp-num-layers 1"),
            ("--fog max --group-query-attention --num-query-groups 3", r"--num-query-groups 3: 4 query heads are not a multiple of it"),
            ("--arch smooth-swiglu --tensor-model-parallel-size 2", r"--tensor-model-parallel-size 2: smooth_swiglu's factor is a maximum over the whole FFN"),
            ("--fog flash --ffn-width-factor 1.3", r"--ffn-width-factor 1.3 times --ffn-hidden-size 512 is 665.6"),
            ("--ffn-width-factor 1.5", r"--ffn-width-factor: belongs to --fog"),
            ("--post-norm-gain depth", r"^--post-norm-gain: .*set post_norm=true"),
        ],
    )
    def test_contradictions_name_the_flag_and_the_way_out(self, parse, plain, flags, words):
        from fp8_recipes.megatron import fog_arguments

        args = parse(flags, base=plain)
        with pytest.raises(RecipeError, match=words):
            fog_arguments.prepare(args)

    def test_the_launcher_prints_no_traceback(self, monkeypatch, plain, parse):
        from fp8_recipes.megatron import pretrain

        monkeypatch.setattr("sys.argv", ["pretrain_gpt", *plain.split(), "--fog", "max", "--swiglu"])
        with pytest.raises(SystemExit, match="fp8_recipes: architecture 'fog-max' cannot be built"):
            pretrain.main()


class TestAttention:
    @pytest.mark.parametrize(
        ("flags", "recipe"),
        [
            ("--fp8-recipe fog", "delayed"),
            ("--fp8-recipe delayed --fp8-format hybrid --fp8-attention", "delayed"),
            ("--fp8-recipe moss --fp8-attention", "moss:attention=fp8"),
            ("--fp8-recipe moss:interval=200 --fp8-attention", "moss:interval=200,attention=fp8"),
            ("--fp8-recipe row:attention=fp8", "row:attention=fp8"),
        ],
    )
    def test_flag_turns_it_on_for_recipes_that_allow_it(self, configure, plain, capsys, monkeypatch, flags, recipe):
        from megatron.core import fp8_utils

        from fp8_recipes.megatron import arguments

        args, container = configure(f"--fog flash {HEADS_OF_128} {flags}", base=plain)
        assert args.fp8_recipe == recipe and arguments.fp8_attention(args)
        assert "fp8_recipes: attention: QK^T and PV in FP8, forward and backward (TransformerEngine, cuDNN, delayed scaling)" in lines(capsys)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        built = fp8_utils.get_fp8_recipe(container.model.transformer)
        assert built.fp8_dpa and not built.fp8_mha
        if "fog" in flags.split("--fp8-recipe")[1]:
            assert (built.amax_history_len, built.amax_compute_algo, built.margin, str(built.fp8_format.name)) == (1024, "max", 0, "HYBRID")

    @pytest.mark.parametrize(
        ("flags", "bounded"), [("--fog flash", True), ("--fog max", True), ("--swiglu --qk-bound rmsnorm", False), ("--arch olmo2", False), ("--swiglu", False)]
    )
    def test_queries_and_keys_without_a_bound_are_warned_of(self, parse, plain, flags, bounded):
        from fp8_recipes.megatron import attention_arguments

        for recipe in ("fog", "moss:attention=fp8"):
            notes = attention_arguments.prepare(parse(f"--fp8-recipe {recipe} {HEADS_OF_128} {flags}", base=plain))
            assert any("nothing in this architecture bounds queries and keys" in note for note in notes) != bounded
        assert attention_arguments.prepare(parse(f"--fp8-recipe moss {HEADS_OF_128} {flags}", base=plain)) == []

    def test_explicit_history_stays(self, configure, plain):
        args, _ = configure(f"--fp8-recipe fog --fp8-amax-history-len 16 {HEADS_OF_128}", base=plain)
        assert args.fp8_amax_history_len == 16 and args.fp8_amax_compute_algo == "max"

    def test_fog_without_fp8_attention(self, configure, plain):
        args, container = configure("--fp8-recipe fog:attention=bf16", base=plain)
        assert args.fp8_recipe == "delayed" and not container.model.transformer.fp8_dot_product_attention

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--fp8-attention", r"attention in FP8 needs an FP8 recipe, and this run trains in bf16"),
            ("--fp8-recipe bf16 --fp8-attention", r"attention=fp8 runs inside an FP8 recipe"),
            ("--fp8-recipe tensorwise --fp8-format hybrid --fp8-attention", r"not under --fp8-recipe tensorwise: .* needs Blackwell\. Use --fp8-recipe fog"),
            ("--fp8-recipe mxfp8 --fp8-format e4m3 --fp8-attention", r"not under --fp8-recipe mxfp8: MXFP8 needs Blackwell"),
            ("--fp8-recipe blockwise --fp8-format e4m3 --fp8-attention", r"not under --fp8-recipe blockwise: .* no FP8 attention under block scaling"),
            ("--fp8-recipe fp8_flow_moe:dense=bf16 --fp8-attention", r"--fp8-attention with --fp8-recipe fp8_flow_moe:dense=bf16: .* use dense=moss"),
            ("--fp8-recipe fp8_flow_moe --fp8-attention --num-experts 8 --num-attention-heads 4", r"heads of 64 features, and cuDNN trains heads of 128"),
            ("--fp8-recipe fog --fp8-format e4m3", r"--fp8-format e4m3: fog has grad=e5m2; .* fog:grad=e4m3"),
            ("--fp8-recipe fog --num-attention-heads 4", r"heads of 64 features, and cuDNN trains heads of 128 only; use --num-attention-heads 2"),
            ("--fp8-recipe fog --kv-channels 256", r"heads of 256 features"),
            ("--fp8-recipe fog --num-attention-heads 6 --kv-channels 128 --group-query-attention --num-query-groups 4", r"--num-query-groups 4: 6 query heads"),
            ("--fp8-recipe fog --group-query-attention --num-query-groups 1 --tensor-model-parallel-size 2", r"--num-query-groups 1: fewer than"),
            ("--fp8-recipe fog --attention-backend flash", r"--attention-backend flash: only cuDNN's fused attention trains in FP8"),
            ("--fp8-recipe fog --attention-dropout 0.1", r"--attention-dropout 0.1"),
            ("--fp8-recipe fog --softmax-type learnable", r"--softmax-type learnable"),
            ("--fp8-recipe fog --reset-attention-mask", r"--reset-attention-mask"),
            ("--fp8-recipe fog --transformer-impl local", r"--transformer-impl local"),
            ("--fp8-recipe moss:attention=fp8 --context-parallel-size 2", r"--context-parallel-size 2: .* use --fp8-recipe fog"),
            (
                "--fp8-recipe fog --recompute-activations",
                r"core_attn \(the default of selective recompute\): .* attention would run in bf16",
            ),
            ("--fp8-recipe fog --recompute-granularity selective --recompute-modules mlp core_attn", r"core_attn .* use --recompute-granularity full"),
            ("--fp8-recipe moss:attention=fp8 --recompute-granularity selective --recompute-modules layernorm", r"layernorm: .* drop layernorm"),
            ("--fp8-recipe fog --first-last-layers-bf16", r"--first-last-layers-bf16: attention's maxima"),
            ("--fp8-recipe fog --sft", r"--sft: packed sequences have no backward pass in FP8 on Hopper"),
            ("--fp8-recipe fog --save x --ckpt-format torch_dcp", r"--ckpt-format torch_dcp: .* torch_dist and torch"),
            ("--fp8-recipe fog --non-persistent-ckpt-type local", r"--non-persistent-ckpt-type local: .* use global"),
            ("--fp8-recipe moss:attention=fp8 --first-last-layers-bf16", r"--first-last-layers-bf16"),
        ],
    )
    def test_what_cannot_run_is_refused_with_the_reason(self, parse, plain, flags, words):
        from fp8_recipes.megatron import attention_arguments

        args = parse(f"{HEADS_OF_128} {flags}", base=plain)
        with pytest.raises(RecipeError, match=words):
            attention_arguments.prepare(args)

    @pytest.mark.parametrize("flags", ["--recompute-granularity full --recompute-method uniform", "--recompute-granularity selective --recompute-modules mlp"])
    @pytest.mark.parametrize("recipe", ["fog", "moss:attention=fp8"])
    def test_recompute_of_whole_layers_and_mlps_is_taken(self, parse, plain, recipe, flags):
        from fp8_recipes.megatron import attention_arguments

        attention_arguments.prepare(parse(f"--fp8-recipe {recipe} {HEADS_OF_128} {flags}", base=plain))

    @pytest.mark.parametrize(
        ("version", "variable", "flags", "words"),
        [
            ((9, 14, 0), "", "", r"cuDNN 9\.14\.0: FP8 attention of 9\.14 returns wrong results without an error, 9\.19\.0 is the first that was found right"),
            ((9, 18, 1), "", "", r"cuDNN 9\.18\.1: .* docs/megatron\.md says how to have TransformerEngine load it"),
            ((9, 19, 0), "NVTE_DPA_FP8_RECIPE=F16", "", r"NVTE_DPA_FP8_RECIPE=F16 in the environment"),
            (None, "NVTE_FP8_DPA_BWD=0", "", r"NVTE_FP8_DPA_BWD=0 in the environment turns FP8 attention off, or half of it"),
        ],
    )
    def test_cudnn_and_environment_that_cannot_are_named(self, parse, plain, monkeypatch, version, variable, flags, words):
        from fp8_recipes.megatron import attention_arguments

        monkeypatch.setattr(attention_arguments, "cudnn_version", lambda: version)
        if variable:
            monkeypatch.setenv(*variable.split("="))
        with pytest.raises(RecipeError, match=words):
            attention_arguments.prepare(parse(f"--fp8-recipe fog {HEADS_OF_128} {flags}", base=plain))

    @pytest.mark.parametrize("version", [(9, 19, 0), None])
    def test_deterministic_mode_with_a_new_cudnn(self, parse, plain, monkeypatch, version):
        from fp8_recipes.megatron import attention_arguments

        monkeypatch.setattr(attention_arguments, "cudnn_version", lambda: version)
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        notes = " ".join(attention_arguments.prepare(parse(f"--fp8-recipe fog {HEADS_OF_128}", base=plain)))
        assert f"(TransformerEngine, cuDNN{' 9.19.0' if version else ''}, delayed scaling)" in notes

    def test_maxima_move_on_once_per_step_and_not_per_layer(self, parse, monkeypatch):
        """One FP8 region around all layers: TransformerEngine updates every delayed scale when an outermost region ends."""
        from types import SimpleNamespace

        from megatron.core import fp8_utils
        from megatron.core.transformer.transformer_block import TransformerBlock

        from fp8_recipes.te.shims import _MARK

        parse()  # installs the shims
        entered = []

        class Region:
            def __enter__(self):
                entered.append("region")

            def __exit__(self, *_):
                entered.append("end")

        monkeypatch.setattr(fp8_utils, "get_fp8_context", lambda config: Region())
        wrapper = TransformerBlock.forward
        original = getattr(wrapper, _MARK)
        for spec, expected in (("moss:attention=fp8", ["region", "layers", "end"]), ("moss", ["layers"]), ("delayed", ["layers"])):
            entered.clear()
            block = SimpleNamespace(config=SimpleNamespace(fp8_recipe=spec, fp8="e4m3"))
            cell = next(c for c in wrapper.__closure__ if c.cell_contents is original)
            cell.cell_contents = lambda self: entered.append("layers")
            try:
                wrapper(block)
            finally:
                cell.cell_contents = original
            assert entered == expected, spec
