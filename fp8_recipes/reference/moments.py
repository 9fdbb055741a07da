"""Second and fourth moments of a tensor, and what FP8 does to it, in one pass: the numbers behind `fp8_recipes.metrics`.

For x [rows, cols], rows tokens and cols features, non-finite elements taken as zero (and counted):

    kurtosis of a token    k_t = mean_f(x^4) / mean_f(x^2)^2        not centred; 3 for a Gaussian, cols for one spike among zeros
    kurtosis of a tensor   mean of k_t over the tokens              FOG, arXiv 2505.20524, section 3: "over the feature axis, averaged over tokens"
    pooled kurtosis        mean(x^4) / mean(x^2)^2 over everything  also grows where some tokens are larger than others

Everything is kept as sums, so that microbatches and ranks can be added before any ratio is taken. `FIELDS` names the numbers of a result.
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats import E4M3, E8M0_BIAS, Format, exponent_of, pow2
from ..tensor import TILE, ScaledTensor, check_matrix
from .quantize import dequantize, expand_scale, tile_exponents

FIELDS = (
    "tokens",  # rows that hold a finite non-zero element
    "kurtosis",  # sum of k_t over those rows
    "elements",
    "sum2",
    "sum4",
    "nonfinite",
    "nonzero",  # from here on of the FP8 form: finite non-zero elements; without x, all whose payload is not NaN, in rows that hold a non-zero payload
    "flushed",  # of those, payload zero; without x this counts exact zeros too and is an upper bound
    "saturated",  # finite elements above max(format) * scale; 0 without x
    "fold_flushed",  # non-zero payloads that the fold to column blocks turns into zero
    "amax",  # from here on maxima: largest finite |x|
    "scale_exponent_max",  # over scales of groups with a non-zero payload
    "minus_scale_exponent_min",
)
SUMS = FIELDS.index("amax")
"""Fields before this index add up, the others take the maximum."""
WIDTH = 16
"""Numbers in a result, the last ones unused."""
NO_EXPONENT = -(1 << 20)
"""Neutral element of the maximum over exponents."""


def neutral(*shape: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Results of nothing, fp64 [*shape, WIDTH]: what `moments` starts from and what adding leaves unchanged."""
    out = torch.zeros(*shape, WIDTH, dtype=torch.float64, device=device)
    out[..., SUMS + 1 : len(FIELDS)] = NO_EXPONENT
    return out


def joined(parts: torch.Tensor) -> torch.Tensor:
    """One result [..., WIDTH] from all parts of a tensor [..., parts, WIDTH]."""
    return torch.cat((parts[..., :SUMS].sum(dim=-2), parts[..., SUMS:].amax(dim=-2)), dim=-1)


def merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of two results [..., WIDTH]; the maxima of the maxima."""
    return torch.cat((a[..., :SUMS] + b[..., :SUMS], torch.maximum(a[..., SUMS:], b[..., SUMS:])), dim=-1)


def check_moments(
    x: torch.Tensor | None,
    q: ScaledTensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor | None,
    row_sums: torch.Tensor | None,
    source: torch.Tensor | None,
) -> tuple[int, int]:
    """Raise unless the arguments of `moments` fit; returns (rows, cols)."""
    if x is None and q is None:
        raise ValueError("moments needs x, its quantised form q, or both")
    if x is not None:
        check_matrix(x, "x")
    rows, cols = x.shape if x is not None else q.shape  # type: ignore[union-attr]
    if rows * cols == 0:
        raise ValueError(f"cannot take moments of an empty tensor of shape {(rows, cols)}")
    if q is not None and tuple(q.shape) != (rows, cols):
        raise ValueError(f"x has shape {(rows, cols)} and its quantised form {tuple(q.shape)}; pass the 2-D tensor that was quantised")
    if scale is not None:
        if q is not None:
            raise ValueError("scale belongs to an x without its quantised form; q brings its own scales")
        if tuple(scale.shape) not in ((), (rows,)) or scale.dtype != torch.float32:
            raise ValueError(f"scale must be fp32 of shape () or ({rows},), one decode scale for all or per row, got {scale.dtype} {tuple(scale.shape)}")
    if out is not None and (out.dim() not in (1, 2) or out.shape[-1] != WIDTH or out.dtype != torch.float64 or not out.is_contiguous()):
        raise ValueError(f"out must be float64 [parts, {WIDTH}] or [{WIDTH}], of reference.moments.neutral, got {out.dtype} {tuple(out.shape)}")
    if row_sums is not None and (tuple(row_sums.shape) != (rows, 2) or row_sums.dtype != torch.float64 or not row_sums.is_contiguous()):
        raise ValueError(f"row_sums must be contiguous float64 {(rows, 2)}, got {row_sums.dtype} {tuple(row_sums.shape)}")
    if source is not None and row_sums is not None:
        raise ValueError("source and row_sums do not go together: parts of tokens do not come in the padded groups of experts")
    if source is not None and (tuple(source.shape) != (rows,) or source.dtype != torch.int32 or not source.is_contiguous()):
        raise ValueError(f"source must be contiguous int32 ({rows},), got {source.dtype} {tuple(source.shape)}")
    return rows, cols


@torch.no_grad()
def moments(
    x: torch.Tensor | None,
    q: ScaledTensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    fmt: Format = E4M3,
    fold: bool = True,
    out: torch.Tensor | None = None,
    row_sums: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """`FIELDS` of one tensor, fp64 [WIDTH] on its device, without a host synchronisation.

    x: [rows, cols] bf16, fp16 or fp32, or None if only the quantised form exists (a fused kernel made it).
    q: x quantised, any granularity. scale: without q, the decode scale (fp32, 0-dim or [rows]) under which x is about to be cast to ``fmt``.
    Without q and scale the FP8 fields stay neutral.
    fold: count what `fold_transpose(q, "column_block")` would flush, where q has the exponents for it.
    out: a result to add to, in place; the return value then. Its rows, if it has several, are parts that `joined` adds up; who adds to which is left open.
    row_sums: fp64 [rows, 2], gets sum x^2 and sum x^4 of every row; ``tokens`` and ``kurtosis`` are then left alone, because the rows are parts of longer
    ones (tensor parallelism) and the ratio is the caller's, after adding the parts.
    source: int32 [rows]; rows with a negative number hold no token and are left out, as in the padded groups of experts. Not with row_sums.
    Raises ValueError for shapes that do not fit, an empty tensor, or nothing to look at.
    """
    check_moments(x, q, scale, out, row_sums, source)
    result = neutral(device=x.device if x is not None else q.device)  # type: ignore[union-attr]
    if source is not None:
        x, q, scale = (t if t is None else _rows_of(t, source >= 0) for t in (x, q, scale))
    if source is None or bool((source >= 0).any()):
        _add_rows(result, x, q, scale, fmt, fold, row_sums)
    if out is None:
        return result
    part = out if out.dim() == 1 else out[0]
    part.copy_(merge(part, result))
    return out


def _rows_of(t: Any, mask: torch.Tensor) -> Any:
    """Those rows of a tensor, of its quantised form or of its scales that are set in ``mask``."""
    if isinstance(t, torch.Tensor):
        return t[mask] if t.dim() else t
    if t.granularity == "block":
        raise ValueError("source leaves out rows, and a block scale belongs to 128 of them; pass another granularity")
    payload = t.payload.view(torch.uint8)[mask].view(t.payload.dtype)
    scale = t.scale[mask] if t.scale.dim() else t.scale
    return ScaledTensor(payload, scale, t.granularity, None if t.tile_exponent is None else t.tile_exponent[mask], t.global_scale)


def _add_rows(
    result: torch.Tensor,
    x: torch.Tensor | None,
    q: ScaledTensor | None,
    scale: torch.Tensor | None,
    fmt: Format,
    fold: bool,
    row_sums: torch.Tensor | None,
) -> None:
    rows, cols = x.shape if x is not None else q.shape  # type: ignore[union-attr]
    values = x.double() if x is not None else dequantize(q).double()  # type: ignore[arg-type]
    finite = torch.isfinite(values)
    values = torch.where(finite, values, 0.0)
    squares = values.square()
    sum2, sum4 = squares.sum(dim=1), squares.square().sum(dim=1)
    if row_sums is None:
        result[0], result[1] = token_kurtosis(sum2, sum4, cols)
    else:
        row_sums.copy_(torch.stack((sum2, sum4), dim=1))
    result[2] = rows * cols
    result[3], result[4], result[5] = sum2.sum(), sum4.sum(), (~finite).sum()
    result[SUMS] = values.abs().amax()
    nonzero = finite & (values != 0) if x is not None else finite & (sum2 > 0)[:, None]
    if q is not None or scale is not None:
        result[6] = nonzero.sum()
    if q is not None:
        _count_quantised(result, values if x is not None else None, nonzero, q, fold)
    elif scale is not None:
        s = scale if scale.dim() == 0 else scale[:, None]  # thresholds in fp32, as the cast computes them
        result[7] = (nonzero & (values.abs() <= 0.5 * fmt.min_subnormal * s)).sum()
        result[8] = (values.abs() > fmt.max * s).sum()
        _scale_range(result, exponent_of(s), nonzero)


def token_kurtosis(sum2: torch.Tensor, sum4: torch.Tensor, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, kurtosis) of `FIELDS` from the rows' sums, fp64 [rows] each; ``cols`` features per row. Rows of zeros do not count."""
    alive = sum2 > 0
    k = torch.where(alive, cols * sum4 / torch.where(alive, sum2, 1.0).square(), 0.0)
    return alive.sum().double(), k.sum()


