"""Every model of configs/models with every recipe that it is run with: scripts/launch.sh's own arguments through our preparation, Megatron's validation and
Megatron's configuration."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

ROOT = Path(__file__).resolve().parents[2]
FP8_ATTENTION = ["fog", "moss:attention=fp8"]
WATCHED = "--fp8-metrics-interval 10 --fp8-metrics-log metrics.jsonl --fp8-alarm warn"


def cases():
    for path in sorted((ROOT / "configs" / "models").glob("*.sh")):
        model = path.stem
        if "moe" in model:
            recipes = ["bf16", "blockwise", "fp8_flow_moe"]
        else:
            recipes = ["bf16", "tensorwise", "moss", *(FP8_ATTENTION if model.startswith(("fog", "llama3")) else [])]
        yield from ((model, recipe) for recipe in recipes)


@pytest.mark.parametrize(("model", "recipe"), list(cases()))
def test_launch_is_accepted_and_means_what_it_says(configure, monkeypatch, model, recipe):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))  # --moe-grouped-gemm asks
    command = [str(ROOT / "scripts" / "launch.sh"), "--model", model, "--recipe", recipe, "--steps", "20", "--dry-run", "--", *WATCHED.split()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    args, container = configure(" ".join(shlex.split(shown.split("-m fp8_recipes.pretrain_gpt")[1])), base="")
    config = container.model.transformer
    assert args.fp8_metrics_interval == 10 and args.train_iters == 20
    assert bool(config.fp8) == (recipe != "bf16")
    assert bool(config.fp8_dot_product_attention) == (recipe == "fog")
    name = "delayed" if recipe in ("bf16", "fog") else recipe
    assert str(getattr(args.fp8_recipe, "value", args.fp8_recipe)) == name
    if model.startswith("fog"):
        assert args.spec == ["fp8_recipes.megatron.fog", "layer_spec"] and not config.gated_linear_unit and config.normalization == "RMSNorm"
        assert not config.bias_activation_fusion, "the fused GeLU is the tanh approximation, and xIELU has none"
    else:
        assert config.gated_linear_unit and config.bias_activation_fusion
    assert not config.add_bias_linear and config.kv_channels * config.num_attention_heads >= config.hidden_size
    assert config.params_dtype.itemsize == 2 and args.use_distributed_optimizer
