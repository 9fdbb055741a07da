#!/usr/bin/env python3
"""Forward + backward of TransformerEngine modules under bf16, TE's stock FP8 recipes and ours, interleaved in one process.

    python3 scripts/bench_te.py --csv te.csv [--recipes bf16 delayed current blockwise moss] [--modules layer mlp linear]

Reports the median time of a step among several back to back, the speed-up over bf16, the peak memory of one forward + backward above what the module holds
at rest, and the SNR of the output and gradients against bf16 on the same data. Our predicted scales are driven as in training: automatic scaling with AdamW
(learning rate 0, so that the data stays the same).
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys

import torch

TOKENS, HIDDEN, FFN, HEADS = 8192, 4096, 11008, 32
STEPS = 4


def stock(name: str):
    from transformer_engine.common import recipe

    return {
        "delayed": lambda: recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID),
        "current": lambda: recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID),
        "blockwise": lambda: recipe.Float8BlockScaling(fp8_format=recipe.Format.E4M3),
    }[name]()


def make_module(kind: str, recipe: str):
    import transformer_engine.pytorch as te

    torch.manual_seed(1)
    common = {"params_dtype": torch.bfloat16, "bias": False}
    if kind == "layer":
        module = te.TransformerLayer(
            HIDDEN, FFN, HEADS, **common, normalization="RMSNorm", activation="swiglu", hidden_dropout=0, attention_dropout=0,
            self_attn_mask_type="causal", fuse_qkv_params=True, attn_input_format="sbhd",
        )  # fmt: skip
    elif kind == "mlp":
        module = te.LayerNormMLP(HIDDEN, FFN, **common, normalization="RMSNorm", activation="swiglu")
    else:
        module = te.Linear(HIDDEN, FFN, **common)
    if recipe not in ("bf16", "delayed", "current", "blockwise"):
        from fp8_recipes import te as fp8_te

        fp8_te.automatic_scaling(module, torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.95)))
    return module


class Case:
    """One module under one recipe."""

    def __init__(self, kind: str, recipe: str, x: torch.Tensor, dy: torch.Tensor):
        import transformer_engine.pytorch as te

        from fp8_recipes import te as fp8_te

        self.recipe, self.x, self.dy = recipe, x, dy
        self.module = make_module(kind, recipe)
        value = None if recipe == "bf16" else stock(recipe) if recipe in ("delayed", "current", "blockwise") else fp8_te.recipe(recipe)
        self.context = lambda: te.autocast(enabled=value is not None, recipe=value)
        self.times: list[float] = []

    def step(self) -> torch.Tensor:
        self.x.grad = None
        for p in self.module.parameters():
            p.grad = None
        with self.context():
            y = self.module(self.x)
        y.backward(self.dy)
        return y

    def timed(self) -> None:
        """Steps back to back, as in training: the host runs ahead of the GPU as far as it can."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.step()
        start.record()
        for _ in range(STEPS):
            self.step()
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end) / STEPS)

    def peak_mib(self) -> float:
        self.step()
        for p in self.module.parameters():
            p.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def resident_mib(self) -> float:
        """What the module holds at rest: parameters and cached FP8 copies."""
        held = sum(p.numel() * p.element_size() for p in self.module.parameters())
        return held / 2**20


def snr(reference: torch.Tensor, value: torch.Tensor) -> float:
    error = (reference.double() - value.double()).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(reference.double().square().sum().item() / error)


def bench(kind: str, recipes: list[str], rounds: int) -> list[dict[str, object]]:
    shape = (TOKENS // 2, 2, HIDDEN) if kind == "layer" else (TOKENS, HIDDEN)
    torch.manual_seed(0)
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(*shape[:-1], FFN if kind == "linear" else HIDDEN, device="cuda", dtype=torch.bfloat16)
    cases, rows = [], []
    truth: dict[str, torch.Tensor] = {}
    for name in recipes:
        base = torch.cuda.memory_allocated()
        case = Case(kind, name, x, dy)
        for _ in range(4):
            y = case.step()
        got = {"y": y.detach(), "dx": x.grad}
        got["dw"] = next(p.grad for p in case.module.parameters() if p.dim() == 2)
        truth = truth or {k: v.clone() for k, v in got.items()}
        row: dict[str, object] = {"module": kind, "recipe": name}
        row |= {f"snr_{k}_db": round(snr(truth[k], v), 2) for k, v in got.items()}
        del y, got
        row["peak_mib"] = round(case.peak_mib())
        x.grad = None
        for p in case.module.parameters():
            p.grad = None
        row["resident_mib"] = round((torch.cuda.memory_allocated() - base) / 2**20)
        rows.append(row)
        cases.append(case)
    for _ in range(rounds):
        for case in cases:
            case.timed()
    base_time = statistics.median(cases[0].times)
    for case, row in zip(cases, rows, strict=True):
        row["ms"] = round(statistics.median(case.times), 3)
        row["speedup"] = round(base_time / statistics.median(case.times), 3)
    return rows


def profile(kind: str, recipe: str) -> None:
    """Print the kernels of one step by device time."""
    shape = (TOKENS // 2, 2, HIDDEN) if kind == "layer" else (TOKENS, HIDDEN)
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(*shape[:-1], FFN if kind == "linear" else HIDDEN, device="cuda", dtype=torch.bfloat16)
    case = Case(kind, recipe, x, dy)
    for _ in range(3):
        case.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        case.step()
        torch.cuda.synchronize()
    print(f"profile of {kind} under {recipe}")
    print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=90))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "delayed", "current", "blockwise", "moss"])
    parser.add_argument("--modules", nargs="+", default=["layer", "mlp", "linear"], choices=["layer", "mlp", "linear"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", nargs=2, metavar=("MODULE", "RECIPE"), help="print one step's kernels instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_te needs a CUDA GPU")
    if args.profile:
        profile(*args.profile)
        return 0
    rows = [row for kind in args.modules for row in bench(kind, args.recipes, args.rounds)]
    columns = ["module", "recipe", "ms", "speedup", "peak_mib", "resident_mib", "snr_y_db", "snr_dx_db", "snr_dw_db"]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(f"{row[c]!s:>13}" for c in columns))
    if args.csv:
        with open(args.csv, "w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
