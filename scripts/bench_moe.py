"""The FP8 mixture-of-experts layer, forward and backward, beside stock bf16 and FP8 on one GPU: checked first, then timed, interleaved in one process.

    python scripts/bench_moe.py [--check] [--shapes NAME ...] [--recipes SPEC ...] [--ablation] [--profile SHAPE CONTENDER] [--csv DIR] [--rounds N]

Contenders: our recipes (Local dispatch); "torch bf16": permute by sort, torch._grouped_mm, compiled SwiGLU; with TransformerEngine installed, Megatron's
stock path, "te bf16", "te bf16 cutlass" (fprop and dgrad in one launch of TransformerEngine's CUTLASS product) and "te blockwise": fused permute,
GroupedLinear accumulating into FP32 main_grad, compiled SwiGLU, FP8 weights kept over the
microbatches of a step. All see the same tokens, routing and weights. A time is that of one microbatch out of four back to back, with whatever the host
costs; memory is the peak of one forward and backward above what the layer holds at rest (for torch its bf16 weight gradients count, for the others
main_grad is there before).

--ablation puts stand-alone steps back into our layer, one at a time: what each costs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moe_contenders import MICROBATCHES, SHAPES, Contender, Ours, Problem, TorchBf16, TransformerEngine

from fp8_recipes import ops
from fp8_recipes.formats import E4M3, from_e8m0
from fp8_recipes.reference.grouped import SMALLEST_SCALE, GroupedTensor
from fp8_recipes.tensor import TILE, ScaledTensor

FLOORS = {"y": 22.1, "dx": 21.5, "dprob": 20.9, "dw1": 21.5, "dw2": 20.9}
"""dB against bf16 for our layer: what the E4M3 roundings of each chain add up to (tests/moe_cases.py), less 1.5."""
HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
Rows = list[dict[str, object]]

# --- ablation: stand-alone steps put back into our layer ----------------------------------------------------------------------------------------


class UnfusedPermute(Ours):
    """Permute, then pad, each tensor by itself; unpad, then add up. The order of the copies is given, so only the moves are counted."""

    def make(self) -> None:
        super().make()
        row_map = ops.route_map(self.problem.index, self.problem.experts)
        self.rows, order = row_map.destination.flatten().long().sort()
        self.token, self.order = order // self.problem.k, order
        self.patches = {"gather_rows": self.gather, "combine_rows": self.combine}

    def moved(self, t: torch.Tensor, fill: float, row_map: ops.RowMap, index: torch.Tensor) -> torch.Tensor:
        permuted = t.index_select(0, index)
        return torch.full((row_map.rows, *t.shape[1:]), fill, dtype=t.dtype, device=t.device).index_copy_(0, self.rows, permuted)

    def gather(self, x: ScaledTensor, row_map: ops.RowMap, prob: torch.Tensor | None = None) -> tuple[ScaledTensor, torch.Tensor | None]:
        assert x.tile_exponent is not None
        payload = self.moved(x.payload.view(torch.uint8), 0, row_map, self.token).view(x.payload.dtype)
        scale, tiles = self.moved(x.scale, SMALLEST_SCALE, row_map, self.token), self.moved(x.tile_exponent, 1, row_map, self.token)
        row_prob = None if prob is None else self.moved(prob.flatten(), 0, row_map, self.order)
        return ScaledTensor(payload, scale, "row", tile_exponent=tiles), row_prob

    def combine(self, y: torch.Tensor, row_map: ops.RowMap, weight: torch.Tensor | None = None) -> torch.Tensor:
        unpadded = y.index_select(0, self.rows)
        return torch.zeros(row_map.tokens, y.shape[1], dtype=y.dtype, device=y.device).index_add_(0, self.token, unpadded)


@torch.compile
def _dequantize_transposed(payload: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One pass: torch's own transpose of bytes or halves, a pass by itself, would make this look worse than it has to be."""
    return (payload.float() * scale[:, None]).bfloat16().t().contiguous()


