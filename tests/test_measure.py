"""scripts/measure.py without a GPU: its commands' options exist, it keeps what came out and where it came from, and refuses what no commit names."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

ROOT = Path(__file__).resolve().parents[1]
GPU = "0, NVIDIA H200, 580.159.04"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("measure")


@pytest.fixture
def part(measure, monkeypatch, tmp_path):
    """part(command) -> runs it as a part on a machine with one GPU and a clean tree: (exit status, OUT)."""
    gpu_machine = import_module("gpu_machine")
    monkeypatch.setattr(gpu_machine, "gpus", lambda: [gpu_machine.Gpu(*GPU.split(", "))])
    monkeypatch.setattr(gpu_machine, "code", lambda told=None, apart_from=(): gpu_machine.Code("abc", ()))

    def run(command: str, *arguments: str):
        one = measure.Part("one", 1, command, [measure.Table("x.csv", "x.csv"), measure.Table("x.csv", "y.csv", measure.in_order)])
        monkeypatch.setattr(measure, "BY_NAME", {"one": one})
        return measure.main(["one", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments]), tmp_path / "out"

    return run


def python_parts() -> list[str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return [p.name for p in import_module("measure").PARTS if p.command.startswith("python3")]
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the scripts would run")
@pytest.mark.parametrize("name", python_parts())
def test_the_scripts_take_the_options_of_their_part(measure, monkeypatch, tmp_path, capsys, name):
    """Each script is started as it would be; it gets past its imports and its options and stops where it finds no GPU (or no torchrun)."""
    words = shlex.split(measure.command_line(measure.BY_NAME[name].command, tmp_path))[1:]
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    if name == "te":
        pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    monkeypatch.setattr(sys, "argv", words[script:])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / words[script]), run_name="__main__")
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert re.search("needs a CUDA GPU|start this with torchrun", said), said
    assert "unrecognized" not in said


def test_shell_parts_start_scripts_that_are_there(measure):
    for one in measure.PARTS:
        words = [word for word in shlex.split(one.command) if word.startswith("scripts/")]
        assert len(words) == 1 and (ROOT / words[0]).is_file(), one.command
    assert len(measure.BY_NAME) == len(measure.PARTS)
    targets = [table.target for one in measure.PARTS for table in one.tables]
    assert len(set(targets)) == len(targets), "two parts write the same table"


def test_benchmarks_page_lists_every_part(measure):
    """`measure.py --list > ...`: the page gives the exact command of every part."""
    assert measure.listing(measure.PARTS) in (ROOT / "docs" / "benchmarks.md").read_text()


def columns_wanted(target: str) -> set[str]:
    """Columns that the tables of the documents take from a CSV."""
    found: set[str] = set()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for columns in re.findall(rf"<!-- csv {re.escape(target)} (.*?)(?: where .*?)? -->", page.read_text()):
            found |= {column.strip().partition(":")[0] for column in columns.split(",")}
    return found


SPEED = ["ms_per_iteration", "speedup", "ms_min", "ms_max", "peak_mb", "peak_vs_baseline_mb", "resident_mb", "peak_above_resident_mb"]


def test_changed_tables_have_the_columns_of_the_documents(measure):
    def row(columns, *values):
        return dict(zip(columns, values, strict=True))

    tflops = {"bf16": "800.2", "cublas fast": "1500", "cublas split": "1400", "row x column fast": "1", "ours fast": "1425", "ours split": "1260"}
    bench = [row(("kind", "shape", "contender", "tflops"), "wgrad", "1x2x3", *one) for one in tflops.items()]
    shares = {"copy (3 bytes)": ("9", "1.0"), "quantize row": ("10.04", "0.917"), "TE cast": ("12", "")}
    kernels = [row(("shape", "op", "us", "of_copy"), "8x4", name, *one) for name, one in shares.items()]
    kernels.append(row(("shape", "op", "us", "of_copy"), "host", "x", "1", ""))
    speed = [dict.fromkeys(SPEED, "1") | {"recipe": name} for name in ("X=32 bf16", "moss --x 1.5", "X=32 bf16.2", "moss --x 1.5.2")]
    results = {"gemm.csv": measure.side_by_side(bench), "kernels.csv": measure.at_defaults(kernels)}
    results |= {name: measure.in_order([dict(r) for r in speed]) for name in ("megatron_dense_8l_7b.csv", "megatron_moe_6l_v2lite.csv")}
    models = [dict.fromkeys(SPEED, "1") | {"recipe": name} for name in ("llama3_8l_8b+bf16", "fog_8l_8b+fog", "fog_8l_8b+fog.2")]
    results["megatron_fog_8b.csv"] = measure.by_model(models)
    for name, rows in results.items():
        assert columns_wanted(name) and columns_wanted(name) <= set(rows[0]), name
    assert results["gemm.csv"] == [{
        "product": "wgrad", "shape": "1x2x3", "bf16": "800", "cublas_fast": "1500", "cublas_split": "1400", "te_accumulating": "",
        "ours_fast": "1425", "ours_split": "1260", "fast_vs_cublas": "95%", "split_vs_cublas": "90%",
    }]  # fmt: skip
    assert [(r["operation"], r["us"], r["percent_of_copy"]) for r in results["kernels.csv"]] == [("quantize row", "10.0", "92"), ("TE cast", "12.0", "")]
    assert [(r["order"], r["recipe"]) for r in results["megatron_dense_8l_7b.csv"]] == [
        ("1", "X=32 bf16"), ("2", "moss --x 1.5"), ("3", "X=32 bf16"), ("4", "moss --x 1.5"),
    ]  # fmt: skip
    assert [(r["model"], r["recipe"]) for r in results["megatron_fog_8b.csv"]] == [("llama3_8l_8b", "bf16"), ("fog_8l_8b", "fog"), ("fog_8l_8b", "fog")]


def test_a_part_that_ends_well_leaves_tables_and_where_they_come_from(part, capsys):
    status, out = part('printf "recipe,ms\\nmoss,1\\nmoss.2,3\\n" > OUT/x.csv')
    assert status == 0, capsys.readouterr().out
    assert (out / "x.csv").read_text() == "recipe,ms\nmoss,1\nmoss.2,3\n"
    with open(out / "y.csv", newline="") as stream:
        assert [row["recipe"] for row in csv.DictReader(stream)] == ["moss", "moss"]
    record = json.loads((out / "one.provenance.json").read_text())
    assert (record["commit"], record["changes"], record["gpus"], record["driver"]) == ("abc", [], ["NVIDIA H200"], "580.159.04")
    assert record["files"] == ["x.csv", "y.csv"] and record["command"].endswith("OUT/x.csv") and record["versions"]["torch"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo first; echo broken; exit 3", "ended with status 3"),
        ("echo broken; sleep 60", "cut off by the time limit"),
        ("echo broken", "its output gives no table"),
        ("echo broken; echo ms,other > OUT/x.csv; echo 1,2 >> OUT/x.csv", "its output gives no table (KeyError('recipe'))"),
    ],
)
def test_a_part_that_fails_shows_its_log_and_has_no_provenance(part, capsys, command, words):
    status, out = part(command, "--limit", "1.5")
    said = capsys.readouterr().out
    assert status == 1 and words in said and "    broken" in said
    assert not (out / "one.provenance.json").exists() and not (out / "y.csv").exists()


def test_a_part_for_which_no_time_is_left_is_not_started(part, capsys):
    assert part("echo broken", "--limit", "0")[0] == 1
    assert "not started, no time was left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "code", "arguments", "words"),
    [
        (0, ("abc", ()), [], "no NVIDIA GPU"),
        (1, ("abc", ()), ["dispatch"], "dispatch needs 2 GPUs, 1 found"),
        (1, ("abc", ("setup.py",)), [], "the tree differs from its commit (setup.py): commit first, or --dirty"),
        (1, ("unknown", None), [], "name its commit with --commit HASH"),
        (1, ("abc", ("setup.py",)), ["--dirty"], None),
        (1, ("told", None), [], None),
    ],
)
def test_what_cannot_give_figures_is_refused_in_one_sentence(measure, gpus, code, arguments, words):
    machine = import_module("gpu_machine")
    args = measure.parse(["te", *arguments])
    parts = [measure.BY_NAME[name] for name in args.parts]
    reason = measure.refusal(args, parts, [machine.Gpu("0", "NVIDIA H200", "580")] * gpus, machine.Code(*code))
    assert (reason is None) if words is None else (words in reason)


def test_commit_and_changes_come_from_git(measure, monkeypatch, tmp_path):
    """In a repository of its own: the commit, what differs from it, less the folder of results; none of it without git's folder."""
    machine = import_module("gpu_machine")
    monkeypatch.setattr(machine, "ROOT", tmp_path.resolve())
    assert machine.code() == machine.Code("unknown", None) and machine.code("told") == machine.Code("told", None)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    (tmp_path / "results").mkdir()
    for name in ("a.py", "results/t.csv"):
        (tmp_path / name).write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    assert machine.code(apart_from=[tmp_path / "results"]).changes == ()
    (tmp_path / "results" / "t.csv").write_text("2\n")
    assert machine.code(apart_from=[tmp_path / "results"]).changes == () and machine.code().changes == ("results/t.csv",)
    (tmp_path / "new.py").write_text("")
    found = machine.code("told", apart_from=[tmp_path / "results"])
    assert found.changes == ("new.py",) and len(found.commit) >= 7 and found.commit != "told"


def test_gpus_are_those_that_cuda_visible_devices_shows(measure, monkeypatch, tmp_path):
    machine = import_module("gpu_machine")
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\nfor n in 0 1 2; do echo "$n, NVIDIA H200, 580.159.04"; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, expected in ((None, ["0", "1", "2"]), ("2,0", ["2", "0"]), ("", []), ("7", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible is not None else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert [gpu.index for gpu in machine.gpus()] == expected


@pytest.mark.parametrize(("raw", "table"), [("gemm_bench", "gemm"), ("grouped_bench", "grouped")])
def test_kept_tables_are_those_of_the_kept_figures(measure, raw, table):
    """Both files of a part are in docs/benchmarks: what stands side by side must follow from the figures."""
    (change,) = {t.change for part in measure.PARTS for t in part.tables if t.target == f"{table}.csv"}
    rows, expected = ([*csv.DictReader((measure.RESULTS / f"{name}.csv").read_text().splitlines())] for name in (raw, table))
    assert rows and change(rows) == expected
