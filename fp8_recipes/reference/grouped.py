"""Products and folds over the experts of a mixture-of-experts layer: the rows of all experts in one buffer.

    rows                                  [rows, K], rows a multiple of 128
    offsets      int32 [E + 1]            expert e owns rows offsets[e] .. offsets[e + 1]; all multiples of 128; rows from offsets[E] on are unused
    block_expert int32 [rows / 128]       the expert of every block of 128 rows, -1 = unused (unused blocks come last)

Rows that pad an expert's group to a multiple of 128 hold exactly zero under the smallest scale, 2**-126: they win no maximum and add nothing to a sum.
What unused rows hold is undefined, on input and on output. Experts without rows are allowed. Both index tensors live on the device of the rows; the kernels
never bring them to the host, this reference does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..formats import Format, format_of, pow2, to_e8m0
from ..tensor import TILE, ScaledTensor
from .fold import _shift, fold_transpose
from .gemm import check_result
from .quantize import tile_exponents

SMALLEST_SCALE = 2.0**-126
Matrices = TypeVar("Matrices", torch.Tensor, Sequence[torch.Tensor])
"""One matrix per expert: a tensor [E, N, K], or E tensors [N, K]."""


@dataclass
class GroupedTensor:
    """FP8 payload whose scales are kept per expert (or per 128 rows).

    ================= ======================= ============================= =========================================================================
    what              payload                 scale, fp32, powers of two    made by
    ================= ======================= ============================= =========================================================================
    experts' weights  [E, N, K]               [E] or [E, N]                 quantise each expert's weight
    wgrad operand     [cols, rows]            [E, cols]                     `grouped_fold_transpose`
    paper's transpose [cols, rows]            [ceil(rows / 128), cols]      `scaling_aware_transpose`
    ================= ======================= ============================= =========================================================================
    """

    payload: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        format_of(self.payload.dtype)
        if self.scale.dtype != torch.float32:
            raise TypeError(f"the scale of a GroupedTensor must be float32, got {self.scale.dtype}; convert E8M0 bytes with formats.from_e8m0")
        shape, scale = tuple(self.payload.shape), tuple(self.scale.shape)
        if len(shape) == 3:
            good = scale in (shape[:1], shape[:2])
            wanted = f"[E] = {shape[:1]} or [E, N] = {shape[:2]}"
        else:
            good = len(shape) == 2 and len(scale) == 2 and scale[1] == shape[0]
            wanted = f"[E, cols], cols = {shape[0] if shape else '?'}"
        if not good:
            raise ValueError(f"a grouped payload of shape {shape} needs a scale of shape {wanted}; got {scale}")

    @property
    def format(self) -> Format:
        return format_of(self.payload.dtype)

    @property
    def device(self) -> torch.device:
        return self.payload.device


def check_blocks(rows: int, block_expert: torch.Tensor, device: torch.device) -> None:
    """Raise unless ``block_expert`` describes a buffer of ``rows`` rows. Its values are not read: that would wait for the GPU."""
    if rows == 0 or rows % TILE:
        raise ValueError(f"a grouped buffer needs a positive multiple of {TILE} rows, got {rows}; pad every expert's group to {TILE} (zero tokens: one block)")
    _check_index(block_expert, "block_expert", (rows // TILE,), device)


def check_offsets(offsets: torch.Tensor, experts: int, device: torch.device) -> None:
    """Raise unless ``offsets`` has one start per expert and the end."""
    _check_index(offsets, "offsets", (experts + 1,), device)


def _check_index(index: torch.Tensor, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {index.dtype}; convert with .int()")
    if tuple(index.shape) != shape or not index.is_contiguous():
        raise ValueError(f"{name} must be a contiguous tensor of shape {shape}, got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}, the rows are on {device}; keep them together")


def check_grouped_gemm(a: ScaledTensor, b: GroupedTensor, block_expert: torch.Tensor, out: torch.Tensor | None) -> None:
    """Raise unless ``a [rows, K]`` and the experts' ``b [E, N, K]`` multiply into ``out [rows, N]``."""
    if b.payload.dim() != 3:
        raise ValueError(f"b must hold one [N, K] matrix per expert, [E, N, K]; got shape {tuple(b.payload.shape)}")
    if a.granularity != "row":
        raise ValueError(f"a has {a.granularity} scales; grouped products take one scale per row: fold it to rows first")
    if a.shape[1] != b.payload.shape[2]:
        raise ValueError(f"contraction lengths differ: a is {tuple(a.shape)}, b is {tuple(b.payload.shape)}; both must end in K")
    check_blocks(a.shape[0], block_expert, a.device)
    _check_out(out, (a.shape[0], b.payload.shape[1]))