@torch.compile
def _requantize(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x: [cols, rows], inverse: [cols, rows / 128]."""
    scaled = x.float().view(x.shape[0], -1, TILE) * inverse[:, :, None]
    return scaled.clamp(-E4M3.max, E4M3.max).to(E4M3.dtype).view(x.shape)


def requantized(q: ScaledTensor, offsets: torch.Tensor, block_expert: torch.Tensor, to: str) -> GroupedTensor:
    """Dequantise to bf16 and transpose, quantise again: two passes where `grouped_fold_transpose` is one (beside the maxima of the exponents, in both)."""
    assert q.tile_exponent is not None and to == "column_block"
    experts, cols = offsets.shape[0] - 1, q.shape[1]
    tiles = q.tile_exponent.view(-1, TILE, q.tile_exponent.shape[1]).amax(1).int()
    owner = torch.where(block_expert < 0, experts, block_expert).long()
    target = tiles.new_ones(experts + 1, tiles.shape[1]).scatter_reduce_(0, owner[:, None].expand_as(tiles), tiles, "amax")
    scale = from_e8m0(target).repeat_interleave(TILE, dim=1)[:, :cols].contiguous()
    return GroupedTensor(_requantize(_dequantize_transposed(q.payload, q.scale), (1 / scale)[owner].t().contiguous()), scale[:experts].contiguous())


class DoubleQuantisation(Ours):
    patches = {"grouped_fold_transpose": requantized}


@torch.compile
def _swiglu(h: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
    gate, up = h.float().chunk(2, dim=1)
    return (F.silu(gate) * up * prob[:, None]).bfloat16()


@torch.compile
def _swiglu_gradient(dy: torch.Tensor, h: torch.Tensor, prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = h.float().chunk(2, dim=1)
    s = torch.sigmoid(gate)
    silu, g = gate * s, dy.float() * prob[:, None]
    return torch.cat((g * up * (s + silu * (1 - s)), g * silu), dim=1).bfloat16(), (dy.float() * silu * up).sum(1)


class UnfusedSwiGLU(Ours):
    """SwiGLU and its gradient to bf16, then a cast; fc1's output kept in bf16."""

    quantize: Any = staticmethod(ops.quantize)

    def make(self) -> None:
        super().make()
        self.patches = {"swiglu_quantize": self.forward_pass, "swiglu_quantize_saving": self.saving_pass, "swiglu_backward_quantize": self.backward_pass}
        self.h: torch.Tensor | None = None

    def forward_pass(self, h: Any, granularity: str, fmt: Any, fold: Any, prob: torch.Tensor) -> ScaledTensor:
        if isinstance(h, torch.Tensor):
            self.h = h
        return self.quantize(_swiglu(self.h, prob), granularity, fmt, fold=fold)

    def saving_pass(self, h: torch.Tensor, granularity: str, fmt: Any, fold: Any, prob: torch.Tensor) -> tuple[ScaledTensor, ScaledTensor]:
        stand_in = torch.empty(h.shape[0], 0, dtype=fmt.dtype, device=h.device)  # for the saved FP8 h, which this variant does not have
        return self.forward_pass(h, granularity, fmt, fold, prob), ScaledTensor(stand_in, prob, "row")

    def backward_pass(self, dy: torch.Tensor, h: Any, granularity: str, fmt: Any, fold: Any, prob: torch.Tensor) -> Any:
        dh, dprob = _swiglu_gradient(dy, self.h, prob)
        self.h = None  # the next forward pass must not find it in memory: it would count as resident
        return self.quantize(dh, granularity, fmt, fold=fold), dprob


ABLATIONS: dict[str, type[Ours]] = {
    "unfused permute, pad": UnfusedPermute,
    "dequantise, transpose, requantise": DoubleQuantisation,
    "unfused SwiGLU and quantise": UnfusedSwiGLU,
}


# --- running ------------------------------------------------------------------------------------------------------------------------------------


def make(problem: Problem, name: str) -> Contender:
    if name == "torch bf16":
        return TorchBf16(problem, name)
    return TransformerEngine(problem, name) if name.startswith("te ") else Ours(problem, name)


def snr(truth: torch.Tensor, value: torch.Tensor) -> float:
    """dB; computed per slice so that no float64 copy of a whole gradient is made."""
    pairs = list(zip(truth.flatten(0, -2).split(1 << 16), value.flatten(0, -2).split(1 << 16), strict=True))
    error = sum(float((a.float() - b.float()).double().square().sum()) for a, b in pairs)
    return math.inf if error == 0 else 10 * math.log10(sum(float(a.double().square().sum()) for a, _ in pairs) / error)


def checked(contenders: list[Contender], floors: dict[str, float]) -> tuple[Rows, int]:
    """SNR of every contender against the first; (rows, failures of ours)."""
    truth, rows, failures = contenders[0].results(), Rows(), 0
    truth = {name: t.clone() for name, t in truth.items()}
    for c in contenders:
        got = {name: snr(truth[name], t) for name, t in c.results().items()}
        bad = [f"{name} {db:.2f} dB" for name, db in got.items() if isinstance(c, Ours) and not db >= floors[name]]
        failures += len(bad)
        rows.append({"shape": c.problem.name, "contender": c.name} | {f"snr_{name}_db": round(db, 2) for name, db in got.items()})
        print(f"check {c.problem.name}, {c.name}: " + ("FAIL " + ", ".join(bad) if bad else "pass") + "; "
              + ", ".join(f"{name} {db:.2f}" for name, db in got.items()) + " dB", flush=True)  # fmt: skip
    return rows, failures


def timed(contenders: list[Contender], rows: Rows, rounds: int) -> None:
    """Adds times, speed-up over the first contender and memory to its rows."""
    for c in contenders:
        for i in range(MICROBATCHES):
            c.step(i)
    for _ in range(rounds):
        for c in contenders:
            c.timed()
    base = statistics.median(contenders[0].times)
    for c, row in zip(contenders, rows, strict=True):
        ms = statistics.median(c.times)
        row |= {"ms": round(ms, 3), "fastest_ms": round(min(c.times), 3), "speedup": round(base / ms, 3), "peak_mib": round(c.peak_mib())}
        row["tflops"] = round(c.problem.flop() / ms * 1e-9)
        print(f"  {c.name:<34} {ms:8.3f} ms  {row['speedup']!s:>6}x  {row['tflops']!s:>5} TFLOP/s  peak {row['peak_mib']!s:>6} MiB", flush=True)


def bench(name: str, recipes: list[str], rounds: int) -> tuple[Rows, int]:
    problem = Problem(name)
    names = ["torch bf16", *(["te bf16", "te bf16 cutlass", "te blockwise"] if HAVE_TE else []), *recipes]
    contenders = [make(problem, n) for n in names]
    print(f"{name}: {problem.tokens} tokens, top {problem.k} of {problem.experts}, hidden {problem.hidden}, ffn {problem.ffn}")
    rows, failures = checked(contenders, FLOORS)
    if rounds and not failures:
        timed(contenders, rows, rounds)
    return rows, failures


def ablation(name: str, recipe: str, rounds: int) -> tuple[Rows, int]:
    problem = Problem(name)
    contenders: list[Contender] = [Ours(problem, recipe)]
    for label, kind in ABLATIONS.items():
        contenders.append(kind(problem, recipe))
        contenders[-1].name = label
    rows, failures = checked(contenders, dict.fromkeys(FLOORS, 24.0))
    if rounds and not failures:
        timed(contenders, rows, rounds)
        for row in rows:
            row["costs_ms"] = round(float(str(row["ms"])) - float(str(rows[0]["ms"])), 3)
    return rows, failures


def profile(name: str, contender: str) -> None:
    """Print the kernels of one step by device time."""
    c = make(Problem(name), contender)
    for i in range(3):
        c.step(i)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as prof:
        c.step(1)
        torch.cuda.synchronize()
    print(f"{name} under {contender}")
    print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=80))


