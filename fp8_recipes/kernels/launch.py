"""Launch a Triton kernel with its argument binding done once.

Triton specialises on every argument at every launch, in Python: tens of microseconds on the host, more than many of these kernels take on the GPU, and a
layer of a 7B model launches thirty of them per step. Here the specialisation is a small tuple computed from what Triton looks at (dtypes, 16-byte alignment
of pointers, divisibility of integers), and a launch with a known tuple goes straight to the compiled kernel. An unknown one goes through Triton, so nothing
is assumed that Triton would have checked.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import IS_INTERPRETED

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_INT32 = 2**31


def _specialization(arg: Any) -> Any:
    """What Triton's compiled code depends on, for one run-time argument."""
    kind = type(arg)
    if kind is int:
        return arg == 1, arg % 16 == 0, -_INT32 <= arg < _INT32
    if kind is float or arg is None:
        return kind
    if kind is TensorDescriptor:
        return arg.base.dtype, tuple(arg.block_shape)
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    raise TypeError(f"cannot launch a kernel with a run-time argument of type {kind.__name__}; pass it as a constant")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``.

    args: the kernel's run-time arguments, all of them, in order. constants: its constexpr parameters and Triton's launch options (num_warps, num_stages, ...).
    """
    if IS_INTERPRETED:
        kernel[grid](*args, **constants)
        return
    device = torch.cuda.current_device()
    key = (kernel, device, *map(_specialization, args), *constants.items())
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        trailing = tuple(constants[p.name] for p in kernel.params[len(args) :])
        _compiled[key] = compiled, trailing
        return
    compiled, trailing = known
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    bound = (*args, *trailing)
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, compiled.launch_metadata((x, y, z), stream, *bound),
        knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound,
    )  # fmt: skip
