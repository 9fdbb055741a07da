"""What is printed at start, what is logged, and what the log parser makes of it."""

from __future__ import annotations

import argparse
import json
import math

import pytest
from meta_model import reports

torch = pytest.importorskip("torch", reason="torch is not installed")

from fp8_recipes.megatron import parse_log, report  # noqa: E402


def test_ranges():
    assert report._ranges([3, 1, 2, 7, 9, 8]) == "1-3,7-9"
    assert report._ranges([5]) == "5"
    assert report._ranges([-1]) == "-"


def test_precision_table_honours_first_and_last_layers_and_the_precision_file(monkeypatch):
    te = pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

    class Linear(torch.nn.Module):
        def __init__(self, quant=None):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(8, 4))
            self.te_quant_params = quant

    class Layer(torch.nn.Module):
        def __init__(self, number, quant=None):
            super().__init__()
            self.layer_number = number
            self.linear = Linear(quant)
            self.norm = torch.nn.LayerNorm(4, bias=False)
            self.core_attention = torch.nn.Identity()

    monkeypatch.setattr(te, "Linear", Linear)
    override = argparse.Namespace(training_recipe=argparse.Namespace(custom_recipe_factory=None, fp8_quantization_recipe=None))
    model = torch.nn.Module()
    model.module = torch.nn.Module()
    model.module.layers = torch.nn.ModuleList([Layer(1), Layer(2), Layer(3, override), Layer(4)])
    model.module.output_layer = torch.nn.Linear(4, 8, bias=False)
    args = argparse.Namespace(
        fp8="e4m3", fp8_recipe="moss", first_last_layers_bf16=True, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1, num_layers=4
    )
    lines = [" ".join(line.split()) for line in report.precision_table(args, [model]).splitlines()]
    assert "layers.*.linear 1,4 8x4 bf16 (first / last)" in lines
    assert "layers.*.linear 2 8x4 FP8 moss" in lines
    assert "layers.*.linear 3 8x4 bf16 (precision file)" in lines
    assert "layers.*.core_attention 1-4 - bf16 (attention)" in lines
    assert "layers.*.norm 1-4 4 bf16 (norm)" in lines
    assert "output_layer - 8x4 bf16" in lines


def test_table_says_how_the_mlps_run_and_why(monkeypatch):
    pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    mlp = pytest.importorskip("megatron.core.transformer.mlp", reason="Megatron-Core is not installed")
    from fp8_recipes.megatron import mlp as ours

    blocks = []
    for bias in (False, True, True):
        block = mlp.MLP.__new__(mlp.MLP)
        torch.nn.Module.__init__(block)
        block.bias = bias
        blocks.append(block)
    exact = argparse.Namespace(fp8="e4m3", fp8_recipe="moss_exact")
    assert "fold=none" in report._fused_mlps(exact, blocks)[0]
    monkeypatch.setattr(ours, "static_reason", lambda module, recipe: "its linears have a bias" if module.bias else None)
    args = argparse.Namespace(fp8="e4m3", fp8_recipe="moss")
    assert report._fused_mlps(args, blocks) == [
        "1 MLPs: in FP8 layers norm, fc1, SwiGLU and fc2 as one function",
        "2 MLPs: module by module: its linears have a bias",
    ]
    assert report._fused_mlps(argparse.Namespace(fp8="e4m3", fp8_recipe="tensorwise"), blocks) == []


def test_table_of_a_real_megatron_model(base_flags):
    """GPTModel of the released wheel with TransformerEngine's modules, built without memory, in its own process (it initialises torch.distributed)."""
    pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")
    (lines,) = reports(f"{base_flags} --fp8-recipe moss --first-last-layers-bf16")
    for name, shape in (("self_attention.linear_qkv", "768x256"), ("self_attention.linear_proj", "256x256"), ("mlp.linear_fc1", "1024x256")):
        assert f"decoder.layers.*.{name} 2-3 {shape} FP8 moss" in lines
        assert f"decoder.layers.*.{name} 1,4 {shape} bf16 (first / last)" in lines
    assert "output_layer - 256x256 FP8 moss, dy e5m2" in lines, "the head is neither the first layer nor the last"
    assert "embedding.word_embeddings - 256x256 bf16" in lines
    assert "4 MLPs: in FP8 layers norm, fc1, SwiGLU and fc2 as one function" in lines
    assert "TRACKED 17" in lines


def write_log(path, losses, start=1):
    log = report.IterationLog(path)
    for n, loss in enumerate(losses, start):
        log.write(n, {"lm loss": torch.tensor(loss)}, 1e-3, 0.5, 0)


