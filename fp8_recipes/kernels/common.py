"""What the memory-bound kernels share: the FP8 cast, powers of two by exponent bits, allocation and device checks.

The cast is one place on purpose. On a GPU it is the hardware's conversion (round to nearest even, saturating). Under Triton's CPU interpreter
(``TRITON_INTERPRET=1``) it is integer arithmetic, because the interpreter's own conversion to float8e4nv goes wrong when rounding carries into the exponent.

NaN and Inf: the hardware saturates Inf, the reference turns it into NaN. ``x + x * 0`` is x for every finite x and NaN for the rest, in one instruction;
NaN is then dropped by ``max`` (so it enters no scale) and kept by the cast (as byte 0x7F).

FP32 subnormals are never flushed: Triton compiles without ftz, so a bf16 subnormal is scaled by 2**126 exactly as in the reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ..formats import E5M2, Format, exponent_of, format_of, is_power_of_two, to_e8m0
from ..tensor import MICRO, TILE, ScaledTensor


@triton.jit
def _probe() -> None:
    pass


IS_INTERPRETED = isinstance(_probe, InterpretedFunction)
"""Do kernels run under Triton's CPU interpreter (and therefore on CPU tensors)?"""
INTERPRETED = tl.constexpr(IS_INTERPRETED)
BAD_SCALE = 255
"""E8M0 NaN: stands for a scale that is not a power of two; its payload folds to NaN."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every output of every kernel is allocated here, so that tests can poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def check_device(x: torch.Tensor, name: str) -> None:
    """Raise unless the kernels can run on the device of ``x``."""
    if not (x.is_cpu if IS_INTERPRETED else x.is_cuda):
        why = "Triton's interpreter (TRITON_INTERPRET=1) runs on CPU tensors" if IS_INTERPRETED else "Triton kernels run on CUDA tensors"
        raise ValueError(f"{name} is on {x.device}: {why}; fp8_recipes.ops chooses kernel or reference by device")


def check_not_empty(x: torch.Tensor, name: str) -> None:
    if x.numel() == 0:
        raise ValueError(f"cannot take scales of an empty tensor: {name} has shape {tuple(x.shape)}")


def check_payload(q: ScaledTensor) -> None:
    """Raise unless the kernels can read the payload of ``q``: on their device, its rows one behind the other."""
    check_device(q.payload, "payload")
    if not q.payload.is_contiguous():
        raise ValueError(f"payload of shape {tuple(q.shape)} and strides {q.payload.stride()} is not contiguous; call .contiguous()")


def is_e5m2(fmt: Format) -> bool:
    """The kernels' format switch."""
    return fmt.name == E5M2.name


def scale_bytes(q: ScaledTensor) -> torch.Tensor:
    """Scales of ``q`` as E8M0 bytes in the shape of ``q.scale``; `BAD_SCALE` where a scale is not a normal power of two. No host synchronisation."""
    if q.granularity == "micro":
        return q.scale
    return torch.where(is_power_of_two(q.scale), to_e8m0(exponent_of(q.scale)), BAD_SCALE)


