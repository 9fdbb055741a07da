"""Make the CSV files behind docs/benchmarks.md again: every part is one command, a table or two.

    python3 scripts/measure.py --list
    python3 scripts/measure.py PART ... [--out DIR] [--work DIR] [--limit SECONDS] [--dirty] [--commit HASH] [--dry-run]

A part runs in the root of the repository with WORK/PART for OUT; what it prints goes to WORK/PART/log. If it ends well, its tables go to DIR, with
PART.provenance.json beside them: commit, GPU, driver, versions, command. Then scripts/make_tables.py puts them into the documents. Parts run one after
another; on several GPUs start this once per GPU, each time with its own CUDA_VISIBLE_DEVICES and MASTER_PORT. Refuses a tree that no commit names.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import gpu_machine
from gpu_machine import ROOT

Rows = list[dict[str, str]]
Change = Callable[[Rows], Rows]
RESULTS = ROOT / "docs" / "benchmarks"
FUSED_LOSS = "--cross-entropy-loss-fusion"
NO_WAITS = "--no-check-for-nan-in-loss-and-grad --rerun-mode disabled"
"""Without it the host waits for the loss of every microbatch, and the GPU then for the host: for every recipe's speed."""
FUSED_ROUTER = "--moe-router-fusion"
FAST_EXPERTS = "CUDA_DEVICE_MAX_CONNECTIONS=32 NVTE_USE_CUTLASS_GROUPED_GEMM=1"
"""What makes stock bf16 experts fastest: more hardware queues, and TransformerEngine's grouped product in one launch where it has one (fprop and dgrad)."""
WATCHED = "--fp8-metrics-log /dev/null --fp8-metrics-interval"
WORDS = "VOCAB=32000 TEXT_MB=450"
"""Of a loss run: a vocabulary of real size, for the head."""
BLOCKS = 'STEPS=765 EXTRA="--micro-batch-size 32"'
"""Of a loss run on bytes."""


def in_order(rows: Rows) -> Rows:
    """Megatron's runs in the order in which they ran; later rounds (moss.2) under the recipe's own name."""
    first: dict[str, None] = {}
    for row in rows:
        name, _, number = row["recipe"].rpartition(".")
        row["recipe"] = name if name in first and number.isdigit() else row["recipe"]
        first[row["recipe"]] = None
    return [{"order": str(number), **row} for number, row in enumerate(rows, 1)]


def by_model(rows: Rows) -> Rows:
    """`in_order` of runs of several models: MODEL+RECIPE in two columns."""
    rows = in_order(rows)
    return [{"order": row["order"], "model": row["recipe"].partition("+")[0], **row, "recipe": row["recipe"].partition("+")[2]} for row in rows]


def columns_of(rows: Rows, columns: dict[str, str], keys: tuple[str, ...]) -> Rows:
    """Contenders of one product and shape as columns, TFLOP/s: ``columns`` names them, ``keys`` are kept."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        one = {"product": row["kind"], **{key: row[key] for key in keys}, **dict.fromkeys(columns.values(), "")}
        one = found.setdefault((row["kind"], row["shape"]), one)
        if row["contender"] in columns:
            one[columns[row["contender"]]] = f"{float(row['tflops']):.0f}"
    return list(found.values())


def side_by_side(rows: Rows) -> Rows:
    """bench_gemm.py's contenders; shares of cuBLAS per-tensor with the same accumulation."""
    columns = {
        "bf16": "bf16", "cublas fast": "cublas_fast", "cublas split": "cublas_split", "transformer_engine": "te_accumulating",
        "ours fast": "ours_fast", "ours split": "ours_split",
    }  # fmt: skip
    table = columns_of(rows, columns, ("shape",))
    for one in table:
        for way in ("fast", "split"):
            one[f"{way}_vs_cublas"] = f"{100 * float(one[f'ours_{way}']) / float(one[f'cublas_{way}']):.0f}%"
    return table


def grouped_side_by_side(rows: Rows) -> Rows:
    """bench_grouped.py's contenders; ours over torch's fast accumulator. adding: into fp32 main_grads, which torch cannot.
    one_scale: for the weights of an expert, where torch wants one per feature."""
    columns = {
        "bf16": "bf16", "torch fast": "torch_fast", "torch split": "torch_split", "ours fast": "ours_fast", "ours 1024": "ours_1024",
        "ours fast, one scale": "ours_one_scale", "ours fast, +fp32 in reverse": "ours_adding", "ours 2048, +fp32 in reverse": "ours_adding_2048",
    }  # fmt: skip
    table = columns_of(rows, columns, ("shape", "experts", "rows", "K", "N"))
    for one in table:
        for way in ("fast", "1024"):
            one[f"{way}_vs_torch"] = f"{float(one[f'ours_{way}']) / float(one['torch_fast']):.2f}x"
    return table


