"""Quantise and dequantise at every granularity.

    amax_g = largest finite |x| of group g          scale_g = smallest 2**e with amax_g <= fmt.max * 2**e          payload = round(x / scale_g)

Two-level microscaling (MOSS, arXiv 2511.05811, section 3.1): ``s = max_g amax_g / max(fmt)`` in FP32 for the tensor,
``ss_g = 2**ceil(log2(s_g / s))`` per 32 values, ``payload = round(x / (s * ss_g))``. That form (``global_scale="measured"``) reads the tensor twice.
The global scale only says where the power-of-two grid lies, so any given one serves as well; with 1.0 the local exponents take either sign and one read
is enough.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import (
    E4M3,
    E8M0_BIAS,
    Format,
    cast_saturating,
    exponent_of,
    from_e8m0,
    global_scale_from_amax,
    pow2,
    scale_exponent_from_amax,
    to_e8m0,
)
from ..tensor import MICRO, TILE, ScaledTensor, check_matrix


def finite_abs(x: torch.Tensor) -> torch.Tensor:
    """|x| in fp32 with 0 in place of NaN and Inf: what scales are taken from, so that one bad element spoils only itself."""
    return torch.where(torch.isfinite(x), x, 0).abs().float()


def group_amax(x: torch.Tensor, granularity: str) -> torch.Tensor:
    """Largest finite |x| of each group, fp32, in the shape of the group's scale."""
    mag = finite_abs(x)
    if mag.numel() == 0:
        raise ValueError(f"cannot take scales of an empty tensor of shape {tuple(x.shape)}")
    rows, cols = mag.shape
    if granularity == "tensor":
        return mag.amax()
    if granularity == "row":
        return mag.amax(dim=1)
    width = MICRO if granularity == "micro" else TILE
    mag = F.pad(mag, (0, -cols % width)).view(rows, -1, width).amax(dim=2)
    if granularity == "block":
        mag = F.pad(mag, (0, 0, 0, -rows % TILE)).view(-1, TILE, mag.shape[1]).amax(dim=1)
    return mag


def expand_scale(scale: torch.Tensor, shape: torch.Size, granularity: str) -> torch.Tensor:
    """Repeat per-group scales so that they broadcast against a [rows, cols] tensor."""
    rows, cols = shape
    if granularity == "tensor":
        return scale
    if granularity == "row":
        return scale[:, None]
    width = MICRO if granularity == "micro" else TILE
    scale = scale.repeat_interleave(width, dim=1)[:, :cols]
    if granularity == "block":
        scale = scale.repeat_interleave(TILE, dim=0)[:rows]
    return scale


def quantize(
    x: torch.Tensor,
    granularity: str,
    fmt: Format = E4M3,
    *,
    fold: str | None = None,
    global_scale: torch.Tensor | str | None = None,
) -> ScaledTensor:
    """Quantise ``x`` [rows, cols] (bf16, fp16 or fp32) once.

    granularity: "row", "tile", "micro", "block" or "tensor".
    fold: None, or "row" to re-express tile or micro payloads under one scale per row.
    global_scale: with "micro" only. None (1.0), a 0-dim fp32 tensor, or "measured" (amax / fmt.max of this tensor, MOSS as published).
    A "row" result carries ``tile_exponent``. Non-finite elements become NaN, alone.
    """
    check_matrix(x, "x")
    _check_options(granularity, fold, global_scale)
    if granularity == "micro":
        q = _quantize_micro(x, fmt, global_scale)
    else:
        exponent = scale_exponent_from_amax(group_amax(x, granularity), fmt)
        scale = pow2(exponent)
        payload = cast_saturating(x.float() / expand_scale(scale, x.shape, granularity), fmt)
        q = ScaledTensor(payload, scale, granularity)
    if granularity == "row":
        q.tile_exponent = to_e8m0(scale_exponent_from_amax(group_amax(x, "tile"), fmt))
    if fold == "row":
        from .fold import fold as fold_to

        q = fold_to(q, "row")
    return q


