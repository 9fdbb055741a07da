"""Grouped products without a fold: every scale stays where it was taken, 1x128 tiles included, and is multiplied in before the sum.

The check beside `grouped_gemm` and `grouped_wgrad`, as `gemm_exact` is beside `gemm`: what separates a folded product from these is the fold alone, what
separates these from float64 is one rounding of the result. They run expert by expert at bf16 speed and bring the index tensors to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tensor import TILE, ScaledTensor
from .grouped import GroupedTensor, Matrices, _groups, check_blocks, check_offsets
from .quantize import dequantize


def _values(q: ScaledTensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Those rows of q without a global scale: exact in bf16 on a GPU (powers of two), fp32 on a CPU."""
    if q.granularity == "block":
        raise ValueError("block scales are shared by 128 rows; a grouped operand needs row, tile, micro or tensor granularity")
    scale = q.scale if q.granularity == "tensor" else q.scale[rows]
    return dequantize(ScaledTensor(q.payload[rows], scale, q.granularity), torch.bfloat16 if q.device.type == "cuda" else torch.float32)


def _weight(b: GroupedTensor | Sequence[ScaledTensor], expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """([N, K] values, global scale) of one expert."""
    if isinstance(b, GroupedTensor):
        scale = b.scale[expert]
        q = ScaledTensor(b.payload[expert], scale, "row" if scale.dim() else "tensor")
    else:
        q = b[expert]
    plain = ScaledTensor(q.payload, q.scale, q.granularity)
    return dequantize(plain, torch.bfloat16 if q.device.type == "cuda" else torch.float32), q.global_scale


def grouped_gemm_exact(
    a: ScaledTensor,
    b: GroupedTensor | Sequence[ScaledTensor],
    block_expert: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``dequantize(a)[m] @ dequantize(b[e])^T`` with e the expert of row m, summed in fp32, at any granularity: `grouped_gemm` without a fold.

    a: [rows, K], row, tile, micro (also under a global scale) or tensor. b: [E, N, K], or E tensors [N, K] of any granularity, block included.
    block_expert: int32 [rows / 128], -1 = unused. Returns [rows, N] (``out`` if given); rows of unused blocks are not written.
    """
    experts = b.payload.shape[0] if isinstance(b, GroupedTensor) else len(b)
    n, k = b.payload.shape[1:] if isinstance(b, GroupedTensor) else b[0].shape
    if a.shape[1] != k:
        raise ValueError(f"contraction lengths differ: a is {tuple(a.shape)}, an expert's b is {(n, k)}; both must end in K")
    check_blocks(a.shape[0], block_expert, a.device)
    if out is not None and tuple(out.shape) != (a.shape[0], n):
        raise ValueError(f"out must have shape {(a.shape[0], n)}, got {tuple(out.shape)}")
    out = torch.zeros(a.shape[0], n, dtype=out_dtype, device=a.device) if out is None else out
    of_row = block_expert.repeat_interleave(TILE)
    for expert in range(experts):
        mine = (of_row == expert).nonzero().flatten()
        weight, of_weight = _weight(b, expert)
        y = (_values(a, mine) @ weight.t()).float()  # [rows of this expert, K] @ [K, N]
        for global_scale in (a.global_scale, of_weight):
            y = y if global_scale is None else y * global_scale
        out[mine] = y.to(out.dtype)
    return out


def grouped_wgrad_exact(a: ScaledTensor, b: ScaledTensor, offsets: torch.Tensor, *, out: Matrices, accumulate: bool = False) -> Matrices:
    """``dw[e] = dequantize(a)^T dequantize(b)`` over the rows of expert e, summed in fp32: `grouped_wgrad` without transposed folds.

    a: [rows, N] (the output's gradient), b: [rows, K] (the input), as they were quantised: row, tile, micro or tensor. offsets: int32 [E + 1].
    out: [E, N, K], or E matrices [N, K]; overwritten or, with accumulate=True, added to. Experts without rows: zero, or left alone. Returns ``out``.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"row counts differ: a is {tuple(a.shape)}, b is {tuple(b.shape)}; both must be [rows, features]")
    experts, shape = len(out), (a.shape[1], b.shape[1])
    check_offsets(offsets, experts, a.device)
    for e in range(experts):
        if tuple(out[e].shape) != shape:
            raise ValueError(f"out[{e}] must have shape {shape}, got {tuple(out[e].shape)}")
    for expert, group in enumerate(_groups(offsets)):
        if accumulate and group.start == group.stop:
            continue
        y = (_values(a, group).t() @ _values(b, group)).float()  # [N, rows of this expert] @ [rows of this expert, K]
        for q in (a, b):
            y = y if q.global_scale is None else y * q.global_scale
        out[expert].copy_(out[expert].float() + y if accumulate else y)
    return out
