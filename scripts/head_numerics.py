#!/usr/bin/env python3
"""What FP8 does to the products of an LM head, on the CPU: writes docs/benchmarks/head_snr.csv, head_rare.csv and head_accumulator.csv (eight minutes on two
cores), the tables of docs/recipes.md on head=fp8.

    python scripts/head_numerics.py && python scripts/make_tables.py

There is no trained model here. Logits are made to look like one's: token frequencies follow Zipf's law, the output weight of token v is a random direction
and log f(v), and the state of a position is a sum of the directions of eight likely tokens, drawn by frequency, with falling strength. Everything is then
turned by one random rotation, so that no feature is special. Targets are drawn from the softmax itself: a calibrated model, of 3 nats a token. Its gradient is
(softmax - target) / tokens in bf16, as Megatron's is.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accumulator_table import hopper_sum

from fp8_recipes import from_name
from fp8_recipes.nn import products
from fp8_recipes.reference import dequantize, fold_transpose, quantize
from fp8_recipes.tensor import ScaledTensor

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
TOKENS, HIDDEN, LIKELY, STRENGTH = 4096, 256, 8, 8.0
VOCABULARIES = (32000, 102400)
RECIPE = from_name("moss:head=fp8").head_recipe
FORMATS = ("e4m3", "e5m2")
CHUNK = 6400
"""Columns of the vocabulary worked on at once; a multiple of 128."""
SUMS = (16, 48)
"""Tokens and features of the accumulator's table."""


