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

_compiled: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
_INT32 = 2**31


def _specialize(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """(what Triton's compiled code depends on, values for its launcher) of the run-time arguments. Tensors become addresses, which the launcher takes as
    they are; for a tensor it would ask the driver about every pointer."""
    key: list[Any] = []
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            key += (arg.dtype, address % 16)
            values.append(address)
            continue
        kind = type(arg)
        if kind is int:
            key += (kind, arg == 1, arg % 16 == 0, -_INT32 <= arg < _INT32)
        elif kind is float or arg is None:
            key.append(kind)
        elif kind is TensorDescriptor:
            key += (arg.base.dtype, *arg.block_shape)
        else:
            raise TypeError(f"cannot launch a kernel with a run-time argument of type {kind.__name__}; pass it as a constant")
        values.append(arg)
    return key, values


def _active(hook: Any) -> Any:
    """A profiler's launch hook, or None: Triton calls even an empty chain of hooks, and gathers arguments for it."""
    return hook if getattr(hook, "calls", hook) else None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the first argument (a tensor or a tensor descriptor).

    args: the kernel's run-time arguments, all of them, in order. constants: its constexpr parameters and Triton's launch options (num_warps, num_stages, ...).
    """
    if IS_INTERPRETED:
        kernel[grid](*args, **constants)
        return
    device = torch.cuda.current_device()
    wanted = (args[0] if isinstance(args[0], torch.Tensor) else args[0].base).get_device()
    if wanted != device:
        with torch.cuda.device(wanted):
            launch(kernel, grid, *args, **constants)
        return
    specialization, values = _specialize(args)
    key = (id(kernel), device, *specialization, *constants.items())  # the kernel's own hash takes a lock and a Python call
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        _compiled[key] = kernel, compiled, tuple(constants[p.name] for p in kernel.params[len(args) :])
        return
    _, compiled, trailing = known
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    enter, leave = _active(knobs.runtime.launch_enter_hook), _active(knobs.runtime.launch_exit_hook)
    metadata = None if enter is None and leave is None else compiled.launch_metadata((x, y, z), stream, *args, *trailing)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *values, *trailing)
