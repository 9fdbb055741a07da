"""scripts/test_gpu.sh without a GPU: its plan covers every test once, and with stand-ins for pytest and nvidia-smi it reports what happened."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "test_gpu.sh"
NVIDIA_SMI = '#!/bin/sh\nfor n in {indices}; do echo "$n, NVIDIA H200, 580.159.04"; done\n'


@pytest.fixture
def gpu_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("gpu_tests")


def run(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"PYTHON": sys.executable} | environment
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=env, check=False)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def with_gpus(tmp_path: Path, indices: str) -> str:
    """A PATH whose nvidia-smi lists these GPUs."""
    executable(tmp_path / "nvidia-smi", NVIDIA_SMI.format(indices=indices))
    return f"{tmp_path}:{os.environ['PATH']}"


COLLECT = """
import json, sys, pytest
class Plugin:
    def pytest_collection_finish(self, session):
        found = {item.nodeid: [m for m in ("gpu", "multi_gpu") if item.get_closest_marker(m)] for item in session.items}
        open(sys.argv[1], "w").write(json.dumps(found))
pytest.main(["--collect-only", "-q", "-m", "gpu or multi_gpu", "-p", "no:cacheprovider", "tests"], plugins=[Plugin()])
"""


def selects(group, test: str) -> bool:
    """Would this group's pytest arguments take the test? -k as pytest reads it: a word is true if the name contains it."""
    ignored = [path.removeprefix("--ignore=") for path in group.paths if path.startswith("--ignore=")]
    inside = [any(test.startswith((f"{p}/", f"{p}::")) for p in paths) for paths in ([p for p in group.paths if not p.startswith("--")], ignored)]
    words = re.sub(r"[^\s()]+", lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0].lower() in test.lower()), group.words)
    return inside == [True, False] and (not words or bool(eval(words)))


def test_every_gpu_test_is_in_exactly_one_group(gpu_tests, tmp_path):
    out = tmp_path / "tests.json"
    subprocess.run([sys.executable, "-c", COLLECT, str(out)], cwd=ROOT, capture_output=True, check=True, timeout=300)
    marks = json.loads(out.read_text())
    assert len(marks) > 100
    groups_of = {test: [g.name for g in gpu_tests.GROUPS if g.mark in found and selects(g, test)] for test, found in marks.items()}
    assert {test: names for test, names in groups_of.items() if len(names) != 1} == {}
    if any(test.startswith("tests/megatron/test_training.py") for test in marks):  # Megatron is installed here
        assert {name for names in groups_of.values() for name in names} == {g.name for g in gpu_tests.GROUPS}


@pytest.mark.parametrize(("name", "least"), [("fog-flash", 6), ("moe-2-shared-pp", 2)])
def test_expressions_are_those_that_pytest_understands(gpu_tests, name, least):
    """A -k expression of a group of training tests, by pytest itself."""
    group = next(g for g in gpu_tests.GROUPS if g.name == name)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *group.arguments()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "no tests" in found.stdout:
        pytest.skip("Megatron-Core is not installed")
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    assert found.returncode == 0 and len(tests) >= least and all(selects(group, test) for test in tests)


def test_dry_run_on_two_gpus_plans_every_group_cheap_ones_first(gpu_tests):
    result = run("--dry-run", "--gpus", 2)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in result.stdout.splitlines() if line.startswith("|")][2:]
    assert {row[2] for row in rows} == {g.name for g in gpu_tests.GROUPS}
    assert [row[2] for row in rows[: len(gpu_tests.SHORT)]] == [g.name for g in gpu_tests.SHORT]
    beside = [sum(int(s) <= int(at) < int(s) + int(length) for s, length, *_ in rows) for at, *_ in rows]
    assert max(beside) <= 32 and "up to 16 processes a GPU" in result.stdout
    assert all(len(row[3].split()) == (2 if "multi_gpu" in row[4] else 1) for row in rows)


def test_one_gpu_leaves_out_multi_gpu_and_says_so():
    result = run("--dry-run", "--gpus", 1)
    assert result.returncode == 0 and "left out: ranks, " in result.stdout
    assert "multi_gpu tests" not in result.stdout.split("\n", 1)[1]


