"""Signal-to-noise ratios of every quantised form, and of the three products of a linear layer under every recipe.

    python scripts/numerics_tables.py            measure, write docs/benchmarks/numerics_*.csv and the tables inside docs/numerics.md and docs/recipes.md
    python scripts/numerics_tables.py --render   rewrite the tables from the CSV files that are there

    SNR = 10 log10(sum x**2 / sum (x - x_hat)**2)   in dB, sums over the tensor ("worst row": over each row, then the smallest), x the bf16 tensor in float64.

Everything runs on a CPU, on the reference operations, from fixed seeds; products are summed in fp32 here, so that only quantisation shows.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fp8_recipes.formats import E4M3, E5M2, Format, cast_saturating
from fp8_recipes.nn import products
from fp8_recipes.recipe import Recipe, from_name
from fp8_recipes.reference import dequantize, fold, fold_transpose, quantize
from fp8_recipes.reference.quantize import expand_scale, group_amax, quantize_weight

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks"
ROWS, COLS, OUT_FEATURES = 1024, 2048, 1024
Row = dict[str, str]


# --- data ------------------------------------------------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=generator(seed))


def outlier_channels(rows: int, cols: int, seed: int) -> torch.Tensor:
    x = normal(rows, cols, seed)
    x[:, torch.randperm(cols, generator=generator(seed + 1))[:8]] *= 3000
    return x


def swiglu_like(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.silu(normal(rows, cols, seed)) * normal(rows, cols, seed + 1)


def massive_spike(rows: int, cols: int, seed: int) -> torch.Tensor:
    x = swiglu_like(rows, cols, seed)
    x[rows // 3, cols // 3] = 2e5
    return x


def lognormal_rows(rows: int, cols: int, seed: int) -> torch.Tensor:
    return normal(rows, cols, seed) * torch.exp2(4 * torch.randn(rows, 1, generator=generator(seed + 1)))


def lognormal_elements(rows: int, cols: int, seed: int) -> torch.Tensor:
    return normal(rows, cols, seed) * torch.exp2(4 * normal(rows, cols, seed + 1))


DATA: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "normal": normal,
    "8 outlier channels x3000": outlier_channels,
    "SwiGLU-like": swiglu_like,
    "SwiGLU-like, one spike 2e5": massive_spike,
    "log-normal rows (4 binades)": lognormal_rows,
    "log-normal elements (4 binades)": lognormal_elements,
}


# --- forms -----------------------------------------------------------------------------------------------------------------------------


def fp32_scales(x: torch.Tensor, granularity: str, fmt: Format = E4M3) -> torch.Tensor:
    """Quantised and dequantised under scales amax / max that are not powers of two: what this package does not do."""
    scale = expand_scale((group_amax(x, granularity) / fmt.max).clamp_min(2.0**-126), x.shape, granularity)
    return cast_saturating(x.float() / scale, fmt).float() * scale


def pow2(x: torch.Tensor, granularity: str, **options) -> torch.Tensor:
    return dequantize(quantize(x, granularity, **options))


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tensor, FP32": lambda x: fp32_scales(x, "tensor"),
    "tensor": lambda x: pow2(x, "tensor"),
    "row": lambda x: pow2(x, "row"),
    "tile, FP32": lambda x: fp32_scales(x, "tile"),
    "tile": lambda x: pow2(x, "tile"),
    "micro": lambda x: pow2(x, "micro"),
    "MOSS two-level": lambda x: pow2(x, "micro", global_scale="measured"),
    "micro to row": lambda x: pow2(x, "micro", fold="row"),
    "micro to row to column block": lambda x: dequantize(fold_transpose(quantize(x, "micro", fold="row"))).t(),
    "micro to tensor": lambda x: dequantize(fold(quantize(x, "micro"), "tensor")),
}
"""Each gives back what the form keeps of ``x``. Scales are powers of two unless "FP32" is said."""


def snr(x: torch.Tensor, approximation: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    x, approximation = x.double(), approximation.double()
    signal, noise = x.square(), (x - approximation).square()
    return 10 * torch.log10(signal.sum(dim) / noise.sum(dim)) if dim is not None else 10 * torch.log10(signal.sum() / noise.sum())


def worst_row(x: torch.Tensor, approximation: torch.Tensor) -> float:
    return snr(x, approximation, dim=1)[x.abs().amax(dim=1) > 0].min().item()


def flushed(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """Share of the non-zero values that became zero, in percent."""
    return 100 * ((approximation == 0) & (x != 0)).sum().item() / (x != 0).sum().item()


def number(value: float, digits: int = 2) -> str:
    return f"{value + 0.0:.{digits}f}"


def measure_forms() -> Iterable[Row]:
    for data, make in DATA.items():
        x = make(ROWS, COLS, 10).bfloat16()
        for form, apply in FORMS.items():
            y = apply(x)
            total, worst, share = snr(x, y).item(), worst_row(x, y), flushed(x, y)
            yield {"data": data, "form": form, "snr_db": number(total), "worst_row_db": number(worst), "flushed_percent": number(share, 4)}


def measure_direct() -> Iterable[Row]:
    """How far fold="row" is from quantising the row at once: bytes that differ by double rounding among the subnormals."""
    for data, make in DATA.items():
        x = make(ROWS, COLS, 10).bfloat16()
        direct = quantize(x, "row")
        for granularity in ("tile", "micro"):
            folded = quantize(x, granularity, fold="row")
            differ = (folded.payload.view(torch.uint8) != direct.payload.view(torch.uint8)).float().mean().item()
            loss = snr(x, dequantize(direct)).item() - snr(x, dequantize(folded)).item()
            yield {"data": data, "folded_from": granularity, "bytes_that_differ_percent": number(100 * differ, 4), "snr_lost_db": number(loss, 4)}


def at_rows(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """``values`` re-expressed under the row scales ``2**exponent`` [rows]."""
    scale = torch.exp2(exponent.float())[:, None]
    return cast_saturating(values / scale).float() * scale


def measure_axis() -> Iterable[Row]:
    """Micro-groups of 32 along features or along tokens, as they are and folded to one scale per row (the largest of the row's groups)."""
    for data, make in DATA.items():
        x = make(ROWS, COLS, 10).bfloat16()
        features, tokens = quantize(x, "micro"), quantize(x.t().contiguous(), "micro")
        row_exponent = (tokens.scale.int() - 127).amax(dim=0).repeat_interleave(32)  # [rows]; a group along tokens reaches over 32 rows
        folded = {"features": dequantize(fold(features, "row")), "tokens": at_rows(dequantize(tokens).t(), row_exponent)}
        for axis, plain in (("features", dequantize(features)), ("tokens", dequantize(tokens).t())):
            row = {"data": data, "groups_along": axis, "snr_db": number(snr(x, plain).item()), "folded_snr_db": number(snr(x, folded[axis]).item())}
            row |= {"folded_worst_row_db": number(worst_row(x, folded[axis]))}
            yield row | {"flushed_percent": number(flushed(x, plain), 3), "folded_flushed_percent": number(flushed(x, folded[axis]), 3)}


SPREAD_FORMS = ("tensor", "row", "tile", "micro", "MOSS two-level", "micro to row")


def measure_spread() -> Iterable[Row]:
    """One value per group of 32 stands 2**k above the others: what is left of the others (SNR over them alone, and the share that is flushed)."""
    base = normal(ROWS // 4, COLS // 4, 30)
    for binades in (0, 4, 8, 10, 12, 13, 14, 15, 16, 17, 18, 20):
        for place in ("in every 1x32", "in every 1x128", "in every row"):
            width = {"in every 1x32": 32, "in every 1x128": 128, "in every row": base.shape[1]}[place]
            x = base.clone()
            x[:, ::width] = 2.0**binades * torch.where(x[:, ::width] < 0, -1.0, 1.0)
            x = x.bfloat16()
            others = torch.ones(x.shape[1], dtype=torch.bool)
            others[::width] = False
            for form in SPREAD_FORMS:
                y = FORMS[form](x)
                rest, total = snr(x[:, others], y[:, others]).item(), snr(x, y).item()
                row = {"outlier": place, "binades": str(binades), "form": form, "others_snr_db": number(rest), "snr_db": number(total)}
                yield row | {"others_flushed_percent": number(flushed(x[:, others], y[:, others]), 3)}


def measure_mantissa() -> Iterable[Row]:
    """What three mantissa bits allow when every value is normal: values in a narrow band at position m of a binade, and whole binades."""
    gen = generator(40)
    u = torch.rand(2**20, generator=gen, dtype=torch.float64)
    for name, m in {
        "band at 1.0 (1.0 to 1.125): the worst": 1 + u / 8,
        "one binade, uniform": 1 + u,
        "many binades, log-uniform": torch.exp2(u * 8),
        "band at 2.0 (1.875 to 2.0): the best": 2 - u / 8,
    }.items():
        yield {"values": name, "snr_db": number(snr(m, cast_saturating(m.float(), E4M3)).item())}


def measure_weight() -> Iterable[Row]:
    """A weight (normal, 0.02) whose scale was predicted too high by some binades: the price of not measuring."""
    w = (0.02 * normal(OUT_FEATURES, COLS, 21)).bfloat16()
    amax = w.float().abs().amax()
    for binades in (0, 1, 2, 3, 4, 6, 8, 10):
        got = dequantize(quantize_weight(w, amax * 2.0**binades))
        yield {"binades_too_high": str(binades), "snr_db": number(snr(w, got).item()), "flushed_percent": number(flushed(w, got), 3)}


# --- products --------------------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, str]] = {
    "normal": ("normal", "normal"),
    "outlier channels in x": ("8 outlier channels x3000", "normal"),
    "spike in x": ("SwiGLU-like, one spike 2e5", "log-normal elements (4 binades)"),
    "dy: log-normal rows": ("normal", "log-normal rows (4 binades)"),
    "dy: log-normal elements": ("normal", "log-normal elements (4 binades)"),
}
"""x and dy of each case; the weight is normal, 0.02."""
OURS = ("moss", "moss:grad=e5m2", "moss:wgrad_fold=column", "moss:wgrad_fold=tensor", "row", "row:grad=e5m2", "moss_exact", "moss_exact:grad=e5m2", "tile")


def operands(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K], w [N, K], dy [T, N], bf16."""
    x, dy = (DATA[name] for name in CASES[case])
    w = 0.02 * normal(OUT_FEATURES, COLS, 21)
    return x(ROWS, COLS, 20).bfloat16(), w.bfloat16(), (1e-4 * dy(ROWS, OUT_FEATURES, 23)).bfloat16()


def products_of(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    """y, dx, dw on the code path of a linear layer, fp32 out."""
    weight = products.weight_operand(w, recipe)
    qx, qdy = products.quantize_activation(x, recipe), products.quantize_grad(dy, recipe)
    fp32 = torch.float32
    return [products.fprop(qx, weight, out_dtype=fp32), products.dgrad(qdy, weight, out_dtype=fp32), products.wgrad(qdy, qx, recipe, out_dtype=fp32)]


def current_scaling(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """TransformerEngine's Float8CurrentScaling: one measured FP32 scale per tensor, E4M3 forward, E5M2 gradients."""
    qx, qw, qdy = fp32_scales(x, "tensor"), fp32_scales(w, "tensor"), fp32_scales(dy, "tensor", E5M2)
    return [qx @ qw.t(), qdy @ qw, qdy.t() @ qx]


def block_scaling(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """TransformerEngine's Float8BlockScaling: 1x128 x and dy, 128x128 w, power-of-two scales, E4M3; wgrad's operands from bf16 again, along tokens."""
    qx, qw, qdy = pow2(x, "tile"), pow2(w, "block"), pow2(dy, "tile")
    xt, dyt = pow2(x.t().contiguous(), "tile"), pow2(dy.t().contiguous(), "tile")
    return [qx @ qw.t(), qdy @ qw, dyt @ xt.t()]


def measure_products() -> Iterable[Row]:
    for case in CASES:
        x, w, dy = operands(case)
        truth = [x.double() @ w.double().t(), dy.double() @ w.double(), dy.double().t() @ x.double()]
        results: dict[str, Callable[[], list[torch.Tensor]]] = {
            "TE current scaling": lambda x=x, w=w, dy=dy: current_scaling(x, w, dy),
            "TE blockwise": lambda x=x, w=w, dy=dy: block_scaling(x, w, dy),
        }
        results |= {spec: lambda x=x, w=w, dy=dy, spec=spec: products_of(x, w, dy, from_name(spec)) for spec in OURS}
        for recipe, multiply in results.items():
            row: Row = {"case": case, "recipe": recipe}
            for name, exact, got in zip(("y", "dx", "dw"), truth, multiply(), strict=True):
                row |= {f"{name}_db": number(snr(exact, got).item()), f"{name}_worst_row_db": number(worst_row(exact, got))}
            yield row


def wgrad_operands() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Ways to the [features, tokens] operand of wgrad; each gives the values it stands for, [tokens, features]."""
    return {
        "saved payload, fold to column block": lambda x: dequantize(fold_transpose(quantize(x, "micro", fold="row"))).t(),
        "saved payload, fold to each column": lambda x: dequantize(fold_transpose(quantize(x, "micro", fold="row"), to="column")).t(),
        "saved payload, fold to tensor": lambda x: dequantize(fold_transpose(quantize(x, "micro", fold="row"), to="tensor")).t(),
        "bf16 again, one scale per column": lambda x: pow2(x.t().contiguous(), "row").t(),
        "bf16 again, 1x128 along tokens": lambda x: pow2(x.t().contiguous(), "tile").t(),
        "bf16 again, 1x32 along tokens": lambda x: pow2(x.t().contiguous(), "micro").t(),
        "dequantise, 1x128 along tokens, FP32 scales": lambda x: fp32_scales(fp32_scales(x, "tile").bfloat16().t().contiguous(), "tile").t(),
    }


def measure_wgrad() -> Iterable[Row]:
    for case in CASES:
        x, _, dy = operands(case)
        truth = dy.double().t() @ x.double()
        for way, operand in wgrad_operands().items():
            qx, qdy = operand(x), operand(dy)
            dw = qdy.double().t() @ qx.double()
            row = {"case": case, "operand": way, "dw_db": number(snr(truth, dw).item()), "dw_worst_row_db": number(worst_row(truth, dw))}
            row |= {"dw_rows_below_10db": str((snr(truth, dw, dim=1) < 10).sum().item())}
            yield row | {"x_flushed_percent": number(flushed(x, qx), 3), "dy_flushed_percent": number(flushed(dy, qdy), 3)}


# --- files -----------------------------------------------------------------------------------------------------------------------------

MEASUREMENTS: dict[str, Callable[[], Iterable[Row]]] = {
    "numerics_snr": measure_forms,
    "numerics_direct": measure_direct,
    "numerics_axis": measure_axis,
    "numerics_spread": measure_spread,
    "numerics_mantissa": measure_mantissa,
    "numerics_weight": measure_weight,
    "numerics_gemm": measure_products,
    "numerics_wgrad": measure_wgrad,
}


def write_csv(name: str, rows: list[Row]) -> None:
    with open(OUT / f"{name}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(name: str) -> list[Row]:
    with open(OUT / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def pivot(rows: list[Row], down: str, across: str, value: str, corner: str = "") -> str:
    """Table with one line per ``down`` and one column per ``across``."""
    columns = list(dict.fromkeys(r[across] for r in rows))
    cells = {(r[down], r[across]): r[value] for r in rows}
    lines = dict.fromkeys(r[down] for r in rows)
    return markdown([corner or down, *columns], ([line, *(cells[line, c] for c in columns)] for line in lines))


def listing(rows: list[Row], fields: list[str]) -> str:
    return markdown([f.replace("_", " ") for f in fields], ([r[f] for f in fields] for r in rows))


def shortened(row: Row, fields: list[str], digits: int) -> Row:
    return row | {f: f"{float(row[f]):.{digits}f}" for f in fields}


def tables() -> dict[str, str]:
    """Every generated table, by the name in its markers."""
    forms, spread = read_csv("numerics_snr"), read_csv("numerics_spread")
    forms = [shortened(r, ["snr_db", "worst_row_db"], 1) | {"flushed_percent": f"{float(r['flushed_percent']):.2f}"} for r in forms]
    spread = [shortened(r, ["others_snr_db", "others_flushed_percent"], 1) | {"binades": f"2^{r['binades']}"} for r in spread]
    gemm = [shortened(r, [f for f in r if f.endswith("_db")], 1) for r in read_csv("numerics_gemm")]
    wgrad = [shortened(r, ["dw_db", "dw_worst_row_db"], 1) for r in read_csv("numerics_wgrad")]
    result = {
        "snr": pivot(forms, "form", "data", "snr_db"),
        "worst-row": pivot(forms, "form", "data", "worst_row_db"),
        "flushed": pivot(forms, "form", "data", "flushed_percent"),
        "direct": listing(read_csv("numerics_direct"), ["data", "folded_from", "bytes_that_differ_percent", "snr_lost_db"]),
        "axis": listing(read_csv("numerics_axis"), list(read_csv("numerics_axis")[0])),
        "weight": listing(read_csv("numerics_weight"), ["binades_too_high", "snr_db", "flushed_percent"]),
        "mantissa": listing(read_csv("numerics_mantissa"), ["values", "snr_db"]),
        "wgrad": pivot(wgrad, "operand", "case", "dw_db", "operands of wgrad"),
        "wgrad-worst-row": pivot(wgrad, "operand", "case", "dw_worst_row_db", "operands of wgrad"),
        "wgrad-lost-rows": pivot(wgrad, "operand", "case", "dw_rows_below_10db", "operands of wgrad"),
        "wgrad-flushed": pivot(wgrad, "operand", "case", "dy_flushed_percent", "operand dy of wgrad"),
    }
    for name, place in (("micro", "in every 1x32"), ("tile", "in every 1x128"), ("row", "in every row")):
        chosen = [r for r in spread if r["outlier"] == place]
        result[f"spread-{name}"] = pivot(chosen, "form", "binades", "others_snr_db")
        result[f"spread-{name}-flushed"] = pivot(chosen, "form", "binades", "others_flushed_percent")
    for name in ("y", "dx", "dw"):
        result[f"gemm-{name}"] = pivot(gemm, "recipe", "case", f"{name}_db")
    for name in ("dx", "dw"):
        result[f"gemm-{name}-worst-row"] = pivot(gemm, "recipe", "case", f"{name}_worst_row_db")
    return result


def rendered(text: str, generated: dict[str, str]) -> str:
    """``text`` with every ``<!-- table NAME -->`` ... ``<!-- end -->`` filled in. An unknown name raises KeyError."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{generated[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


DOCUMENTS = (ROOT / "docs" / "numerics.md", ROOT / "docs" / "recipes.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only rewrite the tables in the documents from the CSV files")
    parser.add_argument("--only", choices=list(MEASUREMENTS), action="append", help="measure only this (may be repeated)")
    arguments = parser.parse_args()
    if not arguments.render:
        OUT.mkdir(parents=True, exist_ok=True)
        for name in arguments.only or MEASUREMENTS:
            rows = list(MEASUREMENTS[name]())
            write_csv(name, rows)
            print(f"{OUT.relative_to(ROOT) / name}.csv: {len(rows)} rows")
    generated = tables()
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text(), generated))
        print(f"{document.relative_to(ROOT)}: tables filled in")


if __name__ == "__main__":
    main()
