"""fc1's output h as the kernels of its activation take it: bf16, or FP8 with one scale per row as an earlier kernel saved it; and how that one saves it.

h has one part (GeLU, xIELU) or two, side by side (SwiGLU's gate and up). A row of h has one scale over all parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.activation import check_saved
from ..tensor import ScaledTensor, check_matrix
from .common import check_device, check_not_empty, decode, finite_or_nan, pow2, scale_exponent, to_fp32
from .rows import columns_of, largest, micro_amax
from .words import bytes_of, pack_row


def h_arguments(h: torch.Tensor | ScaledTensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(h, its scales, `H`) as the kernels take them, checked; scales of a plain tensor are itself, never read."""
    if isinstance(h, torch.Tensor):
        check_matrix(h, "h")
        check_device(h, "h")
        check_not_empty(h, "h")
        return h, h, ""
    check_saved(h)
    for name, t in (("h.payload", h.payload), ("h.scale", h.scale)):
        check_device(t, name)
        check_not_empty(t, name)
        if not t.is_contiguous():
            raise ValueError(f"{name} of strides {t.stride()} is not contiguous; call .contiguous()")
    if h.scale.dtype != torch.float32:
        raise TypeError(f"h.scale must be float32, got {h.scale.dtype}")
    return h.payload.view(torch.uint8), h.scale, h.format.name


# --- device functions: H is "" (bf16, fp16 or fp32), "e4m3" or "e5m2" ------------------------------------------------------------------------------


@triton.jit
def load_h_scale(h_scale_ptr, row, H: tl.constexpr):
    """The scale of a row of h, 1 where h is not FP8."""
    if H == "":
        return 1.0
    else:
        return tl.load(h_scale_ptr + row)


@triton.jit
def h_values(raw, h_scale, H: tl.constexpr, AGAIN: tl.constexpr = False):
    """What was loaded of h, in fp32. AGAIN: see `to_fp32`."""
    if H == "":
        return to_fp32(raw, AGAIN)
    else:
        return decode(raw, H == "e5m2") * h_scale


@triton.jit
def save_row(pieces, row, payload_ptr, scale_ptr, cols, E5M2: tl.constexpr):
    """Write a row of h in FP8 under one scale. pieces: the parts of each as they were loaded; cols: of one part.

    h is converted three times, for its maximum, its payload and the activation: held in fp32 it would take twice the registers.
    """
    PARTS: tl.constexpr = len(pieces[0])
    exponent = scale_exponent(largest([_largest_value(piece) for piece in pieces]), E5M2)
    payload_ptr += row * PARTS * cols
    for i in tl.static_range(len(pieces)):
        first = i * pieces[0][0].shape[0] * 128
        for part in tl.static_range(PARTS):
            _save_piece(to_fp32(pieces[i][part], AGAIN=True), exponent, payload_ptr + part * cols, first, cols, E5M2)
    tl.store(scale_ptr + row, pow2(exponent))


@triton.jit
def _largest_value(piece):
    """Largest finite value of all parts of a piece."""
    part = [to_fp32(raw) for raw in piece]
    most = [tl.abs(finite_or_nan(x)) for x in part]
    return tl.max(tl.max(micro_amax(largest(most)), axis=1), axis=0)


@triton.jit
def _save_piece(x, exponent, payload_ptr, first, cols, E5M2: tl.constexpr):
    column = first + columns_of(x.shape[0])
    word = pack_row(finite_or_nan(x) * pow2(-exponent), E5M2)
    tl.store(payload_ptr + column, bytes_of(word), mask=column < cols)
