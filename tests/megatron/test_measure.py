"""The Megatron parts of scripts/measure.py: every training that they would start passes Megatron's own parser and checks, and this package's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'fp8_recipes[demo]')")

from fp8_recipes.megatron import metrics  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = f"""#!{sys.executable}
# Stands in for python: notes a training's flags and writes the logs that the scripts read; the rest goes to the real interpreter.
import json, os, sys
from pathlib import Path
if "fp8_recipes.pretrain_gpt" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
flags = sys.argv[sys.argv.index("fp8_recipes.pretrain_gpt") + 1:]
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(flags) + "\\n")
value = lambda name, default: flags[flags.index(name) + 1] if name in flags else default
first = 301 if "--load" in flags else 1
last = int(value("--exit-interval", value("--train-iters", "0")))
if "--fp8-log" in flags:
    with open(value("--fp8-log", ""), "a") as log:
        log.writelines(json.dumps({{"iteration": n, "lm_loss_hex": "0x1.8p+1"}}) + "\\n" for n in range(first, last + 1))
if "--fp8-metrics-log" in flags:
    with open(value("--fp8-metrics-log", ""), "a") as log:
        line = {{"kind": "metrics", "loss": 3.0, "tensors": {{"layers.1.qkv": {{"kurtosis": 3.0}}}}}}
        log.writelines(json.dumps(line | {{"step": n}}) + "\\n" for n in (1, 10))
if "--save" in flags:
    Path(value("--save", "")).mkdir(parents=True)
    Path(value("--save", ""), "latest_checkpointed_iteration.txt").write_text(str(last))
for n in range(1, last + 1):
    print(f" iteration {{n}}/ {{last}} | elapsed time per iteration (ms): 9.0 | learning rate: 3E-04 |")
print('fp8_recipes_summary {{"peak_allocated_bytes": 1572864000, "peak_reserved_bytes": 1}}')
"""


def megatron_parts() -> list[str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return [p.name for p in import_module("measure").PARTS if not p.command.startswith("python3")]
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def started(command: str, folder: Path) -> list[list[str]]:
    """Flags of every training that the command starts."""
    fake = folder / "python3"
    fake.write_text(STAND_IN)
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "NOTES": str(folder / "notes"), "DATA": str(folder / "text")}
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


@pytest.mark.parametrize("name", megatron_parts())
def test_megatron_takes_the_flags_and_every_table_is_written(configure, monkeypatch, tmp_path, name):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    measure = import_module("measure")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    part, out = measure.BY_NAME[name], tmp_path / "out"
    runs = started(measure.command_line(part.command, out), tmp_path)
    words = shlex.split(part.command.split(" OUT ")[1])
    assert len(runs) == len(words) * (2 if "ROUNDS=2" in part.command else 1)
    without_environment = {re.sub(r"^([A-Z][A-Z0-9_]*=\S+ )+", "", run) for run in words}
    assert len({tuple(sorted(set(flags) - {"--fp8-log"})) for flags in runs}) >= len(without_environment)
    steps = re.search(r"\bSTEPS=(\d+)", part.command)
    for flags in {tuple(flags): flags for flags in runs}.values():
        args, config = configure(base=" ".join(flags))
        assert config is not None and args.train_iters == int(steps[1] if steps else 800 if name.startswith("loss") else 10)
        if "--cross-entropy-loss-fusion" in part.command:
            assert args.cross_entropy_loss_fusion
        assert not (args.moe_router_fusion and args.moe_router_padding_for_quantization), "dies in backward: docs/megatron.md"
        if args.fp8_metrics_interval and args.fp8_metrics_log != "/dev/null":
            judged = args.train_iters - metrics._warmup(args)
            assert judged > args.train_iters / 2, "a run whose rate warms up to its end would raise no alarm"
    assert measure.keep(part, out, tmp_path / "tables") == [table.target for table in part.tables]