def _count_quantised(result: torch.Tensor, source: torch.Tensor | None, nonzero: torch.Tensor, q: ScaledTensor, fold: bool) -> None:
    payload = q.payload.float()
    result[7] = (nonzero & (payload == 0)).sum()
    if source is not None:
        result[8] = (source.abs() > q.format.max * _scale_of_elements(q).double()).sum()
    exponent = _exponents(q)
    _scale_range(result, expand_scale(exponent, q.shape, q.granularity), (payload != 0) & ~payload.isnan())
    if fold and q.global_scale is None and (q.tile_exponent is not None or q.granularity in ("tile", "micro")):
        target = tile_exponents(q).amax(dim=0).repeat_interleave(TILE)[: q.shape[1]]
        shift = (expand_scale(exponent, q.shape, q.granularity) - target[None, :]).clamp(-126, 127)
        moved = payload.abs() * pow2(shift)
        result[9] = ((payload != 0) & (moved <= 0.5 * q.format.min_subnormal)).sum()


def _scale_range(result: torch.Tensor, exponent: torch.Tensor, alive: torch.Tensor) -> None:
    """exponent: int32, broadcastable to alive [rows, cols]."""
    exponent = exponent.expand(alive.shape)
    result[SUMS + 1] = torch.where(alive, exponent, NO_EXPONENT).amax()
    result[SUMS + 2] = torch.where(alive, -exponent, NO_EXPONENT).amax()


def _exponents(q: ScaledTensor) -> torch.Tensor:
    """Exponent of every scale (int32), the global scale's included (floor of its logarithm), in the scale's own shape."""
    if q.granularity != "micro":
        return exponent_of(q.scale)
    local = q.scale.to(torch.int32) - E8M0_BIAS
    return local if q.global_scale is None else local + exponent_of(q.global_scale.float())


def _scale_of_elements(q: ScaledTensor) -> torch.Tensor:
    """The factor that decodes each payload element, fp32, broadcastable to [rows, cols]."""
    scale = pow2(q.scale.to(torch.int32) - E8M0_BIAS) if q.granularity == "micro" else q.scale
    scale = expand_scale(scale, q.shape, q.granularity)
    return scale if q.global_scale is None else scale * q.global_scale
