from __future__ import annotations

import base64
import csv
import json
import math
import re
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fp8_recipes.cli import main
from fp8_recipes.inspection import InspectError, inspect, read_run
from fp8_recipes.inspection.read import mean_over
from fp8_recipes.inspection.turn import turned
from fp8_recipes.metrics import Alarms

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fp8_recipes[demo]')")


def tensor(kurtosis: float, **fp8: float) -> dict[str, Any]:
    return {"kurtosis": kurtosis, "pooled_kurtosis": kurtosis, "rms": 1.0, "amax": 9.0, "elements": 64, **fp8}


def quantised(flush: float) -> dict[str, Any]:
    return tensor(5.0, flush_share=flush, saturation_share=0.0, fold_flush_share=0.001, scale_exponent_min=-9, scale_exponent_max=-6)


def write_run(folder: Path, steps: int = 30, alarm: bool = True, fp8: bool = True, loss: Callable[[int], float] = lambda i: 5 - math.log(i)) -> Path:
    """A run of two layers: Megatron's iteration log and the metrics, as `IterationLog` and `JsonLines` write them."""
    folder.mkdir(parents=True)
    with (folder / "loss.jsonl").open("w") as stream:
        for i in range(1, steps + 1):
            stream.write(json.dumps({"iteration": i, "lm_loss": loss(i), "lm_loss_hex": "0x1", "grad_norm": 1.0 + 1 / i, "learning_rate": 1e-3}) + "\n")
    with (folder / "metrics.jsonl").open("w") as stream:
        for i in range(10, steps + 1, 10):
            tensors = {f"layers.{n}.{t}": tensor(3.0 * n + i / 10) for n in (1, 2) for t in ("qkv", "down_input", "block_output")}
            if fp8:
                tensors |= {f"layers.{n}.mlp.linear_fc2.{role}": quantised(0.01 * n) for n in (1, 2) for role in ("input", "weight", "grad")}
            stream.write(json.dumps({"kind": "metrics", "step": i, "loss": loss(i), "tensors": tensors}) + "\n")
        if alarm:
            line = {"kind": "alarm", "step": 20, "alarm": "kurtosis", "name": "layers.2.qkv", "layer": 2, "tensor": "qkv", "value": 1.4, "threshold": 1.0}
            stream.write(json.dumps(line | {"message": "step 20, layer 2, qkv: kurtosis <8> & growing"}) + "\n")
    return folder


def test_reading_puts_files_of_a_folder_together_by_step(tmp_path: Path) -> None:
    (run,) = read_run(write_run(tmp_path / "a"))
    assert (run.name, run.last_step, len(run.scalars["loss"])) == ("a", 30, 30)
    assert run.watched() == ["qkv", "down_input", "block_output"]
    assert run.layers("qkv", "kurtosis") == {1: {10: 4.0, 20: 5.0, 30: 6.0}, 2: {10: 7.0, 20: 8.0, 30: 9.0}}
    assert mean_over(run.layers("qkv", "kurtosis")) == {10: 5.5, 20: 6.5, 30: 7.5}
    assert run.of_role("grad", "flush_share")["layers.2.mlp.linear_fc2.grad"] == {10: 0.02, 20: 0.02, 30: 0.02}
    assert [a["alarm"] for a in run.alarms] == ["kurtosis"]


def test_a_resumed_run_shows_each_step_once_as_written_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"kind": "metrics", "step": 20, "tensors": {"layers.1.qkv": tensor(77.0)}}) + "\n")
    (run,) = read_run(folder)
    assert run.layers("qkv", "kurtosis")[1] == {10: 4.0, 20: 77.0, 30: 6.0}