def _check_options(granularity: str, fold: str | None, global_scale: torch.Tensor | str | None) -> None:
    if granularity not in ("row", "tile", "micro", "block", "tensor"):
        raise ValueError(f"cannot quantise at granularity {granularity!r}; expected row, tile, micro, block or tensor")
    if fold not in (None, "row"):
        raise ValueError(f"fold must be None or 'row', got {fold!r}")
    if fold == "row" and granularity not in ("tile", "micro"):
        raise ValueError(f"fold='row' applies to tile and micro granularity, not {granularity!r}")
    if global_scale is not None and granularity != "micro":
        raise ValueError(f"global_scale belongs to micro granularity, not {granularity!r}")
    if isinstance(global_scale, str) and global_scale != "measured":
        raise ValueError(f"global_scale must be None, 'measured' or a 0-dim fp32 tensor, got {global_scale!r}")
    if isinstance(global_scale, torch.Tensor) and global_scale.dim() != 0:
        raise ValueError(f"global_scale must be 0-dim (one number for the whole tensor), got shape {tuple(global_scale.shape)}")
    if fold == "row" and global_scale is not None:
        raise ValueError("fold='row' needs power-of-two scales: leave global_scale at None (1.0)")


def _quantize_micro(x: torch.Tensor, fmt: Format, global_scale: torch.Tensor | str | None) -> ScaledTensor:
    amax = group_amax(x, "micro")
    if isinstance(global_scale, str):
        global_scale = global_scale_from_amax(amax.amax(), fmt)  # MOSS: s = max_g s_g, so every local scale is at most one
    g = torch.ones((), device=x.device) if global_scale is None else global_scale.float()
    exponent = scale_exponent_from_amax(amax / g, fmt)
    divisor = expand_scale(pow2(exponent), x.shape, "micro")
    payload = cast_saturating(x.float() / g / divisor, fmt)
    return ScaledTensor(payload, to_e8m0(exponent), "micro", global_scale=None if global_scale is None else g)


def dequantize(q: ScaledTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``payload * scale`` in fp32, then rounded to `dtype`. Exact in bf16 for power-of-two scales (8 bits of significand hold E4M3's 4)."""
    scale = from_e8m0(q.scale) if q.granularity == "micro" else q.scale
    x = q.payload.float() * expand_scale(scale, q.shape, q.granularity)
    if q.global_scale is not None:
        x = x * q.global_scale
    return x.to(dtype)


def quantize_weight(
    w: torch.Tensor, amax: torch.Tensor, increment: float = 0.0, fmt: Format = E4M3, *, transpose: bool = False
) -> ScaledTensor:
    """Quantise a weight ``w`` [out_features, in_features] under one scale that is *given*, not measured: that of ``amax + increment``.

    amax: 0-dim fp32, the maximum when it was last measured; increment: how far it can have grown since (`weight_scaling`). Values beyond saturate.
    transpose: lay the payload out as [in_features, out_features], the operand of dgrad.
    """
    check_matrix(w, "w")
    scale = pow2(scale_exponent_from_amax(amax.float() + increment, fmt))
    payload = cast_saturating(w.float() / scale, fmt)
    return ScaledTensor(payload.t().contiguous() if transpose else payload, scale, "tensor")


def tile_exponents(q: ScaledTensor) -> torch.Tensor:
    """E8M0 exponents (int32, unbiased) per 1x128 tile of a power-of-two payload: the input of every fold along the other axis."""
    if q.global_scale is not None:
        raise ValueError("a payload under an FP32 global scale cannot be folded; quantise with global_scale=None")
    if q.tile_exponent is not None:
        return q.tile_exponent.to(torch.int32) - E8M0_BIAS
    if q.granularity == "tile":
        return exponent_of(q.scale)
    if q.granularity == "micro":
        e = q.scale.to(torch.int32) - E8M0_BIAS
        per = TILE // MICRO
        return F.pad(e, (0, -e.shape[1] % per), value=-E8M0_BIAS + 1).view(e.shape[0], -1, per).amax(dim=2)
    raise ValueError(f"a {q.granularity} payload carries no tile exponents")
