"""First maxima of delayed scaling: trainings on the CPU (`pretend_gpu`, FP8 attention in TransformerEngine's emulation) that begin without any.

This file is also what is run: ``python test_calibration.py JOB.json <arguments of scripts/launch.sh>``, see `work`. The loss is multiplied by 2^-20, which
makes gradients as small as those of a mean over many tokens: under scale 1 E5M2 has nothing but zeros for them. Adam does not see the factor.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")
pytest.importorskip("psutil", reason="psutil is not installed; Megatron's torch_dist writer needs it (pip install psutil)")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretend_gpu  # noqa: E402
import warm  # noqa: E402

from fp8_recipes.megatron import calibration, parse_log  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = (
    "--hidden-size 256 --ffn-hidden-size 256 --num-attention-heads 2 --num-query-groups 2 --kv-channels 128 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --global-batch-size 4 --adam-eps 1e-16 --ckpt-format torch_dist"
)
DP, PP = "--overlap-grad-reduce --overlap-param-gather", "--pipeline-model-parallel-size 2"
EXPERTS = "--num-layers 2 --moe-router-enable-expert-bias --moe-router-score-function sigmoid"
LINE = "delayed scaling had no maxima: measured on the first iteration's microbatches in"


# --- in the training's process ------------------------------------------------------------------------------------------------------------------------------


def work(job: dict, arguments: list[str]) -> None:
    """Train. job: write (what delayed scaling remembers when the first step begins, and after it), read (maxima to begin with, instead of a calibration)."""
    from megatron.training import training

    from fp8_recipes.megatron import delayed_state, pretrain, shims

    shims.install()
    rank, loss_func, calibrate, train_step = os.environ["RANK"], pretrain.loss_func, calibration.calibrate, training.train_step

    def small(*values):
        loss, tokens, report = loss_func(*values)
        return loss * 2.0**-20, tokens, report

    def begin(step, rewind):
        if "read" in job:
            delayed_state.restore(step["model"], "a file", torch.load(f"{job['read']}-{rank}.pt")["begin"])
            return 0
        passes = calibrate(step, rewind)
        if "write" in job:
            torch.save({"passes": passes, "begin": copy(delayed_state.tensors(step["model"]))}, f"{job['write']}-{rank}.pt")
        return passes

    def first_step(*values, **named):
        result = train_step(*values, **named)
        path = Path(f"{job.get('write')}-{rank}.pt")
        if "write" in job and "after" not in (found := torch.load(path) if path.exists() else {}):
            torch.save(found | {"after": copy(delayed_state.tensors(values[2]))}, path)
        return result

    pretrain.loss_func, calibration.calibrate, training.train_step = small, begin, first_step
    pretend_gpu.main(*arguments)


def copy(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


# --- in pytest ----------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path):
    """train(name, recipe, flags, ranks=1, read=None) -> ({step: (loss, gradient norm)} of four steps, what each rank wrote, what rank 0 printed)."""
    port = iter(range(29720 + 8 * (hash(str(tmp_path)) % 200), 40000))

    def train(name: str, recipe: str, flags: str = "", ranks: int = 1, read: str | None = None, model: str = "fog_tiny"):
        log, job = tmp_path / f"{name}.jsonl", {"read": str(tmp_path / read)} if read else {"write": str(tmp_path / name)}
        (tmp_path / f"{name}.json").write_text(json.dumps(job))
        command = [str(tmp_path / f"{name}.json"), "--model", model, "--recipe", recipe, "--steps", "4", "--log", str(log), "--"]
        path = os.pathsep.join(filter(None, [str(pretend_gpu.ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "MASTER_PORT": str(next(port)), "WORLD_SIZE": str(ranks), "NVTE_UnfusedDPA_Emulate_FP8": "1"}
        outputs = warm.run(__file__, [*command, *SMALL.split(), *flags.split()], environment, ranks)
        lines = {entry["iteration"]: (entry["lm_loss_hex"], entry["grad_norm"].hex()) for entry in map(json.loads, log.read_text().splitlines())}
        assert sorted(lines) == sorted(parse_log.read_losses(log))
        written = [torch.load(path) for rank in range(ranks) if (path := tmp_path / f"{name}-{rank}.pt").exists()]
        return lines, written, outputs[0]

    return train


def maxima(tensors, direction):
    """{module: the largest of every slot's history}."""
    end = f".{direction}.amax_history"
    return {name.removesuffix(end): history.amax(0) for name, history in tensors.items() if name.endswith(end)}


@pytest.mark.parametrize(
    ("recipe", "model", "flags", "ranks"),
    [
        ("fog", "fog_tiny", "--num-layers 2", 1),
        ("fog", "fog_tiny", "--num-layers 2 --global-batch-size 1", 1),
        ("fog", "fog_tiny", "--num-layers 2 --fp8-amax-history-len 1", 1),
        ("moss:attention=fp8", "fog_tiny", "--num-layers 2", 1),
        ("fp8_flow_moe:attention=fp8", "fog_moe_tiny", EXPERTS, 1),
        ("fog", "fog_tiny", f"--num-layers 2 {DP}", 2),
        ("fog", "fog_tiny", f"--num-layers 2 {PP}", 2),
        ("fog", "fog_tiny", f"--num-layers 4 {PP} --num-layers-per-virtual-pipeline-stage 1", 2),
        ("fog", "fog_tiny", "--num-layers 2 --tensor-model-parallel-size 2", 2),
    ],
)
def test_a_calibrated_run_is_the_run_that_had_its_maxima_from_the_start(train, recipe, model, flags, ranks):
    """Loss and gradient norm of every step, bit for bit: the passes leave maxima and nothing else, neither in gradients, random states (dropout), routers'
    counts, biases and reported losses nor in the order of the data."""
    flags += " --hidden-dropout 0.1"
    calibrated, written, printed = train("calibrated", recipe, flags, ranks, model=model)
    assert printed.count(LINE) == 1 and "until no scale moved by more than a quarter" in printed
    balance = re.findall(r"load_balancing_loss: (\S+)", printed)
    given, _, printed = train("given", recipe, flags, ranks, read="calibrated", model=model)
    assert LINE not in printed and "under delayed scaling as saved" in printed
    assert calibrated == given and len(given) == 4
    assert balance == re.findall(r"load_balancing_loss: (\S+)", printed) and len(balance) == (4 if "moe" in model else 0)
    for rank in written:
        check_first_step(rank)


def check_first_step(rank):
    """Every slot that is used has its scale before the first step, and it is the one that this step's own maxima give."""
    assert rank["passes"] >= 2
    for name, found in ((name, scale) for name, scale in rank["after"].items() if name.endswith(".scale")):
        assert (found != 1).any(), name
        assert torch.allclose(rank["begin"][name], found, rtol=0.25, atol=0), f"{name}: {rank['begin'][name]} before, {found} after"


def test_stock_delayed_scaling_is_left_alone_and_loses_gradients(train):
    """What calibration is for: four microbatches are not enough for the projection's gradient to get a scale."""
    losses, written, printed = train("stock", "delayed", "--num-layers 2 --fp8-attention --fp8-amax-history-len 1024 --fp8-amax-compute-algo max")
    assert LINE not in printed and sorted(losses) == [1, 2, 3, 4]
    after = written[0]["after"]
    steps = {module: int((after[f"{module}.backward.amax_history"][:, 0] > 0).sum()) for module in maxima(after, "backward")}
    assert all(steps[f"decoder.layers.{layer}.mlp.linear_fc2"] == 4 for layer in (0, 1))
    assert all(steps[f"decoder.layers.{layer}.mlp.linear_fc1"] == 3 for layer in (0, 1))
    assert all(steps[f"decoder.layers.{layer}.self_attention.linear_qkv"] < 3 for layer in (0, 1))


def test_nothing_is_calibrated_where_nothing_is_delayed_or_all_maxima_are_there(train, tmp_path):
    _, written, printed = train("moss", "moss", "--num-layers 2")
    assert LINE not in printed and "passes" not in written[0]
    through, _, printed = train("through", "fog", f"--num-layers 2 --save {tmp_path / 'kept'} --save-interval 2")
    assert LINE in printed
    (tmp_path / "kept" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed, written, printed = train("resumed", "fog", f"--num-layers 2 --load {tmp_path / 'kept'}")
    assert LINE not in printed and "maxima and scales of 10 modules under delayed scaling as saved" in printed
    assert written[0]["passes"] == 0 and resumed == {step: through[step] for step in (3, 4)}


def test_metrics_see_the_first_iteration_once(train, tmp_path):
    _, written, _ = train("watched", "fog", f"--num-layers 2 --fp8-metrics-interval 1 --fp8-metrics-log {tmp_path / 'metrics.jsonl'}")
    assert written[0]["passes"] >= 2
    first, second = (
        entry["tensors"]
        for entry in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if entry["kind"] == "metrics" and entry["step"] <= 2
    )
    counted = {name: found["elements"] for name, found in first.items() if name.endswith((".qkv", ".down_input", ".block_output"))}
    assert len(counted) == 6 and counted == {name: second[name]["elements"] for name in counted}


def test_maxima_that_were_loaded_are_kept_where_others_are_measured(train, tmp_path):
    """From attention alone in FP8 to delayed scaling of everything."""
    train("ours", "moss:attention=fp8", f"--num-layers 2 --save {tmp_path / 'kept'} --save-interval 2")
    (tmp_path / "kept" / "latest_checkpointed_iteration.txt").write_text("2")
    _, loaded, _ = train("again", "moss:attention=fp8", f"--num-layers 2 --load {tmp_path / 'kept'}")
    _, fog, printed = train("fog", "fog", f"--num-layers 2 --load {tmp_path / 'kept'}")
    assert LINE in printed and "8 are not in" in printed and "start anew: measured before the first step" in printed
    assert loaded[0]["passes"] == 0 and len(loaded[0]["begin"]) == 2 * 4
    for name, tensor in loaded[0]["begin"].items():
        assert torch.equal(fog[0]["begin"][name], tensor), name
    assert all(found[0] > 0 for found in maxima(fog[0]["begin"], "backward").values())


def test_items_are_read_once_and_replayed():
    items = [{"tokens": 1}, {"tokens": 2}, {"tokens": 3}]

    class Source:
        def __init__(self, values):
            self.iterable = iter(values)

        def __next__(self):
            return next(self.iterable)

    chunks = [Source(items), None, Source(items[:2])]
    with calibration._rewound(chunks) as rewind:
        for _ in range(3):
            rewind()
            first = next(chunks[0])
            assert first == items[0] and next(chunks[0]) == items[1] and next(chunks[2]) == items[0]
            first["tokens"] = None  # as a consumer might
        rewind()
        assert [next(chunks[0])["tokens"] for _ in range(3)] == [1, 2, 3]
        assert next(chunks[2]) == items[0]
    assert next(chunks[2]) == items[1] and next(chunks[0], None) is None


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])
