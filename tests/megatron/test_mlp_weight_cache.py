"""FP8 weights kept over the microbatches of a step, in Megatron's own training loop on the CPU (`pretend_gpu`): the same bits, fewer casts."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import warm  # noqa: E402
from megatron_runs import ROOT  # noqa: E402
from metrics_ranks import free_port  # noqa: E402

pytestmark = pytest.mark.slow
LAYERS, STEPS, MICROBATCHES = 2, 6, 3
SMALL = (
    f"--num-layers {LAYERS} --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 2 --num-query-groups 1 --kv-channels 128 --seq-length 64 "
    f"--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size {MICROBATCHES} --vocab-size 600"
)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
KEPT = "keeps their FP8 weights from the first microbatch of a step to the last"
FFN, ATTENTION = 2 * LAYERS, 2 * LAYERS  # weights


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train("llama3_8l_8b", "moss", "--flags") -> (loss of every step to the bit, calls counted, output). A run that was made is not repeated."""
    done = {}

    def run(model, recipe, flags=""):
        key = (model, recipe, flags)
        if key not in done:
            log = tmp_path_factory.mktemp("run") / "log.jsonl"
            launch = ["--model", model, "--recipe", recipe, "--steps", str(STEPS), "--", *SMALL.split(), *flags.split(), "--fp8-log", str(log)]
            path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
            environment = os.environ | {"PYTHONPATH": path, "MASTER_PORT": str(free_port())}
            (printed,) = warm.run(ROOT / "tests" / "weight_cache_worker.py", launch, environment)
            losses = {line["iteration"]: line["lm_loss_hex"] for line in map(json.loads, log.read_text().splitlines())}
            done[key] = losses, json.loads([line for line in printed.splitlines() if line.startswith("{")][-1]), printed
        return done[key]

    return run


@pytest.mark.parametrize(
    ("model", "recipe", "flags", "passes", "values"),
    [
        ("llama3_8l_8b", "moss:interval=2", "", 1, ("ffn", "row")),  # measured again in the middle of the run
        ("llama3_8l_8b", "moss", f"{FULL} --eval-interval 2 --eval-iters 2", 2, ("row",)),  # recomputed, with evaluation between steps
        ("llama3_8l_8b", "moss", "--arch smooth-swiglu", 1, ("ffn",)),  # module by module
        ("fog_tiny", "row", "--fog max", 1, ("ffn",)),  # without a gate, scales measured: the flag of the first microbatch is all that tells
    ],
)
def test_same_bits_and_one_cast_a_step(train, model, recipe, flags, passes, values):
    """Of every weight but the LM head's, which moss runs in FP8 and casts for each microbatch, outside of what is recomputed."""
    head = int(recipe.startswith("moss"))
    losses, none, log = train(model, recipe, flags)
    assert len(losses) == STEPS and len(set(losses.values())) == STEPS and "weight_cache" not in log.partition("MLPs")[2].partition("\n")[0]
    separator = "," if ":" in recipe else ":"
    backward = MICROBATCHES * STEPS
    assert none["transposed"] == (FFN + ATTENTION + head) * backward and none["turned"] == 0
    assert "--eval-iters" in flags or none["rows"] == ((FFN + ATTENTION) * passes + head) * backward
    for value in values:
        kept = FFN if value == "ffn" else FFN + ATTENTION
        found, calls, log = train(model, f"{recipe}{separator}weight_cache={value}", flags)
        assert found == losses, value
        assert f"weight_cache={value} {KEPT}" in log
        saved = kept * (passes * MICROBATCHES - 1) * STEPS
        if value == "row" and "--eval-iters" in flags:  # TransformerEngine's modules keep attention's weights over evaluation's microbatches too
            assert none["rows"] - calls["rows"] >= saved
        else:
            assert none["rows"] - calls["rows"] == saved, value
        assert calls["turned"] == kept * backward and calls["transposed"] == none["transposed"] - kept * backward
        assert value != "row" or calls["transposed"] == head * backward, "the head's alone is not kept"


def test_a_loaded_checkpoint_is_cast_anew(train, tmp_path):
    """Saved at step 3 (and measured again there), gone on; resumed by a run that keeps, from a run that does not."""
    flags = f"--save {tmp_path} --save-interval 3"
    whole, _, _ = train("llama3_8l_8b", "moss", flags)
    kept, _, _ = train("llama3_8l_8b", "moss:weight_cache=ffn", f"--save {tmp_path}/kept --save-interval 3")
    assert kept == whole
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    resumed, _, _ = train("llama3_8l_8b", "moss:weight_cache=ffn", f"--load {tmp_path}")
    assert resumed == {step: loss for step, loss in whole.items() if step > 3}