def at_defaults(rows: Rows) -> Rows:
    """bench_kernels.py's kernels and peers at their default settings; copies and host times are left out."""
    kept = [row for row in rows if row["shape"] != "host" and not row["op"].startswith("copy")]
    return [
        {"operation": row["op"], "rows_x_cols": row["shape"], "setting": "default", "us": f"{float(row['us']):.1f}",
         "percent_of_copy": f"{100 * float(row['of_copy']):.0f}" if row["of_copy"] else ""}
        for row in kept
    ]  # fmt: skip


@dataclass(frozen=True)
class Table:
    """source: file under OUT; target: its name in docs/benchmarks; change: what its rows become, None for a copy as it is."""

    source: str
    target: str
    change: Change | None = None


@dataclass(frozen=True)
class Part:
    name: str
    minutes: int
    command: str
    tables: list[Table]
    gpus: int = 1


def speed(name: str, minutes: int, environment: str, recipes: str, target: str, change: Change = in_order) -> Part:
    return Part(name, minutes, f"{environment} scripts/bench_megatron.sh OUT {recipes}", [Table("speed.csv", target, change)])


def script(name: str, minutes: int, command: str, *tables: str | Table, gpus: int = 1) -> Part:
    return Part(name, minutes, f"python3 {command}", [t if isinstance(t, Table) else Table(t, t) for t in tables], gpus)


def loss(name: str, minutes: int, environment: str, recipes: str, target: str) -> Part:
    tables = [Table(f"loss{end}", f"{target}{end}") for end in (".csv", "_summary.csv", ".png")]
    return Part(name, minutes, f"{environment} scripts/loss_megatron.sh OUT {recipes}", tables)


