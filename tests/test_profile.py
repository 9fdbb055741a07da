"""scripts/profile_megatron.py: its report of a small made-up trace, and launch.sh --profile."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
spec = importlib.util.spec_from_file_location("profile_megatron", SCRIPTS / "profile_megatron.py")
assert spec is not None and spec.loader is not None
profile_megatron = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = profile_megatron
spec.loader.exec_module(profile_megatron)


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, correlation: int | None = None) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": {} if correlation is None else {"correlation": correlation}}


TRACE = [
    event("cuda_runtime", "cudaLaunchKernel", 900, 10, 7, 1),
    event("cuda_runtime", "cudaMalloc", 940, 5, 7),
    event("cuda_runtime", "cudaLaunchKernel", 1000, 20, 7, 2),
    event("cuda_runtime", "cudaLaunchKernel", 1005, 10, 8, 3),  # another thread
    event("kernel", "gemm", 1000, 100, correlation=1),
    event("kernel", "copy", 1050, 30, correlation=2),  # runs beside gemm
    event("kernel", "gemm", 1400, 200, correlation=3),
    {"ph": "i", "name": "a mark", "ts": 5},
]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_busy_time_gaps_and_host_times(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = json.dumps({"traceEvents": TRACE})
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    gpu, calls = profile_megatron.read(path)
    assert [(e.name, e.start, e.stop) for e in gpu] == [("gemm", 0, 100), ("copy", 50, 80), ("gemm", 400, 600)]
    busy, gaps = profile_megatron.busy_and_gaps(gpu)
    assert busy == 300 and gaps == [profile_megatron.Gap(100, 400, "gemm", "gemm")]
    assert profile_megatron.host_times(calls) == {"gemm": (0, 20, 2), "cudaMalloc": (30, 5, 1), "copy": (55, 20, 1)}
    done = subprocess.run([sys.executable, SCRIPTS / "profile_megatron.py", path], capture_output=True, text=True, check=True)
    assert "span 0.6 ms, GPU busy 0.3 ms, idle 0.3 ms" in done.stdout
    part = subprocess.run([sys.executable, SCRIPTS / "profile_megatron.py", path, "--from", "0.3"], capture_output=True, text=True, check=True)
    assert "span 0.2 ms, GPU busy 0.2 ms" in part.stdout and "copy" not in part.stdout
    nothing = subprocess.run([sys.executable, SCRIPTS / "profile_megatron.py", path, "--from", "9"], capture_output=True, text=True)
    assert nothing.returncode != 0 and "no kernel starts between" in nothing.stderr


def test_a_trace_without_a_gpu_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps([e for e in TRACE if e.get("cat") != "kernel"]))
    with pytest.raises(ValueError, match="no GPU event"):
        profile_megatron.read(path)


def test_launch_passes_the_profile_on() -> None:
    command = ["bash", SCRIPTS / "launch.sh", "--model", "tiny", "--recipe", "moss", "--profile", "out/a b.json", "--dry-run"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert r"FP8_RECIPES_PROFILE=out/a\ b.json" in printed and "scripts/profile_megatron.py" in printed and "-m fp8_recipes.pretrain_gpt" not in printed
