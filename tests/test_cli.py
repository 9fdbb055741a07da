"""The console command: what it writes, and one clear sentence with exit code 2 for what it cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fp8_recipes
from fp8_recipes import RECIPES, demo_report
from fp8_recipes.cli import describe, main
from fp8_recipes.demo import Setup, setup

PNG = b"\x89PNG\r\n\x1a\n"


def tiny_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of one narrow layer and two short rows per batch, for tests of what it is asked to do and not of what it trains."""

    def shrink(*arguments) -> Setup:
        chosen = setup(*arguments)
        return replace(chosen, gpt=replace(chosen.gpt, layers=1, width=32, heads=2, ffn=64, seq=32), batch=2, eval_batches=1)

    monkeypatch.setattr(demo_report, "setup", shrink)


def test_demo_writes_table_log_summary_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "first"
    assert main(["demo", "--recipe", "moss:interval=2", "--steps", "3", "--device", "cpu", "--out", str(out), "--data", str(tiny_text(tmp_path))]) == 0
    assert (out / "loss.png").read_bytes().startswith(PNG)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(e["run"], e["step"]) for e in log] == [(run, step) for run in ("fp32", "moss") for step in (1, 2, 3)]
    assert all(e["tokens"] == e["step"] * 1024 and 0 < e["loss"] < 7 and e["grad_norm"] > 0 and e["lr"] > 0 for e in log)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(e["run"], e["step"]) for e in metrics if e["kind"] == "metrics"] == [(run, step) for run in ("fp32", "moss") for step in (1, 3)]
    assert metrics[0]["tensors"]["layers.1.qkv"]["kurtosis"] > 1 and "layers.1.mlp.down.grad" in metrics[-1]["tensors"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recipe"]["interval"] == 2 and summary["setup"]["steps"] == 3
    assert summary["quantised"]["final_loss"] == pytest.approx(sum(e["loss"] for e in log[3:]) / 3)
    assert summary["deviation_percent"]["final_loss"] == pytest.approx((summary["quantised"]["final_loss"] / summary["baseline"]["final_loss"] - 1) * 100)
    shown = capsys.readouterr().out
    for words in ("training loss", "validation loss", "deviation", "flushes, grad", "saturations", "ms per step", "fp32 on CPU, bf16 on CUDA"):
        assert words in shown
    assert f"{summary['baseline']['final_loss']:.4f}" in shown and f"{summary['quantised']['validation_loss']:.4f}" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "mos"], "unknown recipe 'mos'; known: .*did you mean moss"),
        (["--recipe", "moss:intervall=3"], "no key 'intervall' .did you mean interval"),
        (["--recipe", "missing.yaml"], "missing.yaml: no such file"),
        (["--arch", "fog-strong"], "unknown architecture 'fog-strong'; known: llama3, .*did you mean fog-"),
        (["--arch", "fog-max:activation=swiglu"], "activation=swiglu contradicts the name: fog-max has activation=xielu"),
        (["--data", "no/such/text"], "--data no/such/text: no such file or folder"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--steps", "-5"], "--steps -5 must be at least 1"),
        (["--device", "cuda"], "--device cuda: .*use --device cpu"),
        (["--recipe", "fog"], "recipe 'fog': stock=delayed and attention=fp8 are TransformerEngine's"),
        (["--recipe", "moss:attention=fp8"], "recipe 'moss': attention=fp8 is TransformerEngine's"),
        (["--recipe", "moss:weight_cache=row"], "weight_cache=row needs to know where a step begins"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999 must be at least 0 and below"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--out", "/proc/nowhere/out"], "--out /proc/nowhere/out cannot be made"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    with pytest.raises(ValueError, match=words):
        raise ValueError(captured.err)
    assert not (tmp_path / "runs").exists()


def test_demo_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None) -> None:
    out = tmp_path / "out"
    arguments = ["--steps", "2", "--device", "cpu", "--out", str(out), "--data", str(tiny_text(tmp_path))]
    assert main(["demo", "--arch", "fog-flash:tanh_alpha=1", *arguments]) == 0
    written = json.loads((out / "summary.json").read_text())["setup"]["gpt"]["arch"]
    assert written["name"] == "fog-flash" and written["tanh_alpha"] == 1.0 and written["activation"] == "gelu"
    assert "architecture: fog-flash(pre_norm=false, post_norm=true" in capsys.readouterr().out
    assert main(["demo", *arguments]) == 0
    assert json.loads((out / "summary.json").read_text())["setup"]["gpt"]["arch"]["name"] == "llama3"
    capsys.readouterr()


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tiny_text(tmp_path))]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "pip install rich matplotlib" in capsys.readouterr().err


def test_recipe_from_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None) -> None:
    pytest.importorskip("yaml", reason="pyyaml is needed to read recipes from files")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: row\nname: mine\ngrad: e5m2\n")
    out = tmp_path / "out"
    assert main(["demo", "--recipe", f"{recipe}:promote=128", "--steps", "1", "--device", "cpu", "--out", str(out), "--data", str(tiny_text(tmp_path))]) == 0
    written = json.loads((out / "summary.json").read_text())["recipe"]
    assert (written["name"], written["grad"], written["promote"]) == ("mine", "e5m2", 128)
    capsys.readouterr()


def test_recipes_lists_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert "predicted scale" in describe(RECIPES["moss"]) and "micro folded to row" in describe(RECIPES["moss"])
    assert "exact bf16 products" in describe(RECIPES["tile"]) and "LM head" not in describe(RECIPES["tile"]) and "LM head" in describe(RECIPES["moss"])
    assert "experts as one FP8 dataflow, every other layer moss" in describe(RECIPES["fp8_flow_moe"])


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and fp8_recipes.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "COMMAND" in capsys.readouterr().err