PARTS = [
    speed("dense", 5, f'EXTRA="{FUSED_LOSS} {NO_WAITS}"', "bf16 delayed moss tensorwise blockwise delayed moss",
          "megatron_dense_8l_7b.csv"),
    # Stock FP8 recipes are fastest with the padded routing map that the model gives them; the fused router beside it dies in backward (docs/megatron.md).
    speed("moe", 7, f'MODEL=moe_6l_v2lite EXTRA="--moe-router-force-load-balancing {FUSED_LOSS} {NO_WAITS}"',
          f'"{FAST_EXPERTS} bf16 {FUSED_ROUTER}" "fp8_flow_moe {FUSED_ROUTER}" "CUDA_DEVICE_MAX_CONNECTIONS=32 bf16 {FUSED_ROUTER}" blockwise tensorwise '
          f'"fp8_flow_moe {FUSED_ROUTER}" "{FAST_EXPERTS} bf16 {FUSED_ROUTER}"', "megatron_moe_6l_v2lite.csv"),
    # 22 of an 8B's 32 layers: as many as fit beside Adam's states in every one of these, with room for the allocator. The logs say which attention ran.
    speed("fog-speed", 7, f'STEPS=8 NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1 EXTRA="--num-layers 22 {FUSED_LOSS} {NO_WAITS}"',
          "llama3_8l_8b+bf16 fog_8l_8b+fog llama3_8l_8b+delayed fog_8l_8b+moss:attention=fp8,weight_cache=row fog_max_8l_8b+fog "
          "llama3_8l_8b+tensorwise fog_8l_8b+moss:attention=fp8,weight_cache=row llama3_8l_8b+delayed",
          "megatron_fog_8b.csv", by_model),
    # Iterations 14 to 43: three whole intervals of 10, after the first observed one has compiled its kernels.
    speed("metrics-cost", 5, f'STEPS=43 WARMUP=13 PERIOD=10 EXTRA="{FUSED_LOSS} {NO_WAITS}"', f'moss "moss {WATCHED} 10" moss "moss {WATCHED} 10"',
          "megatron_metrics_cost.csv"),
    script("moe-layer", 3, "scripts/bench_moe.py --csv OUT", "moe_bench.csv"),
    script("moe-ablation", 2, 'scripts/bench_moe.py --ablation --shapes V2-Lite "V3, 8 local experts" --csv OUT', "moe_ablation.csv"),
    script("experts", 2, "scripts/bench_experts.py --csv OUT", "experts_bench.csv"),
    script("permute", 1, "scripts/bench_permute.py --csv OUT", "permute_bench.csv"),
    script("grouped", 3, "scripts/bench_grouped.py --check --bench --transpose --csv OUT", "grouped_bench.csv", "grouped_transpose.csv",
           Table("grouped_bench.csv", "grouped.csv", grouped_side_by_side)),
    script("dispatch", 1, "-m torch.distributed.run --nproc-per-node 2 scripts/bench_dispatch.py --csv OUT", "dispatch_bench.csv", gpus=2),
    script("te", 2, "scripts/bench_te.py --rounds 9 --csv OUT/te_modules.csv", "te_modules.csv"),
    script("kernels", 3, "scripts/bench_kernels.py --check --bench --csv OUT", Table("kernels_bench.csv", "kernels.csv", at_defaults)),
    script("gemm", 2, "scripts/bench_gemm.py --error --bench --csv OUT", "gemm_error.csv", "gemm_bench.csv", Table("gemm_bench.csv", "gemm.csv", side_by_side)),
    script("fog-parts", 3, "scripts/bench_fog.py --csv OUT", "fog_bench.csv"),
    script("metrics", 2, "scripts/bench_metrics.py --csv OUT", "metrics_bench.csv"),
    loss("loss-dense", 12, f'START=300 {WORDS} EXTRA="--micro-batch-size 32 {FUSED_LOSS}"', "bf16 moss tensorwise", "loss_gpt_104m_words"),
    loss("loss-moe", 12, f'STEPS=765 START=300 {WORDS} MODEL=moe_300m {FAST_EXPERTS} EXTRA="--micro-batch-size 64 {FUSED_LOSS} {FUSED_ROUTER}"',
         "bf16 fp8_flow_moe", "loss_moe_300m_words"),
    # Bytes: the head of these stays in bf16, so that nothing but blocks is judged, and nearly all of the time is theirs. 765 steps are 100.3 M tokens.
    loss("loss-fog-flash", 9, f"{BLOCKS} START=300 MODEL=fog_150m", "bf16 fog", "loss_fog_150m_common_start"),
    loss("loss-fog-max", 9, f"{BLOCKS} START=300 MODEL=fog_max_150m", "bf16 fog", "loss_fog_max_150m_common_start"),
    # Constant rates, each four thirds to one and a half times the last: too low a rate does no harm in the time, at too high a one the loss turns before
    # kurtosis can be judged. Small batches, for many steps; short sequences, for many documents in each.
    Part("divergence", 4, 'PARALLEL=8 CUDA_VISIBLE_DEVICES=0 STEPS=1200 TEXT_MB=40 EXTRA="--seq-length 512 --max-position-embeddings 512 '
         '--micro-batch-size 8 --global-batch-size 8 --lr-decay-style constant --lr-warmup-fraction 0.08" '
         "scripts/divergence_megatron.sh OUT llama3_150m+fog@9e-4 llama3_150m+fog@1.2e-3 llama3_150m+fog@1.6e-3 llama3_150m+fog@2.2e-3 "
         "llama3_150m+fog@3.2e-3 llama3_150m+bf16@1.6e-3 fog_150m+fog@1.6e-3 fog_150m+fog@3.2e-3",
         [Table("which_first.csv", "divergence.csv"), Table("readings.csv", "divergence_readings.csv"),
          Table("kurtosis.png", "divergence_kurtosis.png"), Table("loss.png", "divergence_loss.png")]),
    loss("loss-llama3", 6, f"{BLOCKS} MODEL=llama3_150m", "bf16", "loss_llama3_150m"),
]  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}


def command_line(command: str, out: Path) -> str:
    """For bash: this interpreter, OUT replaced."""
    command = re.sub(r"^python3 ", lambda _: f"{shlex.quote(sys.executable)} ", command)
    return re.sub(r"\bOUT\b", lambda _: shlex.quote(str(out)), command)


