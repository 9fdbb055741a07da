"""The launcher's own way through Megatron and TransformerEngine, from scripts/launch.sh to the last log line, on the CPU (`pretend_gpu`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import pretend_gpu  # noqa: E402
import warm  # noqa: E402
from metrics_ranks import free_port  # noqa: E402

pytestmark = pytest.mark.slow
LAYERS, TOKENS, HIDDEN, STEPS = 2, 256, 256, 4
SMALL = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size 512 --num-attention-heads 2 --num-query-groups 1 --kv-channels 128 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --fp8-metrics-interval 2"
)
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(filter(None, [str(pretend_gpu.ROOT), os.environ.get("PYTHONPATH")]))}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train("fog_tiny", "moss", "--fog max") -> (losses by step, metrics by step, output). A run that was made is not repeated."""
    done = {}

    def run(model, recipe, flags="", *, ranks=1):
        key = (model, recipe, flags, ranks)
        if key not in done:
            path = tmp_path_factory.mktemp("run")
            logs = ["--fp8-log", str(path / "log.jsonl"), "--fp8-metrics-log", str(path / "metrics.jsonl")]
            launch = ["--model", model, "--recipe", recipe, "--steps", str(STEPS), "--", *SMALL.split(), *flags.split(), *logs]
            given = os.environ | ENVIRONMENT | {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
            outputs = warm.run(pretend_gpu.__file__, launch, given, ranks)
            losses = {line["iteration"]: line["lm_loss"] for line in lines(path / "log.jsonl")}
            metrics = {line["step"]: line for line in lines(path / "metrics.jsonl") if line["kind"] == "metrics"}
            done[key] = losses, metrics, outputs[0]
        return done[key]

    return run


GLOO = """
import pretend_gpu, torch, torch.distributed as dist
from pathlib import Path
pretend_gpu.one_gloo_thread()
pretend_gpu.one_gloo_thread()
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
whole, part = torch.zeros(4), torch.ones(4)
for _ in range(2000):
    with dist.distributed_c10d._coalescing_manager():
        dist.all_gather_into_tensor(whole, part)
    dist.all_reduce(part)
assert whole.tolist() == [1] * 4
print([path.read_text() for path in Path("/proc/self/task").glob("*/comm")].count("pt_gloo_runloop\\n"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_of_gloo_do_not_corrupt_the_heap():
    """With two threads per group 20000 of these rounds kill one process in ten ("malloc(): unaligned tcache chunk detected"), so the threads are counted."""
    given = os.environ | {"PYTHONPATH": str(Path(pretend_gpu.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", GLOO], env=given, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr[-2000:]


FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.mark.parametrize(
    ("model", "recipe", "flags"),
    [
        ("fog_tiny", "moss", ""),
        ("fog_tiny", "tensorwise", ""),
        ("fog_tiny", "fog", f"--fog max {FULL}"),
        ("fog_tiny", "moss", f"--fog max {FULL}"),
        ("fog_tiny", "moss:attention=fp8", "--fog max"),
        ("fog_tiny", "moss", f"--fog flash {FULL}"),
        ("fog_tiny", "moss:attention=fp8", "--fog flash"),
        ("llama3_8l_8b", "moss", "--vocab-size 600"),
    ],
)
def test_run_learns_and_every_tensor_is_counted_once(train, model, recipe, flags):
    losses, metrics, log = train(model, recipe, flags)
    reference = train(model, "bf16", flags.replace(FULL, ""))[0]
    for step, loss in losses.items():
        assert loss == pytest.approx(reference[step], rel=0.02), f"step {step}"
    assert losses[STEPS] < losses[1]
    assert sorted(metrics) == [1, 2, 4], "the first step and every second one"
    sizes = {"qkv": 4 * 128, "down_input": 512 if "llama" in model else 768, "block_output": HIDDEN}
    for layer in range(1, LAYERS + 1):
        for tensor, features in sizes.items():
            found = metrics[2]["tensors"][f"layers.{layer}.{tensor}"]
            assert found["elements"] == TOKENS * features and found["kurtosis"] > 1, (layer, tensor)
    quantised = metrics[2]["tensors"].get("layers.1.mlp.linear_fc1.input")
    if recipe == "tensorwise":
        assert quantised is None
    else:
        assert quantised["elements"] == TOKENS * HIDDEN and "flush_share" in quantised
    if recipe.startswith("moss"):
        assert f"{LAYERS} MLPs: in FP8 layers" in log and "as one function" in log
    assert (f"attention of layers 1-{LAYERS}: split, tanh and rotation as one operation" in log) == (model == "fog_tiny" and "max" not in flags)


def test_watching_changes_no_bit(train):
    flags = f"--fog max {FULL}"
    assert train("fog_tiny", "moss", flags)[0] == train("fog_tiny", "moss", f"{flags} --fp8-metrics-interval 1000")[0]


@pytest.mark.parametrize(("model", "recipe"), [("fog_tiny", "moss"), ("fog_moe_tiny", "fp8_flow_moe")])
def test_resume_is_bitwise_with_metrics(train, tmp_path, model, recipe):
    flags = f"--fog max --save {tmp_path} --save-interval 2"
    whole = train(model, recipe, flags)[0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(model, recipe, f"--fog max --load {tmp_path}")[0]
    assert resumed == {step: whole[step] for step in (3, 4)}


def test_one_operation_goes_on_from_a_checkpoint_of_several(train, tmp_path):
    """Split, tanh and rotation: nothing of theirs but the alphas is in a checkpoint. Data parallelism waits for those in their modules' hooks."""
    flags = "--fog flash --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    whole, _, log = train("fog_tiny", "moss", f"{flags} --no-rope-fusion --save {tmp_path} --save-interval 2")
    assert "split, tanh and rotation one by one: --no-rope-fusion" in log
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed, _, log = train("fog_tiny", "moss", f"{flags} --load {tmp_path}")
    assert "split, tanh and rotation as one operation" in log
    assert resumed == pytest.approx({step: whole[step] for step in (3, 4)}, rel=2e-3)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    back = train("fog_tiny", "moss", f"{flags} --no-rope-fusion --load {tmp_path}")[0]
    assert back == {step: whole[step] for step in (3, 4)}


@pytest.mark.parametrize(
    ("arch", "layout"),
    [
        ("max", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("flash", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("max", "--pipeline-model-parallel-size 2"),
    ],
)
def test_divided_run_counts_the_same_elements(train, arch, layout):
    """Its weights start otherwise (each rank draws its own), so only what is counted can be compared."""
    flags = f"--fog {arch} --num-query-groups 2"
    losses, metrics, _ = train("fog_tiny", "moss", f"{flags} {layout}", ranks=2)
    assert losses[STEPS] < losses[1]
    one = train("fog_tiny", "moss", flags)[1]
    assert set(metrics[2]["tensors"]) == set(one[2]["tensors"]), "of every layer, wherever it is"
    for tensor in (f"layers.{layer}.{name}" for layer in range(1, LAYERS + 1) for name in ("qkv", "down_input", "block_output")):
        found, expected = (m[2]["tensors"][tensor] for m in (metrics, one))
        assert found["elements"] == expected["elements"] and found["kurtosis"] == pytest.approx(expected["kurtosis"], rel=0.1), tensor


@pytest.mark.parametrize(("flags", "activation"), [("", "gelu"), ("--fog max", "xielu")])
def test_fog_with_experts_learns_and_counts_their_rows(train, flags, activation):
    """Experts without a gate in the FP8 flow, beside linears in bf16, in FP8, and with attention in FP8 too. Megatron's own experts need a GPU."""
    reference, _, _ = train("fog_moe_tiny", "fp8_flow_moe:dense=bf16", flags)
    for recipe in ("fp8_flow_moe", "fp8_flow_moe:attention=fp8"):
        losses, metrics, log = train("fog_moe_tiny", recipe, flags)
        for step, loss in losses.items():
            assert loss == pytest.approx(reference[step], rel=0.02), f"{recipe}: step {step}"
        assert losses[STEPS] < losses[1] and losses != reference
        assert f"MoE layers 1-{LAYERS}: 8 local experts as one FP8 function" in log and f"{activation} without a gate" in log
        assert ("FP8 (attention)" in log) == ("attention" in recipe)
        tensors = metrics[2]["tensors"]
        assert tensors["layers.1.mlp.experts.linear_fc2.input"]["elements"] == 2 * TOKENS * 384, "top-2 of experts 1.5 x 256 wide, padding left out"
        assert tensors["layers.1.mlp.experts.linear_fc1.grad"]["elements"] == 2 * TOKENS * 384 and tensors["layers.2.down_input"]["kurtosis"] > 1


def test_pair_of_experts_divided_over_ranks_is_trained_and_saved(train, tmp_path):
    """Expert parallelism, the distributed optimizer and a torch_dist checkpoint with xIELU in experts and shared experts."""
    import torch
    from torch.distributed import checkpoint

    flags = f"--fog max --expert-model-parallel-size 2 --moe-shared-expert-intermediate-size 256 --lr 1e-2 --save {tmp_path} --save-interval {STEPS}"
    losses, _, log = train("fog_moe_tiny", "fp8_flow_moe", flags, ranks=2)
    assert losses[STEPS] < losses[1] and "4 local experts as one FP8 function" in log
    files = checkpoint.FileSystemReader(tmp_path / f"iter_{STEPS:07d}")
    names = [f"decoder.layers.mlp.{part}.activation_func.alpha_{which}" for part in ("experts.experts", "shared_experts") for which in "pn"]
    found = {name: torch.full((LAYERS, 1), torch.nan, dtype=torch.bfloat16) for name in names}
    checkpoint.load(found, storage_reader=files, no_dist=True)
    for name, values in found.items():
        initial = 0.2031 if name.endswith("p") else -1.0469
        assert (values.float() - initial).abs().min() > 1e-3, f"{name} stayed where it was: {values.flatten().tolist()}"