class Head:
    """x [T, H] and w [V, H] bf16, dlogits [T, V] bf16, target [T], as the module says."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        frequency = 1 / (torch.arange(vocabulary).double() + 3.7)
        frequency /= frequency.sum()
        direction = torch.nn.functional.normalize(torch.randn(vocabulary, HIDDEN - 1, generator=generator))
        likely = torch.multinomial(frequency, TOKENS * LIKELY, replacement=True, generator=generator).view(TOKENS, LIKELY)
        strength = STRENGTH * 0.75 ** torch.arange(LIKELY) * (0.5 + torch.rand(TOKENS, LIKELY, generator=generator))
        state = torch.einsum("tl,tlh->th", strength, direction[likely])
        rotation, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))
        x = torch.cat([state, torch.full((TOKENS, 1), 8.0)], 1) @ rotation
        w = torch.cat([direction, frequency.log().float()[:, None] / 8], 1) @ rotation
        size = x.norm(dim=1).mean() / HIDDEN**0.5  # states of unit size, as a norm leaves them
        self.x, self.w = (x / size).bfloat16(), (w * size).bfloat16()
        logits = self.x.float() @ self.w.float().t()
        p = torch.softmax(logits, 1)
        self.target = torch.multinomial(p, 1, generator=generator)[:, 0]
        self.loss = self.cross_entropy(logits)
        p[torch.arange(TOKENS), self.target] -= 1
        self.dlogits = (p / TOKENS).bfloat16()

    def cross_entropy(self, logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits, self.target).item()

    def is_target(self, columns: slice) -> torch.Tensor:
        return self.target[:, None] == torch.arange(columns.start, columns.stop)

    def quantised(self, fmt: str) -> ScaledTensor:
        recipe = RECIPE.with_overrides(grad=fmt)
        parts = [products.quantize_grad(rows.contiguous(), recipe) for rows in self.dlogits.split(256)]
        payload, scale, tiles = (torch.cat([getattr(p, name) for p in parts]) for name in ("payload", "scale", "tile_exponent"))
        return ScaledTensor(payload, scale, "row", tiles)


def columns_of(q: ScaledTensor) -> Iterator[tuple[slice, ScaledTensor]]:
    """``q`` in pieces of `CHUNK` columns: no scale of either form is shared beyond 128."""
    for first in range(0, q.shape[1], CHUNK):
        at = slice(first, min(first + CHUNK, q.shape[1]))
        tiles = q.tile_exponent[:, at.start // 128 : -(-at.stop // 128)].contiguous()
        yield at, ScaledTensor(q.payload[:, at].contiguous(), q.scale, "row", tiles)


def snr(truth: torch.Tensor, value: torch.Tensor) -> str:
    return f"{10 * math.log10(truth.double().square().sum() / (truth.double() - value.double()).square().sum()):.1f}"


def groups(vocabulary: int) -> dict[str, slice]:
    """Tokens by frequency: Zipf's law gives number 0 the highest."""
    edges = [0, vocabulary // 100, vocabulary // 10, vocabulary // 2, vocabulary]
    names = ("most frequent 1 %", "next 9 %", "next 40 %", "rarest 50 %")
    return {name: slice(a, b) for name, a, b in zip(names, edges, edges[1:], strict=False)}


def measure(head: Head, xq: torch.Tensor, wq: torch.Tensor) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of head_snr.csv and head_rare.csv. xq, wq: the operands as fprop reads them."""
    vocabulary = len(head.w)
    dx, dw = head.dlogits.float() @ head.w.float(), head.dlogits.float().t() @ head.x.float()
    snrs, rare = [], []
    for fmt in FORMATS:
        flushed, folded, dxq, dwq = 0, 0, torch.zeros_like(dx), torch.empty_like(dw)
        down, kept = torch.zeros(vocabulary, dtype=torch.float64), torch.zeros(vocabulary, dtype=torch.float64)
        for at, q in columns_of(head.quantised(fmt)):
            true, row, column = head.dlogits[:, at], dequantize(q), dequantize(fold_transpose(q))
            there, others = true != 0, ~head.is_target(at)
            flushed, folded = flushed + int((there & (row == 0)).sum()), folded + int((there.t() & (column == 0)).sum())
            dxq += row @ wq[at]
            dwq[at] = column @ xq
            down[at], kept[at] = (true.double() * others).sum(0), (column.t().double() * others).sum(0)
        share = 100 / head.dlogits.count_nonzero().item()
        snrs.append({"grad": fmt, "flushed_percent": f"{flushed * share:.1f}", "fold_flushed_percent": f"{folded * share:.1f}"})
        snrs[-1] |= {"dx": snr(dx, dxq), "dw": snr(dw, dwq)}
        for name, rows in groups(vocabulary).items():
            ratio = 100 * (kept[rows].sum() / down[rows].sum()).item()
            share_of = 100 * (down[rows].sum() / down.sum()).item()
            of_group = {"vocabulary": str(vocabulary), "tokens": name, "probability_percent": f"{share_of:.1f}", "grad": fmt}
            rare.append(of_group | {"kept_percent": f"{ratio:.1f}", "dw": snr(dw[rows], dwq[rows])})
        print(snrs[-1], *rare[-4:], sep="\n", flush=True)
    return snrs, rare


def accumulator(head: Head) -> list[dict[str, str]]:
    """dgrad's sum over the vocabulary in Hopper's accumulator, by the model of accumulator_table.py: relative error, promoted at several distances."""
    wq = quantize(head.w, "tensor")
    tokens, features = SUMS
    b, rows = wq.payload[:, :features].double(), []
    true = head.dlogits[:tokens].double() @ head.w[:, :features].double()
    for fmt in FORMATS:
        q = products.quantize_grad(head.dlogits[:tokens], RECIPE.with_overrides(grad=fmt))
        a = q.payload.double()
        exact = a @ b
        rounding = (exact * q.scale[:, None].double() * wq.scale.double() - true).norm() / true.norm()
        row = {"vocabulary": str(len(head.w)), "grad": fmt, "fp8_rounding": f"{rounding:.1e}"}
        for promote in (0, 4096, 2048, 1024, 128):
            error = (hopper_sum(a.t().contiguous(), b, promote) - exact).norm() / exact.norm()
            row[f"promote_{promote}"] = f"{error:.1e}"
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    tables: dict[str, list[dict[str, str]]] = {"head_snr": [], "head_rare": [], "head_accumulator": []}
    for vocabulary in VOCABULARIES:
        head = Head(vocabulary)
        xq, wq = dequantize(products.quantize_activation(head.x, RECIPE)), dequantize(quantize(head.w, "tensor"))
        logits = xq @ wq.t()
        losses = {"loss": f"{head.loss:.3f}", "loss_of_fp8_logits": f"{head.cross_entropy(logits):.3f}"}
        del logits
        snrs, rare = measure(head, xq, wq)
        tables["head_snr"] += [{"vocabulary": str(vocabulary)} | losses | row for row in snrs]
        tables["head_rare"] += rare
        tables["head_accumulator"] += accumulator(head)
    for name, rows in tables.items():
        with open(OUT / f"{name}.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
