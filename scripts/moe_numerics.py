#!/usr/bin/env python3
"""SNR of the FP8 mixture-of-experts layer against float64, on the CPU: writes docs/benchmarks/moe_snr.csv (a few minutes), the table of docs/recipes.md.

    python scripts/moe_numerics.py && python scripts/make_tables.py

512 tokens, top-4 of 16 experts, hidden 512, ffn 256. Each row: one recipe on one kind of data; y, and the gradients of x, prob and both weights.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch

from fp8_recipes import from_name
from fp8_recipes.nn import moe_experts
from fp8_recipes.nn.moe import plain_experts

TOKENS, K, EXPERTS, HIDDEN, FFN = 512, 4, 16, 512, 256
RECIPES = {
    "fp8_flow_moe (moe_saved=h)": "fp8_flow_moe",
    "moe_saved=activation": "fp8_flow_moe:moe_saved=activation",
    "moe_saved=input": "fp8_flow_moe:moe_saved=input",
    "activation and grad in micro": "fp8_flow_moe:activation_granularity=micro,grad_granularity=micro",
    "grad=e5m2": "fp8_flow_moe:grad=e5m2",
    "bf16": "bf16",
}
OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "moe_snr.csv"


def inputs(data: str) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    x, dy = normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN)
    if data == "outlier channels in x":
        x[:, ::128] *= 30
    if data == "dy: log-normal rows":
        dy *= torch.exp2(4 * normal(TOKENS, 1))
    index = torch.rand(TOKENS, EXPERTS, generator=gen).topk(K, dim=1).indices.int()
    score = torch.rand(TOKENS, K, generator=gen) + 0.5
    w1, w2 = normal(EXPERTS, 2 * FFN, HIDDEN) * x.square().mean().rsqrt() * HIDDEN**-0.5, normal(EXPERTS, HIDDEN, FFN) * FFN**-0.5
    values = {"x": x, "dy": dy, "w1": w1, "w2": w2}
    return {**{name: t.bfloat16() for name, t in values.items()}, "index": index, "prob": score / score.sum(1, keepdim=True)}


def results(given: dict[str, torch.Tensor], recipe: str | None) -> dict[str, torch.Tensor]:
    """recipe None: float64."""
    x, prob, w1, w2 = ((given[n].double() if recipe is None else given[n].clone()).requires_grad_() for n in ("x", "prob", "w1", "w2"))
    if recipe is None:
        y = plain_experts(x, given["index"], prob, w1.unbind(), w2.unbind())
    else:
        y = moe_experts(x, given["index"], prob, w1.unbind(), w2.unbind(), recipe=from_name(recipe))
    dx, dprob, dw1, dw2 = torch.autograd.grad(y, (x, prob, w1, w2), given["dy"].to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dprob": dprob, "dw1": dw1, "dw2": dw2}


def snr(truth: torch.Tensor, value: torch.Tensor) -> float:
    return 10 * math.log10(float(truth.square().sum() / (truth - value.double()).square().sum()))


def main() -> None:
    rows: list[dict[str, str]] = []
    for data in ("normal", "outlier channels in x", "dy: log-normal rows"):
        given = inputs(data)
        truth = results(given, None)
        for label, recipe in RECIPES.items():
            got = results(given, recipe)
            rows.append({"data": data, "recipe": label} | {name: f"{snr(truth[name], got[name]):.1f}" for name in truth})
            print("  ".join(rows[-1].values()), flush=True)
    with open(OUTPUT, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
