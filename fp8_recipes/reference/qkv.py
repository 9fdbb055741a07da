"""From the joint projection of queries, keys and values to what attention takes: split, ``tanh(alpha x)`` and the rotary embedding on queries and keys.

In fp32 throughout, rounded once: other last places than a bound and a rotation with a rounding between them.
"""

from __future__ import annotations

import torch

from ..tensor import check_matrix

HEAD_SIZES = (16, 32, 64, 128, 256)
"""Sizes of a head that the kernels take; the reference takes any even one."""
LARGEST_ANGLE = 2**20
"""Radians up to which the kernels' cosines and sines are exact to 2e-7."""


def check_qkv(mixed: torch.Tensor, alphas: tuple[torch.Tensor, torch.Tensor], angles: torch.Tensor, heads_per_group: int) -> tuple[int, int]:
    """Raise unless these are inputs of `qkv_tanh_rotary`; returns (groups, size of a head)."""
    check_matrix(mixed, "mixed")
    for name, alpha in zip(("alpha_q", "alpha_k"), alphas, strict=True):
        if alpha.dim() != 0 or alpha.dtype not in (torch.float32, mixed.dtype) or alpha.device != mixed.device:
            given = f"{alpha.dtype} {tuple(alpha.shape)} on {alpha.device}"
            raise ValueError(f"{name} must be 0-dim, float32 or {mixed.dtype}, on {mixed.device}, got {given}")
    if angles.dim() != 2 or angles.dtype != torch.float32 or angles.device != mixed.device or angles.stride(1) != 1:
        given = f"{angles.dtype} {tuple(angles.shape)}, strides {angles.stride()}, on {angles.device}"
        raise ValueError(f"angles must be fp32 [positions, half of a head] with contiguous rows on {mixed.device}, got {given}")
    head, (rows, features) = 2 * angles.shape[1], mixed.shape
    if heads_per_group < 1 or head < 2 or features == 0 or features % (head * (heads_per_group + 2)):
        raise ValueError(f"mixed has {features} features, not groups of {heads_per_group} query heads, a key and a value of {head} each")
    if angles.shape[0] == 0 or rows % angles.shape[0]:
        raise ValueError(f"mixed has {rows} rows, not a whole number for each of {angles.shape[0]} positions")
    return features // (head * (heads_per_group + 2)), head


def check_gradients(gradients: tuple[torch.Tensor, ...], mixed: torch.Tensor, groups: int, head: int, heads_per_group: int) -> None:
    """Raise unless (dq, dk, dv) have shape and dtype of what `qkv_tanh_rotary` returned."""
    for name, gradient, heads in zip(("dq", "dk", "dv"), gradients, (heads_per_group, 1, 1), strict=True):
        shape = (mixed.shape[0], groups * heads * head)
        if tuple(gradient.shape) != shape or gradient.dtype != mixed.dtype or gradient.device != mixed.device or not gradient.is_contiguous():
            given = f"{gradient.dtype} {tuple(gradient.shape)}, strides {gradient.stride()}, on {gradient.device}"
            raise ValueError(f"{name} must be contiguous {mixed.dtype} {shape} on {mixed.device}, got {given}")


def _cos_sin(angles: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 1, 1, half of a head] each; ``rows / positions`` neighbouring rows share a position."""
    of_rows = angles.repeat_interleave(rows // angles.shape[0], dim=0)[:, None, None]
    return torch.cos(of_rows), torch.sin(of_rows)


def qkv_tanh_rotary(
    mixed: torch.Tensor, alpha_q: torch.Tensor, alpha_k: torch.Tensor, angles: torch.Tensor, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [rows, groups * heads_per_group * E], k [rows, groups * E], v [rows, groups * E]), contiguous, in mixed's dtype.

    mixed: [rows, groups * (heads_per_group + 2) * E], bf16, fp16 or fp32, per group its query heads, its key, its value (Megatron's order).
    alpha_q, alpha_k: 0-dim fp32 or as mixed. angles: [positions, E / 2] fp32 with contiguous rows; row r of mixed is at position ``r // (rows / positions)``.

    With t = tanh(alpha x) of one head and its halves t1, t2: ``[t1 cos - t2 sin, t2 cos + t1 sin]`` in fp32, rounded once. Values are copied.
    """
    groups, head = check_qkv(mixed, (alpha_q, alpha_k), angles, heads_per_group)
    rows = mixed.shape[0]
    cos, sin = _cos_sin(angles, rows)
    q, k, v = mixed.view(rows, groups, heads_per_group + 2, head).split((heads_per_group, 1, 1), dim=2)

    def bounded_and_rotated(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        first, second = torch.tanh(alpha.float() * x.float()).chunk(2, dim=-1)
        y = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return y.to(mixed.dtype).flatten(1)

    return bounded_and_rotated(q, alpha_q), bounded_and_rotated(k, alpha_k), v.clone(memory_format=torch.contiguous_format).flatten(1)


def qkv_tanh_rotary_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    mixed: torch.Tensor,
    alpha_q: torch.Tensor,
    alpha_k: torch.Tensor,
    angles: torch.Tensor,
    heads_per_group: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of mixed in its dtype, of alpha_q, of alpha_k, 0-dim in their dtypes, summed in fp64) from dq, dk, dv as `qkv_tanh_rotary` returns q, k, v.

    The rotation's transpose, then ``dx = dt (1 - t^2) alpha`` and ``dalpha = sum dt (1 - t^2) x`` as `tanh_bound_backward`, in fp32; dx is rounded once.
    """
    groups, head = check_qkv(mixed, (alpha_q, alpha_k), angles, heads_per_group)
    check_gradients((dq, dk, dv), mixed, groups, head, heads_per_group)
    rows = mixed.shape[0]
    cos, sin = _cos_sin(angles, rows)
    q, k, _ = mixed.view(rows, groups, heads_per_group + 2, head).split((heads_per_group, 1, 1), dim=2)

    def gradients(dy: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = dy.view(x.shape).float().chunk(2, dim=-1)
        dt = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
        xf, a = x.float(), alpha.float()
        e = torch.exp(-2 * (a * xf).abs())
        dz = dt * (4 * e / (1 + e).square())
        return (dz * a).to(mixed.dtype), (dz * xf).sum(dtype=torch.float64).to(alpha.dtype)

    (dq_in, dalpha_q), (dk_in, dalpha_k) = gradients(dq, q, alpha_q), gradients(dk, k, alpha_k)
    dmixed = torch.cat((dq_in, dk_in, dv.view(rows, groups, 1, head)), dim=2)
    return dmixed.view(mixed.shape), dalpha_q, dalpha_k
