"""Scripts in processes that have imported TransformerEngine and Megatron already: forks of a server that did it once. A fresh process takes ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = ["torch", "transformer_engine.pytorch", "megatron.training"]  # torch first: it loads libraries for the second


def _work(script: str, arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    with open(output, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    places = [str(Path(script).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:0] = [place for place in places if place and place not in sys.path]
    runpy.run_path(script, run_name="__main__")


def run(script: str | Path, arguments: Sequence[str], environment: Mapping[str, str], ranks: int = 1, timeout: float = 600) -> list[str]:
    """What ``ranks`` processes of ``python script arguments`` print, each with its RANK; all of them must end with 0."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}" for rank in range(ranks)]
        processes = [
            context.Process(target=_work, args=(str(script), list(arguments), {**environment, "RANK": str(rank)}, str(outputs[rank]))) for rank in range(ranks)
        ]  # fmt: skip
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        printed = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
    assert not late, f"{len(late)} of {ranks} processes were not done after {timeout:.0f} s:\n" + "\n".join(text[-4000:] for text in printed)
    assert not any(process.exitcode for process in processes), "\n".join(text[-4000:] for text in printed)
    return printed