def check_wgrad_operands(a_t: GroupedTensor, b_t: GroupedTensor, offsets: torch.Tensor) -> None:
    """Raise unless ``a_t [N, rows]`` and ``b_t [K, rows]`` multiply, expert by expert."""
    for name, q in (("a_t", a_t), ("b_t", b_t)):
        if q.payload.dim() != 2:
            raise ValueError(f"{name} must be a transposed payload [cols, rows], got shape {tuple(q.payload.shape)}; make it with grouped_fold_transpose")
    if a_t.payload.shape[1] != b_t.payload.shape[1]:
        raise ValueError(f"row counts differ: a_t is {tuple(a_t.payload.shape)}, b_t is {tuple(b_t.payload.shape)}; both must be [cols, rows]")
    experts = a_t.scale.shape[0]
    if b_t.scale.shape[0] != experts:
        raise ValueError(f"a_t has scales for {experts} experts, b_t for {b_t.scale.shape[0]}; fold both with the same offsets")
    rows = a_t.payload.shape[1]
    if rows == 0 or rows % TILE:
        raise ValueError(f"a grouped buffer needs a positive multiple of {TILE} rows, got {rows}; pad every expert's group to {TILE} (zero tokens: one block)")
    check_offsets(offsets, experts, a_t.device)


def check_outs(out: torch.Tensor | Sequence[torch.Tensor], experts: int, shape: tuple[int, int]) -> None:
    """Raise unless ``out`` is [E, N, K], or one contiguous matrix per expert, each in memory of its own, alike in dtype and device. shape: (N, K)."""
    if isinstance(out, torch.Tensor):
        _check_out(out, (experts, *shape))
        return
    if len(out) != experts:
        raise ValueError(f"out has {len(out)} matrices for {experts} experts; give one {shape} matrix per expert")
    dtype, device = out[0].dtype, out[0].device
    for e, t in enumerate(out):
        if t.shape != shape or not t.is_contiguous():
            raise ValueError(f"out[{e}] must be contiguous of shape {shape}, got shape {tuple(t.shape)} with strides {t.stride()}")
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"out[{e}] is {t.dtype} on {t.device}, out[0] is {dtype} on {device}; all experts' gradients must be alike")
    if len({t.data_ptr() for t in out}) < experts:
        raise ValueError("two experts' gradients are the same memory; give every expert its own matrix")