@pytest.mark.parametrize("hidden", [False, True], ids=["no nvidia-smi", "CUDA_VISIBLE_DEVICES hides it"])
def test_without_a_gpu_it_is_one_sentence(tmp_path, hidden):
    if not hidden and shutil.which("nvidia-smi"):
        pytest.skip("this machine has nvidia-smi")
    environment = {"PATH": with_gpus(tmp_path, "0"), "CUDA_VISIBLE_DEVICES": ""} if hidden else {}
    result = run("--out", tmp_path / "out", **environment)
    assert result.returncode == 2 and result.stderr.startswith("test_gpu.sh: no NVIDIA GPU here") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_group_and_gpus_of_a_real_run_are_refused():
    assert "no group nope; known: kernels-gelu, " in run("nope", "--dry-run", "--gpus", 1).stderr
    assert "with --dry-run only" in run("--gpus", 2).stderr


FAKE_PYTEST = """#!/bin/sh
# Stands in for python -m pytest. What happens is decided by the group's folder of scratch files.
echo "gpus $CUDA_VISIBLE_DEVICES port $MASTER_PORT"
case "$*" in
  *multi_gpu*) echo "t::a PASSED [ 50%]"; trap "echo asked to end; exit 143" TERM; sleep 60 & wait; exit 1 ;;
  *--ignore*) kill -9 $$ ;;
  *tests/te*) echo "FAILED t::b - assert 1"; echo "==== 1 failed, 3 passed in 2.00s ===="; exit 1 ;;
  *tests/nn*) echo "==== 7 skipped, 2 deselected in 2.00s ===="; exit 0 ;;
  *tests/kernels*) echo "==== 5 passed, 2 deselected in 2.00s ===="; exit 0 ;;
esac
"""


def test_a_run_reports_what_passed_failed_and_was_cut_off(tmp_path):
    fake = executable(tmp_path / "fake", FAKE_PYTEST)
    out, path = tmp_path / "out", with_gpus(tmp_path, "0 1")
    environment = os.environ | {"PATH": path, "PYTHON": str(fake)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    groups = ["kernels", "kernels-q*", "te", "nn", "other", "ranks"]
    command = [sys.executable, ROOT / "scripts" / "gpu_tests.py", *groups, "--out", out, "--limit", "10", "--commit", "abc123"]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert result.returncode == 1, result.stdout + result.stderr
    with open(out / "summary.csv") as stream:
        rows = {row["group"]: row for row in csv.DictReader(stream)}
    assert {name: row["result"] for name, row in rows.items()} == {
        "kernels-quantize": "passed", "kernels": "passed", "te": "failed", "nn": "failed", "other": "failed", "ranks": "cut off",
    }  # fmt: skip
    assert rows["kernels"]["closing_line"] == "5 passed, 2 deselected" and rows["nn"]["closing_line"] == "7 skipped, 2 deselected"
    assert rows["other"]["closing_line"] == "ended with status -9 and no closing line"
    assert rows["ranks"]["closing_line"] == "cut off by time after 1 passed" and "asked to end" in (out / "ranks.log").read_text()
    assert "    FAILED t::b - assert 1" in result.stdout and "not passed: " in result.stdout
    seen = [re.match(r"gpus (\S+) port (\d+)", (out / f"{name}.log").read_text()) for name in rows]
    assert all(seen) and len({match[2] for match in seen}) == len(rows), "every process needs a port of its own"
    assert {match[1] for match in seen} == {"0", "1", "0,1"} or {match[1] for match in seen} == {"0", "1", "1,0"}
    assert (out / "summary.md").read_text().startswith("| command | commit | date | closing line | seconds |\n")


def test_groups_that_wait_when_time_is_over_are_not_passed(gpu_tests, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", str(executable(tmp_path / "fake", "#!/bin/sh\nexec sleep 60\n")))
    one = [g for g in gpu_tests.GROUPS if fnmatch(g.name, "kernels-gelu*")]
    run_of_two = gpu_tests.Run(tmp_path, "", "abc", tmp_path)
    gpu_tests.work(run_of_two, one, gpu_tests.Slots({"0": 0}, 1), 0.5)
    assert [row["result"] for row in run_of_two.rows] == ["cut off", "not run"]


def test_an_empty_group_passes_only_when_k_emptied_it(gpu_tests):
    log = "===== 9 deselected in 1.00s =====\n"
    assert gpu_tests.outcome(log, 5, True)[0] == "nothing" and gpu_tests.outcome(log, 5, False)[0] == "failed"
    assert gpu_tests.outcome("=== 3 passed, 1 warning in 61.05s (0:01:01) ===\n", 0, False) == ("passed", "3 passed, 1 warning")