def run_part(part: Part, work: Path, until: float) -> str | None:
    """None if it ended with 0, else what went wrong."""
    if time.monotonic() >= until:
        return "not started, no time was left"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHON": sys.executable, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    process = gpu_machine.start(["bash", "-c", command_line(part.command, work)], work / "log", environment)
    try:
        status = process.wait(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "cut off by the time limit"
    finally:
        gpu_machine.end([process])
    return f"ended with status {status}" if status else None


def keep(part: Part, work: Path, out: Path) -> list[str]:
    """The part's tables and pictures into ``out``; their names."""
    out.mkdir(parents=True, exist_ok=True)
    for table in part.tables:
        if table.change is None:
            shutil.copyfile(work / table.source, out / table.target)
            continue
        with open(work / table.source, newline="") as stream:
            rows = table.change(list(csv.DictReader(stream)))
        with open(out / table.target, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return [table.target for table in part.tables]


def provenance(part: Part, code: gpu_machine.Code, gpus: list[gpu_machine.Gpu], seconds: float, files: list[str]) -> dict[str, object]:
    return {
        "part": part.name,
        "command": part.command,
        "files": files,
        "commit": code.commit,
        "changes": code.changes,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds),
        "gpus": [gpu.name for gpu in gpus],
        "driver": gpus[0].driver,
        "cores": len(os.sched_getaffinity(0)),
        "versions": gpu_machine.versions(),
    }


def listing(parts: list[Part]) -> str:
    lines = ["| part | minutes | GPUs | command |", "| --- | --- | --- | --- |"]
    lines += [f"| {p.name} | {p.minutes} | {p.gpus} | `{p.command}` |" for p in parts]
    return "\n".join(lines)


def refusal(args: argparse.Namespace, parts: list[Part], gpus: list[gpu_machine.Gpu], code: gpu_machine.Code) -> str | None:
    """Why this machine or tree cannot give figures, None if it can."""
    if not gpus:
        return "no NVIDIA GPU here (nvidia-smi lists none that CUDA_VISIBLE_DEVICES shows)"
    short = [p.name for p in parts if p.gpus > len(gpus)]
    if short:
        return f"{', '.join(short)} needs {max(p.gpus for p in parts)} GPUs, {len(gpus)} found"
    if code.changes and not args.dirty:
        return f"the tree differs from its commit ({', '.join(code.changes[:5])}): commit first, or --dirty, which the provenance will say"
    if code.commit == "unknown":
        return "this is no git checkout: name its commit with --commit HASH"
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="measure.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(BY_NAME))
    parser.add_argument("--list", action="store_true", help="print every part with its command, about how many minutes it takes, and its GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables (default docs/benchmarks)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "measure", help="folder of logs and everything else (default runs/measure)")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which what runs is ended (default 7200)")
    parser.add_argument("--dirty", action="store_true", help="measure a tree that differs from its commit")
    parser.add_argument("--commit", metavar="HASH", help="of a copy that has no git folder")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in BY_NAME]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(BY_NAME)}")
    if not args.parts and not args.list:
        parser.error("name a part, or --list")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    parts = [BY_NAME[name] for name in args.parts] or PARTS
    if args.list:
        print(listing(parts))
        return 0
    if args.dry_run:
        print("\n".join(command_line(part.command, args.work / part.name) for part in parts))
        return 0
    gpus, code = gpu_machine.gpus(), gpu_machine.code(args.commit, apart_from=[args.out])
    reason = refusal(args, parts, gpus, code)
    if reason:
        print(f"measure.py: {reason}", file=sys.stderr)
        return 2
    until, failed = time.monotonic() + args.limit, []
    for part in parts:
        began, work = time.monotonic(), (args.work / part.name).resolve()
        print(f"start {part.name} (about {part.minutes} minutes), log in {work / 'log'}", flush=True)
        wrong, files = run_part(part, work, until), list[str]()
        seconds = time.monotonic() - began
        try:
            files = [] if wrong else keep(part, work, args.out)
        except (OSError, LookupError, ValueError) as error:
            wrong = f"its output gives no table ({error!r})"
        if wrong:
            failed.append(part.name)
            tail = (work / "log").read_text(errors="replace").splitlines()[-25:] if (work / "log").exists() else []
            print("\n".join([*(f"    {line[:200]}" for line in tail), f"FAIL {part.name}, {seconds:.0f} s: {wrong}"]), flush=True)
            continue
        (args.out / f"{part.name}.provenance.json").write_text(json.dumps(provenance(part, code, gpus, seconds, files), indent=1) + "\n")
        print(f"done {part.name}, {seconds:.0f} s: {', '.join(files)} in {args.out}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
