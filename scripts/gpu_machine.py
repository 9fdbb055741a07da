"""Shared by gpu_tests.py and measure.py: the GPUs and the code of this machine, and child processes that end in time."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 20.0
"""Seconds between the request to end and the end by force: torchrun ends its workers first, which stand in sessions of their own."""


@dataclass(frozen=True)
class Gpu:
    index: str
    name: str
    driver: str


@dataclass(frozen=True)
class Code:
    """commit: "unknown" outside a git checkout, unless it was told. changes: tracked or new files that differ from it; None where git cannot say."""

    commit: str
    changes: tuple[str, ...] | None


def gpus() -> list[Gpu]:
    """GPUs that nvidia-smi lists, less those that CUDA_VISIBLE_DEVICES hides."""
    query = ["nvidia-smi", "--query-gpu=index,name,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    found = [Gpu(*(field.strip() for field in line.split(","))) for line in listing.splitlines() if line.count(",") == 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    by_index = {gpu.index: gpu for gpu in found}
    return [by_index[index] for index in (i.strip() for i in visible.split(",")) if index in by_index]


def code(told: str | None = None, apart_from: Sequence[Path] = ()) -> Code:
    """Commit of this tree and what differs from it, files under ``apart_from`` left out. ``told`` serves a copy without git's folder."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != ROOT:
            return Code(told or "unknown", None)
        outside = [f":(exclude){p.resolve().relative_to(ROOT)}" for p in apart_from if p.resolve().is_relative_to(ROOT)]
        changed = git("status", "--porcelain", "--", ".", *outside).splitlines()
        return Code(git("rev-parse", "--short=9", "HEAD").strip(), tuple(line[3:] for line in changed))
    except (OSError, subprocess.CalledProcessError):
        return Code(told or "unknown", None)


def versions() -> dict[str, str]:
    """Python and the packages that decide a figure."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformer-engine", "megatron-core", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The command in the root of the repository, in a process group of its own, with everything that it prints in ``log``."""
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def end(processes: Iterable[subprocess.Popen[bytes]], grace: float = GRACE) -> None:
    """Ask every process group to end, wait, and end by force what is left."""
    processes = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + grace
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.1)