def test_the_log_of_the_demo_holds_two_runs(tmp_path: Path) -> None:
    lines = [{"run": name, "step": i, "loss": 4.0 - i, "grad_norm": 1.0, "lr": 1e-3, "tokens": 9} for name in ("fp32", "moss") for i in (1, 2)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_run(path)
    assert [r.name for r in runs] == ["log: fp32", "log: moss"]
    assert runs[1].scalars["learning_rate"] == {1: 1e-3, 2: 1e-3}
    page = inspect([path]).read_text()
    assert page.count("data:image/png;base64,") == 1 and "no metrics recorded" in page


class Page(HTMLParser):
    """Checks nesting and gathers text, image sources and links to elsewhere."""

    void = ("meta", "img", "br", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.void:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)


def test_the_page_is_complete_in_itself(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b<c", alarm=False)
    path = inspect([a, b], tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["kurtosis.png", "loss.png", "readings.csv", "report.html", "scales.png", "which_first.csv"]
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text
    page = Page(text)
    words = " ".join(page.words)
    assert len(page.images) == 3 and all(i["alt"] for i in page.images)
    for image, name in zip(page.images, ("kurtosis", "loss", "scales"), strict=True):
        png = base64.b64decode((image["src"] or "").partition(",")[2])
        assert png == (path.parent / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert width > 800 and height > 400
    assert "a: 1 alarm; step 20, layer 2, qkv: kurtosis <8> & growing" in words
    assert "b<c: no alarm in 30 steps" in words
    assert "9 (layer 2)" in words and f"{5 - math.log(30):.4f}" in words
    assert "layers.2.mlp.linear_fc2.grad" in words and "2^-9 .. 2^-6" in words


def test_a_bf16_run_has_no_scales_and_a_short_one_no_growth(tmp_path: Path) -> None:
    path = inspect([write_run(tmp_path / "a", steps=10, alarm=False, fp8=False)])
    assert path.parent == tmp_path / "a" and not (tmp_path / "a" / "scales.png").exists()
    page = path.read_text()
    assert "too few readings" in page and "lose most" not in page


def test_growth_is_that_of_the_alarms(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with (folder / "m.jsonl").open("w") as stream:
        for i in range(10, 2001, 10):
            stream.write(json.dumps({"kind": "metrics", "step": i, "tensors": {"layers.1.qkv": tensor(i**0.5)}}) + "\n")
    assert "step^0.50" in inspect([folder]).read_text()


def test_infinite_and_missing_losses_are_drawn_around(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": {v}, "grad_norm": null}}\n' for i, v in enumerate(("3.0", "2.5", "NaN", "Infinity", "1e30", "2.4"))))
    (run,) = read_run(path)
    assert "grad_norm" not in run.scalars and math.isnan(run.scalars["loss"][2])
    assert inspect([path]).exists()


def test_a_line_cut_off_at_the_end_is_left_out_and_one_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_run(path)[0].scalars["loss"] == {1: 3.0}
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 3.0}\n')
    with pytest.raises(InspectError, match=r"log.jsonl, line 1: not JSON"):
        read_run(path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InspectError, match=r"log.jsonl cannot be read as text"):
        read_run(path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write_run(tmp_path / "a"))]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a' / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text('{"x": 1}\n')
    for given, told in (("missing", "no such file or folder"), ("empty", "holds no .jsonl file"), ("other.jsonl", "no line of other.jsonl")):
        assert main(["inspect", str(tmp_path / given)]) == 2
        assert told in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a"), "--out", str(tmp_path / "other.jsonl")]) == 2
    assert "name a folder" in capsys.readouterr().err


def losses(*pieces: tuple[int, float]) -> dict[int, float]:
    """(how many steps, loss) one after another, steps from 1."""
    values = [loss for count, loss in pieces for _ in range(count)]
    return dict(enumerate(values, start=1))


@pytest.mark.parametrize(
    ("loss", "step"),
    [
        (losses((40, 4.0), (60, 2.0)), None),
        (losses((40, 2.0), (60, 3.0)), 45),  # (15 * 2 + 5 * 3) / 20 = 2.25 is the first mean above 1.1 * 2
        (losses((40, 2.0), (30, 3.0), (40, 2.0)), None),  # came back
        (losses((40, 2.0), (60, 2.18)), None),  # 9 % is no turn
        (losses((40, 2.0), (23, 3.0)), None),  # above for 19 steps, from 45 to 63
        (losses((40, 2.0), (24, 3.0)), 45),
        (losses((40, 2.0), (20, math.nan)), 41),
        (losses((40, 2.0), (1, math.inf), (40, 2.0)), None),
        (losses((19, 2.0)), None),
    ],
)
def test_a_loss_has_turned_where_its_mean_stays_above_its_lowest(loss: dict[int, float], step: int | None) -> None:
    assert turned(loss) == step


def test_the_page_says_which_came_first_in_each_run(tmp_path: Path) -> None:
    """Shares beyond their thresholds are no warning of a divergence: the table and the figure go by the first alarm of kurtosis or non-finite values."""
    early = write_run(tmp_path / "early", steps=80, loss=lambda i: 2.0 if i <= 40 else 3.0)
    late = write_run(tmp_path / "late", steps=80, loss=lambda i: 2.0 if i <= 20 else 3.0)
    quiet = write_run(tmp_path / "quiet", alarm=False)
    for folder in (early, late):
        with (folder / "metrics.jsonl").open("a") as stream:
            line = {"kind": "alarm", "step": 10, "alarm": "saturation", "name": "layers.1.mlp.linear_fc1.input", "layer": 1, "tensor": "mlp.linear_fc1.input"}
            stream.write(json.dumps(line | {"value": 0.1, "threshold": 1e-5, "message": "step 10: saturated"}) + "\n")
            line = {"kind": "alarm", "step": 30, "alarm": "kurtosis", "name": "layers.1.block_output", "layer": 1, "tensor": "block_output"}
            stream.write(json.dumps(line | {"value": 1.2, "threshold": 1.0, "message": "step 30: grows"}) + "\n")
    page = inspect([early, late, quiet], tmp_path / "out").read_text()
    table = page[page.index("Alarm or loss first?") : page.index("<h2>Summary")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    quiet_loss = f"{sum(5 - math.log(i) for i in range(11, 31)) / 20:.4f}"
    assert rows == [
        ["early", "20", "20", "-", "30", "20", "2.0000", "45", "3.0000"],
        ["late", "20", "20", "-", "30", "20", "2.0000", "25", "3.0000"],
        ["quiet", "-", "-", "-", "-", "30", quiet_loss, "-", quiet_loss],
    ]
    with (tmp_path / "out" / "which_first.csv").open(newline="") as stream:
        assert [[value or "-" for value in row.values()] for row in csv.DictReader(stream)] == rows
    assert "early: 3 alarms; step 20, layer 2, qkv" in page
    assert "Alarm or loss first?" not in inspect([quiet], tmp_path / "alone").read_text()


def test_readings_are_what_alarms_and_turns_are_judged_by(tmp_path: Path) -> None:
    inspect([write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=10)], tmp_path / "out")
    with (tmp_path / "out" / "readings.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["run"], r["step"]) for r in rows] == [("a", "10"), ("a", "20"), ("a", "30"), ("b", "10")]
    assert [rows[2][t] for t in ("qkv", "down_input", "block_output")] == ["7.5"] * 3, "mean over layers"
    mean = sum(5 - math.log(i) for i in range(11, 31)) / 20
    assert [r["loss"] for r in rows] == ["", f"{sum(5 - math.log(i) for i in range(1, 21)) / 20:.5g}", f"{mean:.5g}", ""]
    assert rows[1]["grad_norm"] == "1.05"


def test_kurtosis_is_judged_again_and_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=600)
    with (folder / "metrics.jsonl").open("a") as stream:
        for i in range(10, 601, 10):
            stream.write(json.dumps({"kind": "metrics", "step": i, "tensors": {f"layers.{n}.block_output": tensor(i * i / 1e3) for n in (1, 2)}}) + "\n")
        line = {"kind": "alarm", "step": 10, "alarm": "saturation", "name": "layers.1.mlp.linear_fc1.input", "layer": 1, "tensor": "mlp.linear_fc1.input"}
        stream.write(json.dumps(line | {"value": 0.1, "threshold": 1e-5, "message": "step 10: saturated"}) + "\n")
    alarms = Alarms()
    expected = [a for i in range(10, 601, 10) for a in alarms.judge_kurtosis(i, {"layers.1.block_output": i * i / 1e3})]
    page = inspect([folder], tmp_path / "out", judge=True).read_text()
    assert len(expected) == 1 and "on average over layers" in page and "growing" not in page and "step 10: saturated" in page
    with (tmp_path / "out" / "which_first.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["first_alarm"], row["qkv_alarm"], row["block_output_alarm"]) == (str(expected[0].step), "", str(expected[0].step))
    assert "growing" in inspect([folder], tmp_path / "log").read_text(), "the log's own alarm"
