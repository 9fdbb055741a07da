"""Every test marked gpu or multi_gpu on the GPUs of this machine, as pytest processes side by side; the cheap ones first.

    scripts/test_gpu.sh [GROUP ...] [--out DIR] [--limit SECONDS] [-k EXPRESSION] [--commit HASH] [--dry-run [--gpus N]]

GROUP: names or patterns of the plan that --dry-run prints ("dense*"); all of them by default. One log per group, summary.csv and summary.md go to DIR.
When the limit is over, what runs is ended and reported as cut off, what waits as not started. Exits with 0 only if every group passed.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path

import gpu_machine
from gpu_machine import ROOT

CORES_PER_GPU = 16
PROCESSES_PER_GPU = 16
"""With 16 cores a GPU; fewer where there are fewer cores. A training keeps one core busy and a few GB of the GPU."""
FIRST_PORT = 29600
COLUMNS = ("group", "result", "command", "commit", "date", "closing_line", "seconds")


@dataclass(frozen=True)
class Group:
    """Tests of one pytest process. words: a -k expression. seconds: about how long it takes beside others."""

    name: str
    mark: str
    paths: tuple[str, ...]
    seconds: int
    words: str = ""

    def arguments(self, words: str = "") -> list[str]:
        """For pytest; ``words`` narrows the group further."""
        expression = f"({self.words}) and ({words})" if self.words and words else self.words or words
        return ["-m", self.mark, *self.paths, *(["-k", expression] if expression else [])]

    @property
    def gpus(self) -> int:
        return 2 if self.mark == "multi_gpu" else 1


RESUME = 250
"""Seconds of a resume test: four trainings with checkpoints."""


def trainings(count: int) -> int:
    """Seconds of a process that trains so often: 48 each, most of it starting torchrun (40 to 56 beside others), and 20 to collect and to make the text."""
    return 20 + 48 * count


def split(path: str, mark: str, *parts: tuple[str, int, str]) -> list[Group]:
    """Groups of one file or folder from (name, seconds, -k expression); the last part takes what the others leave, so that no test is forgotten."""
    *chosen, (name, seconds, _) = parts
    rest = "not (" + " or ".join(words for _, _, words in chosen) + ")"
    return [*(Group(n, mark, (path,), s, words) for n, s, words in chosen), Group(name, mark, (path,), seconds, rest)]


TRAINING = tuple(f"tests/megatron/test_{kind}training.py" for kind in ("", "moe_", "fog_", "fog_moe_", "head_", "mlp_"))
DENSE, MOE, FOG, FOG_MOE, HEAD, MLP = TRAINING
APART = tuple(f"--ignore={path}" for path in TRAINING)
SHORT = [
    *split(  # most of their time compiles kernels, one variant after another
        "tests/kernels", "gpu",
        ("kernels-gelu", 170, "gelu.py and not micro"),
        ("kernels-gelu-micro", 170, "gelu.py and micro"),
        ("kernels-xielu", 170, "xielu.py and not micro"),
        ("kernels-xielu-micro", 170, "xielu.py and micro"),
        ("kernels-swiglu", 130, "swiglu.py and not saved"),
        ("kernels-products", 180, "saved or gemm.py or tanh.py"),
        ("kernels-quantize", 110, "quantize.py"),
        ("kernels-large", 110, "test_large"),
        ("kernels", 170, ""),
    ),
    Group("te", "gpu", ("tests/te",), 45),
    Group("nn", "gpu", ("tests/nn",), 80),
    Group("other", "gpu", ("tests", *APART, *(f"--ignore=tests/{folder}" for folder in ("kernels", "te", "nn"))), 45),
    Group("ranks", "multi_gpu", ("tests", *APART), 75),
]  # fmt: skip
LONG = [
    *split(
        DENSE, "gpu",
        ("dense-recipes", trainings(4), "recipe_learns and not (moss_exact or tile or tensorwise)"),
        ("dense-checks", trainings(4), "recipe_learns and (moss_exact or tile or tensorwise)"),
        ("dense-options", trainings(5), "first_last or recompute or no_fusion or precision_file"),
        ("dense-optimizer", trainings(4), "clip_often or short_interval"),
        ("dense-resume", RESUME, ""),
    ),
    Group("dense-kept-weights", "gpu", (MLP,), trainings(5)),
    *split(
        MOE, "gpu",
        ("moe-recipes", trainings(4), "recipe_learns or scales_of"),
        ("moe-options", trainings(4), "option_learns and not sigmoid or router_losses"),
        ("moe-recompute", trainings(6), "sigmoid or recompute_changes"),
        ("moe-resume", RESUME, ""),
    ),
    *split(
        FOG, "gpu",
        ("fog-flash", trainings(5), "flash] or is_run_and"),
        ("fog-opt", trainings(5), "opt]"),
        ("fog-max", trainings(5), "max]"),
        ("fog-options", trainings(6), "option_changes"),
        ("fog-resume", RESUME, "resume and moss and not attention"),
        ("fog-resume-attention", RESUME, "resume and attention"),
        ("fog-resume-delayed", RESUME, "resume and not moss"),
        ("fog-baselines", trainings(4), ""),
    ),
    *split(
        FOG_MOE, "gpu",
        ("fog-moe-recipes", trainings(7), "recipe_learns"),
        ("fog-moe-max", trainings(5), "max_learns"),
        ("fog-moe-max-resume", RESUME, "resume and max"),
        ("fog-moe-resume", RESUME + trainings(2), ""),
    ),
    *split(HEAD, "gpu", ("head-recipes", trainings(5), "recipe_learns or is_run"), ("head-options", trainings(6), "")),
    *split(
        DENSE, "multi_gpu",
        ("dense-2-tp", trainings(4), "tensor-model"), ("dense-2-resume", RESUME, "resume"), ("dense-2-pp-dp", trainings(4), ""),
    ),
    *split(
        MOE, "multi_gpu",
        ("moe-2-ep", trainings(3), "[experts"),
        ("moe-2-tp", trainings(4), "[tensor"),
        ("moe-2-shared-pp", trainings(4), "[shared or [pipeline"),
        ("moe-2-rounding", trainings(2), "rounding"),
        ("moe-2-resume", RESUME, ""),
    ),
    *split(
        FOG, "multi_gpu",
        ("fog-2-tp", trainings(3), "tensor-model and not sequence"),
        ("fog-2-sp", trainings(3), "sequence"),
        ("fog-2-pp", trainings(3), "pipeline"),
        ("fog-2-dp", trainings(3), ""),
    ),
    *split(FOG_MOE, "multi_gpu", ("fog-2-moe-max", trainings(4), "max"), ("fog-2-moe", trainings(4), "")),
    Group("head-2", "multi_gpu", (HEAD,), trainings(3)),
]  # fmt: skip
LONG.sort(key=lambda group: -group.seconds * group.gpus)  # what takes most first, so that none is left over at the end
GROUPS = [*SHORT, *LONG]


@dataclass
class Slots:
    """How many processes each GPU has; a group of several GPUs counts on each that it works on."""

    load: dict[str, int]
    per_gpu: int

    def take(self, count: int) -> list[str] | None:
        """The ``count`` GPUs with least to do, None while they are full."""
        chosen = sorted(self.load, key=self.load.__getitem__)[:count]
        if any(self.load[gpu] >= self.per_gpu for gpu in chosen):
            return None
        for gpu in chosen:
            self.load[gpu] += 1
        return chosen

    def give_back(self, taken: list[str]) -> None:
        for gpu in taken:
            self.load[gpu] -= 1

    def visible(self, taken: list[str]) -> str:
        """CUDA_VISIBLE_DEVICES: a group of one GPU sees that one, others all, theirs first."""
        return ",".join(taken if len(taken) == 1 else [*taken, *(gpu for gpu in self.load if gpu not in taken)])


def slots(indices: list[str], cores: int) -> Slots:
    """Room for as many processes as ``cores`` of this machine bear."""
    cores = min(cores // len(indices), CORES_PER_GPU)
    return Slots(dict.fromkeys(indices, 0), max(1, PROCESSES_PER_GPU * cores // CORES_PER_GPU))


@dataclass
class Running:
    group: Group
    taken: list[str]
    process: subprocess.Popen[bytes]
    began: float


@dataclass
class Run:
    """One call of this program: where things go, which tests, what has come out."""

    out: Path
    words: str
    commit: str
    scratch: Path
    rows: list[dict[str, str]] = field(default_factory=list)

    def log(self, group: Group) -> Path:
        return self.out / f"{group.name}.log"

    def start(self, group: Group, taken: list[str], visible: str) -> Running:
        options = ["-v", "--tb=short", "--durations=10", "-p", "no:cacheprovider", "--basetemp", str(self.scratch / group.name)]
        port = FIRST_PORT + 10 * [g.name for g in GROUPS].index(group.name)
        environment = {"CUDA_VISIBLE_DEVICES": visible, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
        environment["FP8_RECIPES_TEST_RUNS"] = str(self.scratch)
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or every training keeps a pool of processes for torch.compile beside the others' cores
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [os.environ.get("PYTHON", sys.executable), "-m", "pytest", *group.arguments(self.words), *options]
        print(f"start    {group.name} on GPU {', '.join(taken)}", flush=True)
        return Running(group, taken, gpu_machine.start(command, self.log(group), environment), time.monotonic())

    def record(self, group: Group, result: str, closing: str, seconds: float) -> None:
        command = "pytest " + shlex.join(group.arguments(self.words))
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        self.rows.append(dict(zip(COLUMNS, (group.name, result, command, self.commit, date, closing, f"{seconds:.0f}"), strict=True)))
        self.write()
        print(f"{result:8s} {group.name}, {seconds:.0f} s: {closing}", flush=True)
        if result == "failed":
            log = self.log(group).read_text(errors="replace")
            lines = [line[:200] for line in log.splitlines() if re.match(r"FAILED|ERROR|E  ", line)] or re.findall(r"^SKIPPED.{,200}", log, re.MULTILINE)
            print("\n".join(f"    {line}" for line in lines[-12:]), flush=True)

    def finished(self, one: Running) -> None:
        result, closing = outcome(self.log(one.group).read_text(errors="replace"), one.process.returncode, bool(self.words))
        self.record(one.group, result, closing, time.monotonic() - one.began)

    def write(self) -> None:
        with open(self.out / "summary.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        shown = ("command", "commit", "date", "closing_line", "seconds")
        lines = ["| " + " | ".join(shown).replace("_", " ") + " |", "|" + " --- |" * len(shown)]
        lines += ["| " + " | ".join((f"`{row[c]}`" if c == "command" else row[c]).replace("|", "\\|") for c in shown) + " |" for row in self.rows]
        (self.out / "summary.md").write_text("\n".join(lines) + "\n")


def outcome(log: str, status: int, narrowed: bool) -> tuple[str, str]:
    """(result, closing line) of a pytest process that ended by itself. Nothing but skipped tests is no pass, nor an empty group unless -k emptied it."""
    closing = re.findall(r"^=+ (.+) in [0-9.]+s.*=+$", log, flags=re.MULTILINE)
    if not closing:
        return "failed", f"ended with status {status} and no closing line"
    if status == 5 and narrowed:
        return "nothing", closing[-1]
    return ("passed" if status == 0 and re.search(r"\b\d+ passed", closing[-1]) else "failed"), closing[-1]


def so_far(log: str) -> str:
    """What a process that was ended had done."""
    verdicts = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]", log)
    done = ", ".join(f"{verdicts.count(v)} {v.lower()}" for v in dict.fromkeys(verdicts)) or "nothing"
    return f"cut off by time after {done}"


def work(run: Run, groups: list[Group], free: Slots, limit: float) -> None:
    """Start groups in their order as GPUs have room, until all are done or ``limit`` seconds are over."""
    began, waiting, running = time.monotonic(), list(groups), list[Running]()
    try:
        while (waiting or running) and time.monotonic() - began < limit:
            for group in list(waiting):
                taken = free.take(group.gpus)
                if taken is not None:
                    waiting.remove(group)
                    running.append(run.start(group, taken, free.visible(taken)))
            time.sleep(0.2)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                free.give_back(one.taken)
                run.finished(one)
    finally:
        gpu_machine.end(one.process for one in running)
        for one in running:
            run.record(one.group, "cut off", so_far(run.log(one.group).read_text(errors="replace")), time.monotonic() - one.began)
        for group in waiting:
            run.record(group, "not run", "not started: no time was left", 0)


def plan(groups: list[Group], free: Slots, words: str) -> str:
    """The schedule that the expected seconds give, as a Markdown table, and its length."""
    lines = ["| start s | seconds | group | GPUs | command |", "| --- | --- | --- | --- | --- |"]
    now, waiting, running = 0, list(groups), list[tuple[int, list[str]]]()
    while waiting or running:
        for group in list(waiting):
            taken = free.take(group.gpus)
            if taken is not None:
                waiting.remove(group)
                running.append((now + group.seconds, taken))
                command = "pytest " + shlex.join(group.arguments(words))
                lines.append(f"| {now} | {group.seconds} | {group.name} | {' '.join(taken)} | `{command}` |")
        now = min(end for end, _ in running)
        for one in [r for r in running if r[0] == now]:
            running.remove(one)
            free.give_back(one[1])
    return "\n".join([*lines, f"about {now} s, up to {free.per_gpu} processes a GPU"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="names or patterns; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/test_gpu"), help="folder of logs and summary (default runs/test_gpu)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which everything is ended (default 3600)")
    parser.add_argument("-k", dest="words", default="", metavar="EXPRESSION", help="narrow every group further, as pytest -k")
    parser.add_argument("--commit", help="of a copy that has no git folder, for the summary")
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    parser.add_argument("--gpus", type=int, help="plan for so many GPUs instead of this machine's; with --dry-run")
    args = parser.parse_args(argv)
    if args.gpus is not None and (not args.dry_run or args.gpus < 1):
        parser.error(f"--gpus {args.gpus}: at least 1, and with --dry-run only; CUDA_VISIBLE_DEVICES chooses the GPUs of a run")
    unknown = [name for name in args.groups if not any(fnmatch(g.name, name) for g in GROUPS)]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; known: {', '.join(g.name for g in GROUPS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    indices = [str(n) for n in range(args.gpus)] if args.gpus else [gpu.index for gpu in gpu_machine.gpus()]
    if not indices:
        print("test_gpu.sh: no NVIDIA GPU here (nvidia-smi lists none that CUDA_VISIBLE_DEVICES shows); bash scripts/test.sh needs none", file=sys.stderr)
        return 2
    groups = [g for g in GROUPS if not args.groups or any(fnmatch(g.name, name) for name in args.groups)]
    left_out = [g.name for g in groups if g.gpus > len(indices)]
    groups = [g for g in groups if g.name not in left_out]
    if left_out:
        print(f"test_gpu.sh: one GPU, so the tests marked multi_gpu are left out: {', '.join(left_out)}", flush=True)
    if not groups:
        print("test_gpu.sh: nothing is left to run", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0))
    if args.dry_run:
        print(plan(groups, slots(indices, CORES_PER_GPU * args.gpus if args.gpus else cores), args.words))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its children are ended and the summary tells what was done
    now = gpu_machine.code(args.commit)
    commit = now.commit + (" and changes" if now.changes else "")
    with tempfile.TemporaryDirectory(prefix="test_gpu_", ignore_cleanup_errors=True) as scratch:
        run = Run(args.out, args.words, commit, Path(scratch))
        work(run, groups, slots(indices, cores), args.limit)
    print((args.out / "summary.md").read_text(), end="")
    bad = [row["group"] for row in run.rows if row["result"] not in ("passed", "nothing")]
    bad += [] if any(row["result"] == "passed" for row in run.rows) else ["no test was run"]
    print(f"test_gpu.sh: {'not passed: ' + ', '.join(bad) if bad else 'all passed'}; logs in {args.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
