"""cuBLASLt's FP8 product with one scale per row and column: what ``torch._scaled_mm`` has inside but does not hand out.

``torch._scaled_mm`` only makes new bf16 results and searches for an algorithm at every call. Here it is searched once per kind of product, and for wgrad
``main_grad += dy^T x`` is added in fp32 in the product's own epilogue (beta = 1), which cuBLASLt 12.9 and later do with outer-vector scales on compute
capability 9.0. The library is the one that torch has already loaded; the calls go through ctypes, about ten per distinct product and three per use.

cuBLAS is column-major: our row-major ``y[M, N] = a[M, K] b[N, K]^T`` is its ``D[N, M] = op(A)[N, K] B[K, M]`` with A = b transposed and B = a.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ..tensor import ScaledTensor

_WORKSPACE_BYTES = 32 * 2**20
"""What NVIDIA recommends for Hopper."""
_COMPUTE_32F = 68
_TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
_TRANSA, _A_SCALE, _B_SCALE, _FAST_ACCUM, _A_MODE, _B_MODE = 3, 17, 18, 25, 31, 32
_OUTER_VECTOR = 3
_MAX_WORKSPACE = 1
_MIN_ALIGNMENT = (5, 6, 7, 8)
_NOT_SUPPORTED = 15

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class _HeuristicResult(ctypes.Structure):
    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """The cuBLASLt that torch runs on."""
    major = (torch.version.cuda or "0").split(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


def _call(name: str, *args: Any) -> None:
    status = getattr(_library(), name)(*args)
    if status:
        raise RuntimeError(f"{name} failed with cublasStatus {status}")


@functools.cache
def _workspace(device: int, stream: int) -> torch.Tensor:
    """Scratch of one stream: products on one stream never overlap."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


@dataclass
class _Plan:
    """Descriptors and algorithm of one kind of product. Scale pointers are set at every use, hence one plan per thread."""

    desc: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    algo: _HeuristicResult


@dataclass(frozen=True)
class _Kind:
    """What a plan depends on. alignment: of the addresses of b, a and out, in bytes, at most 256."""

    thread: int
    device: int
    shape: tuple[int, int, int]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    alignment: tuple[int, int, int]
    fast: bool


@functools.cache
def _plan(kind: _Kind) -> _Plan | None:
    """The plan that cuBLASLt recommends, or None if it has no algorithm for this product."""
    return next(iter(candidates(kind, 1)), None)


def candidates(kind: _Kind, count: int) -> list[_Plan]:
    """Up to ``count`` plans for one kind of product, the fastest by cuBLASLt's own model first."""
    (m, n, k), (b_dtype, a_dtype, out_dtype) = kind.shape, kind.dtypes
    desc, pref = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cublasLtMatmulDescCreate", ctypes.byref(desc), _COMPUTE_32F, _TYPES[torch.float32])
    one, mode, speed = ctypes.c_int32(1), ctypes.c_int32(_OUTER_VECTOR), ctypes.c_int8(kind.fast)
    for attribute, setting in ((_TRANSA, one), (_A_MODE, mode), (_B_MODE, mode), (_FAST_ACCUM, speed)):
        _call("cublasLtMatmulDescSetAttribute", desc, attribute, ctypes.byref(setting), ctypes.sizeof(setting))
    unread = ctypes.c_void_p(256)  # the search wants scale pointers to be there, and reads none
    for attribute in (_A_SCALE, _B_SCALE):
        _call("cublasLtMatmulDescSetAttribute", desc, attribute, ctypes.byref(unread), 8)
    layouts = []
    for dtype, rows, cols in ((b_dtype, k, n), (a_dtype, k, m), (out_dtype, n, m)):
        layout = ctypes.c_void_p()
        _call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), _TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(cols), ctypes.c_int64(rows))
        layouts.append(layout)
    _call("cublasLtMatmulPreferenceCreate", ctypes.byref(pref))
    size = ctypes.c_uint64(_WORKSPACE_BYTES)
    _call("cublasLtMatmulPreferenceSetAttribute", pref, _MAX_WORKSPACE, ctypes.byref(size), 8)
    at_b, at_a, at_out = kind.alignment
    for attribute, value in zip(_MIN_ALIGNMENT, (at_b, at_a, at_out, at_out), strict=True):
        _call("cublasLtMatmulPreferenceSetAttribute", pref, attribute, ctypes.byref(ctypes.c_uint32(value)), 4)
    results, found = (_HeuristicResult * count)(), ctypes.c_int(0)
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    at, bt, dt = layouts
    status = _library().cublasLtMatmulAlgoGetHeuristic(handle, desc, at, bt, dt, dt, pref, count, results, ctypes.byref(found))
    _call("cublasLtMatmulPreferenceDestroy", pref)
    if status not in (0, _NOT_SUPPORTED):
        raise RuntimeError(f"cublasLtMatmulAlgoGetHeuristic failed with cublasStatus {status}")
    return [] if status else [_Plan(desc, (at, bt, dt), result) for result in results[: found.value] if not result.state]


def _alignment(t: torch.Tensor) -> int:
    address = t.data_ptr()
    return min(address & -address, 256)


def plan_for(a: ScaledTensor, b: ScaledTensor, out: torch.Tensor, fast: bool) -> _Plan | None:
    """The plan for ``out (+)= a b^T``, or None if cuBLASLt has none. Row scales on both sides; searched once per kind of product."""
    return _plan(kind_of(a, b, out, fast))


def kind_of(a: ScaledTensor, b: ScaledTensor, out: torch.Tensor, fast: bool) -> _Kind:
    shape = (a.shape[0], b.shape[0], a.shape[1])
    dtypes = (b.payload.dtype, a.payload.dtype, out.dtype)
    alignment = (_alignment(b.payload), _alignment(a.payload), _alignment(out))
    return _Kind(threading.get_ident(), out.device.index, shape, dtypes, alignment, fast)


Operand = tuple[torch.Tensor, torch.Tensor]
"""(payload [rows, K], scale [rows] fp32), contiguous."""


def product(plan: _Plan, a: Operand, b: Operand, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    """``out = a b^T`` or ``out += a b^T``. a: [M, K], b: [N, K], out: [M, N] fp32 or bf16, contiguous."""
    stream = torch._C._cuda_getCurrentRawStream(out.device.index)
    for attribute, operand in ((_A_SCALE, b), (_B_SCALE, a)):
        pointer = ctypes.c_void_p(operand[1].data_ptr())
        _call("cublasLtMatmulDescSetAttribute", plan.desc, attribute, ctypes.byref(pointer), 8)
    at, bt, dt = plan.layouts
    destination, scratch = ctypes.c_void_p(out.data_ptr()), _workspace(out.device.index, stream)
    _call(
        "cublasLtMatmul",
        ctypes.c_void_p(torch.cuda.current_blas_handle()),
        plan.desc,
        ctypes.byref(_ONE),
        ctypes.c_void_p(b[0].data_ptr()),
        at,
        ctypes.c_void_p(a[0].data_ptr()),
        bt,
        ctypes.byref(_ONE if accumulate else _ZERO),
        destination,
        dt,
        destination,
        dt,
        ctypes.byref(plan.algo),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_size_t(_WORKSPACE_BYTES),
        ctypes.c_void_p(stream),
    )
    return out