def write(rows: Rows, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    recipes = ["fp8_flow_moe", *(f"fp8_flow_moe:{option}" for option in ("moe_saved=activation", "moe_saved=input", "wgrad_fold=column"))]
    parser.add_argument("--recipes", nargs="+", default=recipes)
    parser.add_argument("--ablation", action="store_true", help="our layer with stand-alone steps put back, instead of the comparison")
    parser.add_argument("--profile", nargs=2, metavar=("SHAPE", "CONTENDER"), help="print one step's kernels instead")
    parser.add_argument("--csv", type=Path, help="directory for moe_bench.csv or moe_ablation.csv")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_moe.py needs a CUDA GPU; tests/nn/test_moe.py checks the same layer on the CPU")
    found = "found" if HAVE_TE else "not installed: its contenders are left out"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TransformerEngine {found}")
    if args.profile:
        profile(*args.profile)
        return 0
    start, table, failed = time.time(), Rows(), 0
    for name in args.shapes:
        rounds = 0 if args.check else args.rounds
        rows, failures = ablation(name, args.recipes[0], rounds) if args.ablation else bench(name, args.recipes, rounds)
        table, failed = table + rows, failed + failures
        torch.cuda.empty_cache()
        print(f"{name} done after {time.time() - start:.0f} s", flush=True)
        if args.csv and not failed:  # after every shape: a run that is cut off leaves what it has
            write(table, args.csv / ("moe_ablation.csv" if args.ablation else "moe_bench.csv"))
    print(f"{'FAIL' if failed else 'pass'}, {time.time() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