def test_iteration_log_keeps_the_bits(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    losses = [10.1, math.pi, 1e-7]
    write_log(path, losses)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[0]["ms"] is None and lines[1]["ms"] >= 0 and lines[2]["skipped"] == 0
    expected = {n: torch.tensor(value).item() for n, value in enumerate(losses, 1)}
    assert parse_log.read_losses(path) == expected


def test_same_finds_one_bit(tmp_path):
    through, resumed, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    losses = [3.0, 2.5, 2.25, 2.125]
    write_log(through, losses)
    write_log(resumed, losses[2:], start=3)
    write_log(other, [losses[2], losses[3] * (1 + 2.0**-23)], start=3)
    assert "2 steps (3 to 4) equal bit for bit" in parse_log.compare(through, resumed, 3, None)
    with pytest.raises(parse_log.LogError, match="1 of 2 steps differ, first step 4"):
        parse_log.compare(through, other, 3, None)
    assert "within 1 %" in parse_log.compare(through, other, 3, 0.01)
    with pytest.raises(parse_log.LogError, match="no step from 9 on"):
        parse_log.compare(through, resumed, 9, None)


def test_nan_is_not_near(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_log(a, [2.0])
    write_log(b, [float("nan")])
    with pytest.raises(parse_log.LogError, match="differ"):
        parse_log.compare(a, b, 1, 0.5)
    with pytest.raises(parse_log.LogError, match="not finite"):
        parse_log.expect_steps(b, "1-1")


def test_expected_steps(tmp_path):
    path = tmp_path / "a.jsonl"
    write_log(path, [2.0, 1.5], start=21)
    assert "steps 21-22, final loss 1.50000" in parse_log.expect_steps(path, "21-22")
    with pytest.raises(parse_log.LogError, match="expected 21-30"):
        parse_log.expect_steps(path, "21-30")


LINE = (
    " [2026-01-01 00:00:00.000000] iteration {n:8d}/      10 | consumed samples:          8 | "
    "elapsed time per iteration (ms): {ms:.1f} | learning rate: 3E-04 |\n"
)


def speed_log(path, times, peak):
    path.write_text(
        "".join(LINE.format(n=n, ms=ms) for n, ms in enumerate(times, 1))
        + f'fp8_recipes_summary {{"peak_allocated_bytes": {peak}, "peak_reserved_bytes": 1}}\n'
    )


def test_speed_table(tmp_path, capsys):
    speed_log(tmp_path / "bf16.log", [9000, 800, 800, 700, 710, 690], 40 * 2**30)
    speed_log(tmp_path / "moss.log", [9000, 600, 600, 500, 500, 510], 39 * 2**30)
    parse_log.main(["speed", "--csv", str(tmp_path / "speed.csv"), f"bf16={tmp_path / 'bf16.log'}", f"moss:interval=5={tmp_path / 'moss.log'}"])
    out = capsys.readouterr().out
    assert "| bf16 | 700.0 | 1.000 | 690.0 | 710.0 | 3 | 40960 | +0 |" in out
    assert "| moss:interval=5 | 500.0 | 1.400 | 500.0 | 510.0 | 3 | 39936 | -1024 |" in out
    assert (tmp_path / "speed.csv").read_text().splitlines()[0].startswith("recipe,ms_per_iteration,speedup")


def test_incomplete_logs_are_named(tmp_path):
    (tmp_path / "a.log").write_text(LINE.format(n=1, ms=3.0))
    with pytest.raises(SystemExit, match="no iteration after the first 3"):
        parse_log.main(["speed", f"a={tmp_path / 'a.log'}"])
    (tmp_path / "a.log").write_text(LINE.format(n=9, ms=3.0))
    with pytest.raises(SystemExit, match="did not reach its end"):
        parse_log.main(["speed", f"a={tmp_path / 'a.log'}"])
    with pytest.raises(SystemExit, match="NAME=PATH"):
        parse_log.main(["speed", "a.log"])


def test_loss_summary_csv_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fp8_recipes[demo]')")
    base = [4.0 / n for n in range(1, 101)]
    write_log(tmp_path / "bf16.jsonl", base)
    write_log(tmp_path / "moss.jsonl", [x * 1.001 for x in base])
    parse_log.main(
        ["loss", "--csv", str(tmp_path / "loss.csv"), "--png", str(tmp_path / "loss.png"), f"bf16={tmp_path / 'bf16.jsonl'}", f"moss={tmp_path / 'moss.jsonl'}"]
    )
    assert "| moss | 100 | 0.05511 | +0.1000 | 0.100 |" in capsys.readouterr().out
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 101
    assert (tmp_path / "loss_summary.csv").exists()
    both = (tmp_path / "loss.png").read_bytes()
    parse_log.main(["loss", "--png", str(tmp_path / "loss.png"), f"bf16={tmp_path / 'bf16.jsonl'}"])
    alone = (tmp_path / "loss.png").read_bytes()
    heights = [int.from_bytes(png[20:24], "big") for png in (both, alone)]
    assert both[:4] == alone[:4] == b"\x89PNG" and heights[1] < heights[0], "no empty panel under a single run"


def test_cost_of_work_in_every_tenth_iteration_is_in_the_mean_over_a_period(tmp_path):
    """Every tenth iteration takes 40 ms more, half of it in the next one; single spikes leave medians, and so the figure, alone."""
    times = [100.0 + 30 * (n % 10 == 0) + 10 * (n % 10 == 1) for n in range(1, 44)]
    times[5] = times[18] = 5000.0
    log = tmp_path / "log"
    lines = [f" iteration {n:8d}/ 43 | elapsed time per iteration (ms): {ms:.1f} | learning rate: 3E-04 |" for n, ms in enumerate(times, 1)]
    log.write_text("\n".join([*lines, 'fp8_recipes_summary {"peak_allocated_bytes": 1048576, "peak_reserved_bytes": 1}']))
    assert parse_log.read_speed("moss", log, warmup=13, period=10).ms == 104.0
    assert parse_log.read_speed("moss", log, warmup=13).ms == 100.0, "the median does not see it"
    with pytest.raises(parse_log.LogError, match="29 iterations after the first 14 are no whole number of periods of 10"):
        parse_log.read_speed("moss", log, warmup=14, period=10)
