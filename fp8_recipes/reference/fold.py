"""Fold: the same numbers under other scales, without going back to bf16.

    payload' = round(payload * 2**(from - to))

With ``from <= to`` the exponent field shrinks by ``to - from``: exact while the result is normal, one rounding to nearest even into the subnormals,
a *flush* below half of the smallest subnormal. With ``from > to`` it grows, which is exact up to the format's maximum, where it saturates.
NaN stays NaN. FP8-Flow-MoE (arXiv 2511.02302, section 3.2 and Algorithm 1) calls the transposed form scaling-aware transpose; its 128x128 tile takes its
largest row scale, here the target is one scale per 128 columns over all rows, constant along wgrad's contraction.
"""

from __future__ import annotations

import torch

from ..formats import SCALE_EXPONENT_MAX, SCALE_EXPONENT_MIN, cast_saturating, exponent_of, is_power_of_two, pow2, scale_exponent_from_amax, to_e8m0
from ..tensor import TILE, ScaledTensor
from .quantize import expand_scale, finite_abs, tile_exponents

FINER = {"tile": ("micro",), "block": ("micro", "tile"), "row": ("micro", "tile"), "tensor": ("micro", "tile", "block", "row")}
"""What may be folded to what."""


def _exponents(q: ScaledTensor) -> torch.Tensor:
    """Exponent of the scale of every element, broadcastable to [rows, cols], int32."""
    if q.granularity == "micro":
        e = q.scale.to(torch.int32) - 127
    else:
        if not bool(is_power_of_two(q.scale).all()):
            bad = q.scale[~is_power_of_two(q.scale)].flatten()[0].item()
            raise ValueError(f"scale {bad!r} is not a normal power of two, so its payload cannot be folded; quantise with formats.scale_from_amax")
        e = exponent_of(q.scale)
    return expand_scale(e, q.shape, q.granularity)


def _shift(q: ScaledTensor, target: torch.Tensor) -> torch.Tensor:
    """Payload re-expressed at the exponents `target` (broadcastable to [rows, cols])."""
    shift = (_exponents(q) - target).clamp(-126, 127)  # beyond 2**-126 everything is zero anyway
    return cast_saturating(q.payload.float() * pow2(shift), q.format)


def check_fold(q: ScaledTensor, granularity: str) -> None:
    """ValueError unless the scales of ``q`` are powers of two and finer than ``granularity``, or the same."""
    if granularity not in FINER:
        raise ValueError(f"cannot fold to {granularity!r}; expected {', '.join(map(repr, FINER))}")
    if q.global_scale is not None:
        raise ValueError("a payload under an FP32 global scale cannot be folded; quantise with global_scale=None")
    if q.granularity not in (granularity, *FINER[granularity]):
        raise ValueError(f"cannot fold a {q.granularity} payload to {granularity}; its scales are not finer (those of {', '.join(FINER[granularity])} are)")


def block_maximum(tiles: torch.Tensor) -> torch.Tensor:
    """Largest of 128 rows of per-tile numbers: [rows, n] -> [ceil(rows/128), n]."""
    return torch.stack([part.amax(dim=0) for part in tiles.split(TILE)])


def fold(q: ScaledTensor, granularity: str) -> ScaledTensor:
    """Re-express ``q`` under coarser scales, "tile", "block", "row" or "tensor": the largest of the finer ones. A "row" result carries ``tile_exponent``."""
    check_fold(q, granularity)
    if granularity == q.granularity:
        return q
    if granularity == "tensor":
        target = _exponents(q).amax()
        return ScaledTensor(_shift(q, target), pow2(target), "tensor")
    tiles = tile_exponents(q)
    target = {"tile": lambda: tiles, "block": lambda: block_maximum(tiles), "row": lambda: tiles.amax(dim=1)}[granularity]()
    payload = _shift(q, expand_scale(target, q.shape, granularity))
    return ScaledTensor(payload, pow2(target), granularity, tile_exponent=to_e8m0(tiles) if granularity == "row" else None)


TO = ("column", "column_block", "tensor")
"""What shares a scale in the result of `fold_transpose`."""


def check_transpose_to(to: str) -> None:
    """ValueError unless ``to`` is one of `TO`."""
    if to not in TO:
        raise ValueError(f"cannot fold_transpose to {to!r}; expected {', '.join(map(repr, TO))}")


def _column_exponents(q: ScaledTensor) -> torch.Tensor:
    """Exponent of the smallest scale under which a column's largest value fits, int32 [cols]; NaN does not count. From exponents, as the values themselves
    (payload times scale) may be beyond fp32."""
    alone = scale_exponent_from_amax(finite_abs(q.payload.float()), q.format)  # of a value under the scale 1
    needed = torch.where(alone > SCALE_EXPONENT_MIN, alone + _exponents(q), SCALE_EXPONENT_MIN)  # zeros need none
    return needed.amax(dim=0).clamp(SCALE_EXPONENT_MIN, SCALE_EXPONENT_MAX)


def fold_transpose(q: ScaledTensor, to: str = "column_block") -> ScaledTensor:
    """Transposed payload [cols, rows] under one scale per row of the result, all that the contraction over the original rows allows.

    to: "column_block" (128 original columns share the largest of their tile scales), "tensor" (all columns do), or "column" (each has the smallest scale that
    holds its largest value, which another pass over the payload finds). The result's ``scale`` is [cols] fp32, granularity "row".
    A payload under one scale ("tensor") keeps its bytes and its scale.
    """
    check_transpose_to(to)
    if q.granularity == "tensor":
        return ScaledTensor(q.payload.t().contiguous(), q.scale.expand(q.shape[1]).contiguous(), "row")
    tiles = tile_exponents(q)
    if to == "column":
        target = _column_exponents(q)
    else:
        target = tiles.amax(dim=0).repeat_interleave(TILE)[: q.shape[1]] if to == "column_block" else tiles.amax().expand(q.shape[1])
    payload = _shift(q, target[None, :]).t().contiguous()
    return ScaledTensor(payload, pow2(target.contiguous()), "row")