@functools.cache
def source_constants(granularity: str, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels' constants for a payload's scales and format."""
    return {"GROUP": {"row": 0, "tile": TILE, "micro": MICRO}[granularity], "E5M2": is_e5m2(format_of(dtype))}


def tiles_of(cols: int) -> int:
    return -(-cols // TILE)


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). Triton's own is a wrapper for constexprs that takes microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


# --- device functions ---------------------------------------------------------------------------------------------------------------------------


# Two instructions for two values; the compiler's own conversion extracts the upper one first.
_BF16_PAIR = tl.constexpr("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000; }")


@triton.jit
def to_fp32(x, AGAIN: tl.constexpr = False):
    """Input values (bf16, fp16, fp32) as fp32, exactly. The interpreter's own conversion of bf16 subnormals is wrong.

    AGAIN: convert here, even if the same values were converted before, so that in between only the 16-bit form takes registers.
    """
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_BF16_PAIR, "=r,=r,r", [x], dtype=tl.float32, is_pure=not AGAIN, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def finite_or_nan(x):
    """x, with Inf replaced by NaN."""
    return x + x * 0.0


@triton.jit
def pow2(exponent):
    """2**exponent in fp32; int32 exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_copies(ptr, value, copies):
    """``value`` into the first ``copies`` elements of ``ptr``, by one program."""
    for start in range(0, copies, 1024):
        offset = start + tl.arange(0, 1024)
        tl.store(ptr + offset, value + tl.zeros([1024], tl.float32), mask=offset < copies)


@triton.jit
def scale_exponent(amax, E5M2: tl.constexpr):
    """Exponent of the smallest power of two s with amax <= fmt.max * s, from the bits of amax (fp32 >= 0): `formats.scale_exponent_from_amax`."""
    # A mantissa above 0x600000 carries into the exponent field. The largest finite amax gives 120, so only the lower end needs a clamp.
    field = ((amax.to(tl.uint32, bitcast=True) + 0x1FFFFF) >> 23).to(tl.int32)
    max_exponent: tl.constexpr = 15 if E5M2 else 8
    return tl.maximum(field, max_exponent + 1) - (127 + max_exponent)


@triton.jit
def _encode_portable(v, E5M2: tl.constexpr):
    """fp32 -> FP8 byte by integer arithmetic: nearest even, saturating (Inf too), NaN -> 0x7F."""
    mantissa: tl.constexpr = 2 if E5M2 else 3
    bias: tl.constexpr = 15 if E5M2 else 7
    max_code: tl.constexpr = 0x7B if E5M2 else 0x7E
    drop: tl.constexpr = 23 - mantissa
    bits = v.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + ((1 << (drop - 1)) - 1) + ((magnitude >> drop) & 1)
    normal = (rounded >> drop) - ((127 - bias) << mantissa)
    # Subnormal results: adding 2**(23 + exponent of the smallest subnormal) makes the fp32 adder round at that quantum.
    magic: tl.constexpr = float(2 ** (23 + 1 - bias - mantissa))
    sum_bits = (magnitude.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True)
    subnormal = sum_bits - ((127 + 23 + 1 - bias - mantissa) << 23)
    code = tl.where(magnitude < ((127 + 1 - bias) << 23), subnormal, normal)
    code = tl.minimum(code, max_code) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def _decode_portable(byte, E5M2: tl.constexpr):
    """FP8 byte -> fp32; NaN and Inf codes -> NaN."""
    mantissa: tl.constexpr = 2 if E5M2 else 3
    first_nan: tl.constexpr = 0x7C if E5M2 else 0x7F
    rebias: tl.constexpr = float(2 ** (112 if E5M2 else 120))
    code = byte.to(tl.int32)
    magnitude = code & 0x7F
    # The sign goes in as a bit: Triton's unary minus is 0 - x, which loses the sign of zero.
    value = ((magnitude << (23 - mantissa)) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * rebias
    return tl.where(magnitude >= first_nan, float("nan"), value)


@triton.jit
def encode(v, E5M2: tl.constexpr):
    """fp32 -> FP8 byte (uint8): nearest even, saturating, NaN -> 0x7F. Pass values through `finite_or_nan` first where Inf must become NaN."""
    if INTERPRETED:
        return _encode_portable(v, E5M2)
    if E5M2:
        return v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def decode(byte, E5M2: tl.constexpr):
    """FP8 byte (uint8) -> fp32; NaN and Inf codes -> NaN."""
    if INTERPRETED:
        return _decode_portable(byte, E5M2)
    if E5M2:
        return finite_or_nan(byte.to(tl.float8e5, bitcast=True).to(tl.float32))
    return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def scale_byte(source_ptr, row, column, rows, cols, GROUP: tl.constexpr):
    """E8M0 byte of the scale of the values at [row, column] (broadcastable); 255 where it is bad. GROUP 0: fp32 scale per row; else E8M0 per
    GROUP columns."""
    if GROUP == 0:
        bits = tl.load(source_ptr + row, mask=row < rows, other=1.0).to(tl.int32, bitcast=True)
        byte = bits >> 23  # negative if the sign is set
        return tl.where(((bits & 0x7FFFFF) == 0) & (byte > 0), byte, 255)
    else:
        groups = (cols + GROUP - 1) // GROUP
        return tl.load(source_ptr + row * groups + column // GROUP, mask=(row < rows) & (column < cols), other=127).to(tl.int32)


@triton.jit
def fetch(ptr, count, COUNT: tl.constexpr):
    """The first ``count`` of COUNT fp32 values at ``ptr`` on their way into L1, a line of 32 at a time, without waiting for them."""
    if not INTERPRETED:
        first = tl.arange(0, COUNT // 32) * 32
        lines = ptr + tl.where(first < count, first, 0)
        tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