def _check_out(out: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if out is None:
        return
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous of shape {shape}, got shape {tuple(out.shape)} with strides {out.stride()}")


def _groups(offsets: torch.Tensor) -> list[slice]:
    starts = offsets.tolist()
    if starts[0] != 0 or any(a > b or b % TILE for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"offsets {starts} must start at 0 and rise in multiples of {TILE}")
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def grouped_gemm(
    a: ScaledTensor,
    b: GroupedTensor,
    block_expert: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    promote: int = 0,
) -> torch.Tensor:
    """``y[m, n] = scale_a[m] * scale_b[e, n] * sum_k a[m, k] b[e, n, k]`` with e the expert of row m, summed in fp32: fprop and dgrad.

    a: [rows, K], row scales. b: [E, N, K], one scale per expert or per output feature. block_expert: int32 [rows / 128], -1 = unused.
    Returns [rows, N] (``out`` if given). Rows of unused blocks are not written; padding rows inside used blocks come out zero.
    promote: without effect here (see `gemm`).
    """
    check_grouped_gemm(a, b, block_expert, out)
    check_result(out_dtype if out is None else out.dtype, promote)
    rows, n = a.shape[0], b.payload.shape[1]
    out = torch.zeros(rows, n, dtype=out_dtype, device=a.device) if out is None else out
    of_row = block_expert.repeat_interleave(TILE)
    for expert in range(b.payload.shape[0]):
        mine = of_row == expert
        y = a.payload[mine].float() @ b.payload[expert].float().t()  # [rows of this expert, K] @ [K, N]
        out[mine] = (y * a.scale[mine, None] * b.scale[expert]).to(out.dtype)
    return out


def grouped_wgrad(a_t: GroupedTensor, b_t: GroupedTensor, offsets: torch.Tensor, *, out: Matrices, accumulate: bool = False, promote: int = 0) -> Matrices:
    """``dw[e, n, k] = scale_a[e, n] * scale_b[e, k] * sum_m a_t[n, m] b_t[k, m]`` over the rows m of expert e, summed in fp32.

    a_t: [N, rows] (the output's gradient), b_t: [K, rows] (the input), scales [E, N] and [E, K], from `grouped_fold_transpose`. offsets: int32 [E + 1].
    out: [E, N, K] fp32 or bf16, or E contiguous [N, K] tensors anywhere in memory (the experts' main_grad); overwritten or, with accumulate=True, added to.
    Experts without rows: zero, or left alone. promote: without effect here. Returns ``out``.
    """
    check_wgrad_operands(a_t, b_t, offsets)
    check_outs(out, a_t.scale.shape[0], (a_t.payload.shape[0], b_t.payload.shape[0]))
    check_result(out[0].dtype, promote)
    for expert, group in enumerate(_groups(offsets)):
        if accumulate and group.start == group.stop:
            continue
        y = a_t.payload[:, group].float() @ b_t.payload[:, group].float().t()  # [N, rows of this expert] @ [rows of this expert, K]
        y = y * a_t.scale[expert, :, None] * b_t.scale[expert]
        out[expert].copy_(out[expert].float() + y if accumulate else y)
    return out


def check_grouped_to(to: str) -> None:
    """ValueError unless the rows of experts can be folded to this. (One scale for all columns of an expert: no recipe asks for it.)"""
    if to not in ("column", "column_block"):
        raise ValueError(f"cannot fold the rows of experts to {to!r}; expected 'column' or 'column_block'")


def grouped_fold_transpose(q: ScaledTensor, offsets: torch.Tensor, block_expert: torch.Tensor, to: str = "column_block") -> GroupedTensor:
    """`fold_transpose` for every expert by itself: payload [cols, rows], scale [E, cols], constant along wgrad's contraction.

    q: [rows, cols] row (with tile_exponent), tile or micro (no global scale), cols a multiple of 4. to: "column_block" or "column", see
    `fold_transpose`. Columns of unused rows are not written.
    """
    check_grouped_to(to)
    experts = offsets.shape[0] - 1
    check_blocks(q.shape[0], block_expert, q.device)
    check_offsets(offsets, experts, q.device)
    rows, cols = q.shape
    payload = torch.zeros(cols, rows, dtype=q.payload.dtype, device=q.device)
    scale = torch.full((experts, cols), SMALLEST_SCALE, device=q.device)
    tiles = to_e8m0(tile_exponents(q))
    for expert, group in enumerate(_groups(offsets)):
        if group.start < group.stop:
            part = ScaledTensor(q.payload[group], q.scale[group], q.granularity, tile_exponent=tiles[group], global_scale=q.global_scale)
            folded = fold_transpose(part, to)
            payload[:, group], scale[expert] = folded.payload, folded.scale
    return GroupedTensor(payload, scale)


def check_tile_transpose(q: ScaledTensor, block_expert: torch.Tensor | None) -> None:
    """Raise unless `scaling_aware_transpose` takes these."""
    if q.granularity not in ("tile", "row", "micro") or (q.granularity == "row" and q.tile_exponent is None):
        raise ValueError(f"a {q.granularity} payload carries no tile exponents; quantise at tile, micro or row granularity")
    if q.global_scale is not None:
        raise ValueError("a payload under an FP32 global scale cannot be folded; quantise with global_scale=None")
    if block_expert is not None:
        check_blocks(q.shape[0], block_expert, q.device)


def scaling_aware_transpose(q: ScaledTensor, block_expert: torch.Tensor | None = None) -> GroupedTensor:
    """The transpose of FP8-Flow-MoE (Algorithm 1): every 128x128 tile takes its largest row scale. For comparison; no product reads its result.

    q: [rows, cols] tile (the paper's), row (with tile_exponent) or micro. Returns payload [cols, rows] and scale [ceil(rows / 128), cols]. Rounds correctly
    into the subnormals and keeps NaN, where the authors' code keeps the mantissa of what underflows and turns NaN into numbers.
    block_expert: int32 [rows / 128] of a grouped buffer, -1 = unused; what the result holds of unused blocks is undefined. No tile holds two experts.
    """
    check_tile_transpose(q, block_expert)
    rows, cols = q.shape
    used = rows if block_expert is None else int((block_expert >= 0).sum()) * TILE
    payload = torch.zeros(cols, rows, dtype=q.payload.dtype, device=q.device)
    scale = torch.full((-(-rows // TILE), cols), SMALLEST_SCALE, device=q.device)
    if used:
        part = ScaledTensor(q.payload[:used], q.scale[:used], q.granularity, tile_exponent=None if q.tile_exponent is None else q.tile_exponent[:used])
        blocks = torch.stack([tile.amax(dim=0) for tile in tile_exponents(part).split(TILE)])
        target = blocks.repeat_interleave(TILE, dim=1)[:, :cols]
        payload[:, :used] = _shift(part, target.repeat_interleave(TILE, dim=0)[:used]).t()
        scale[: target.shape[0]] = pow2(target)
    return GroupedTensor(payload, scale)
