"""`ScaledTensor`: an FP8 payload and what it takes to read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .formats import Format, format_of

MICRO = 32
"""Values that share one local scale under `micro` granularity (MOSS's k2, MXFP8's block)."""
TILE = 128
"""Edge of `tile`, `block` and `column_block`."""
GRANULARITIES = ("micro", "tile", "block", "row", "tensor")


@dataclass
class ScaledTensor:
    """FP8 payload with scales: ``x[i, j] ~ payload[i, j] * scale[of the group of (i, j)]``.

    payload: [rows, cols] float8_e4m3fn or float8_e5m2, contiguous.
    granularity and the shape of ``scale``:

    ======== ================================== =======================================
    tensor   [] fp32                            one scale
    row      [rows] fp32                        one per row
    tile     [rows, ceil(cols/128)] fp32        one per 128 columns of a row
    block    [ceil(rows/128), ceil(cols/128)]   one per 128 x 128
    micro    [rows, ceil(cols/32)] uint8 E8M0   one per 32 columns, times ``global_scale`` ([] fp32, None = 1)
    ======== ================================== =======================================

    tile_exponent: uint8 E8M0 [rows, ceil(cols/128)] or None. Beside a payload folded to rows: the scale that each tile needs by itself, from which a later
    fold along the other axis takes its target without reading the data again.
    row_scale: [rows] fp32 or None. Beside a `tensor` scale: the same number once per row, written by the kernel that made it. Libraries that take a scale per
    row of one operand want one per row of the other too, and filling it for every product would be a launch of its own.
    """

    payload: torch.Tensor
    scale: torch.Tensor
    granularity: str
    tile_exponent: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {self.granularity!r}; expected one of {GRANULARITIES}")
        if self.payload.dim() != 2:
            raise ValueError(f"payload must be 2-D [rows, cols], got shape {tuple(self.payload.shape)}")
        rows, cols = self.payload.shape
        expected = scale_shape(rows, cols, self.granularity)
        if self.scale.shape != expected:
            raise ValueError(
                f"{self.granularity} scale of a {tuple(self.payload.shape)} payload must have shape {expected}, "
                f"got {tuple(self.scale.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.payload.shape

    @property
    def format(self) -> Format:
        return format_of(self.payload.dtype)

    @property
    def device(self) -> torch.device:
        return self.payload.device

    def nbytes(self) -> int:
        """Bytes held: payload, scales and tile exponents."""
        held = (self.payload, self.scale, self.tile_exponent, self.global_scale, self.row_scale)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def scale_shape(rows: int, cols: int, granularity: str) -> tuple[int, ...]:
    """Shape of the scale tensor of a [rows, cols] payload."""
    if granularity == "row":
        return (rows,)
    if granularity == "tensor":
        return ()
    if granularity == "tile":
        return rows, -(-cols // TILE)
    if granularity == "micro":
        return rows, -(-cols // MICRO)
    if granularity == "block":
        return -(-rows // TILE), -(-cols // TILE)
    raise ValueError(f"unknown granularity {granularity!r}; expected one of {GRANULARITIES}")


def check_matrix(x: torch.Tensor, name: str) -> None:
    """Raise unless `x` is a 2-D, contiguous, floating tensor that the operations accept."""
    if x.dim() != 2:
        raise ValueError(f"{name} must be 2-D [rows, cols], got shape {tuple(x.shape)}; reshape it to [tokens, features]")
    if not x.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous; call .contiguous()")
    if x.dtype not in (torch.bfloat16, torch.float32, torch.float16):
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
