"""Launch a Triton kernel with its argument binding done once.

Triton specialises on every argument at every launch, in Python: tens of microseconds on the host, more than many of these kernels take on the GPU, and a
layer of a 7B model launches thirty of them per step. Here the specialisation is a small tuple computed from what Triton looks at (dtypes, 16-byte alignment
of pointers, divisibility of integers), and a launch with a known tuple goes straight to the compiled kernel. An unknown one goes through Triton, so nothing
is assumed that Triton would have checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import IS_INTERPRETED
from .first_product import compiling

_compiled: dict[tuple[Any, ...], _Ready] = {}
_INT32 = 2**31
_ALIGNMENT = 16
"""Bytes that Triton's loads and TMA want of an address."""


class _Ready(NamedTuple):
    """A compiled kernel and how it is started."""

    kernel: Any
    compiled: Any
    start: Any
    """Its launcher: grid, stream, function, ``options``, then what Triton hands it."""
    options: tuple[Any, ...]
    trailing: tuple[Any, ...]
    """Values of the constexpr parameters."""


_KNOWN_LAUNCHER = triton.__version__.startswith("3.6.")
"""Whose launcher object is known to do nothing but what `_ready` leaves out. With another version every launch goes through that object."""


def _ready(kernel: Any, compiled: Any, trailing: tuple[Any, ...]) -> _Ready:
    """Past Triton's launcher object to the C function behind it, for kernels that need no scratch memory: the object would only find that out again."""
    run = compiled.run
    if _KNOWN_LAUNCHER and getattr(run, "global_scratch_size", None) == 0 and getattr(run, "profile_scratch_size", None) == 0:
        return _Ready(kernel, compiled, run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None), trailing)
    return _Ready(kernel, compiled, run, (), trailing)


def _specialize(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """(what Triton's compiled code depends on, values for its launcher) of the run-time arguments. Tensors become addresses, which the launcher takes as
    they are; for a tensor it would ask the driver about every pointer."""
    key: list[Any] = []
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            key.append(arg.dtype)
            key.append(address % _ALIGNMENT)
            values.append(address)
            continue
        kind = type(arg)
        if kind is int:  # the strings stand for themselves: an integer in the key is an address or a block
            if arg == 1:
                key.append("1")
            elif -_INT32 <= arg < _INT32:
                key.append("i32" if arg % 16 else "i32 x 16")
            else:
                key.append("i64" if arg % 16 else "i64 x 16")
        elif kind is float or arg is None:
            key.append(kind)
        elif kind.__name__ == "TensorDescriptor":  # Triton's or Gluon's, whose layout follows from dtype and block
            key += (arg.base.dtype, *arg.block_shape)
        else:
            raise TypeError(f"cannot launch a kernel with a run-time argument of type {kind.__name__}; pass it as a constant")
        values.append(arg)
    return key, values


_valid_descriptors: set[tuple[Any, ...]] = set()


def matrix_descriptor(base: torch.Tensor, rows: int, cols: int, block: tuple[int, int]) -> TensorDescriptor:
    """TMA descriptor of the contiguous [rows, cols] matrix that starts where ``base`` does, read or written in ``block``.

    Triton checks what depends on the shape alone when a shape is first met, the address at every call: a descriptor is made for every operand of every product.
    """
    key = (base.dtype, rows, cols, block)
    if key not in _valid_descriptors:
        descriptor = TensorDescriptor(base, [rows, cols], [cols, 1], list(block))
        _valid_descriptors.add(key)
        return descriptor
    if base.data_ptr() % _ALIGNMENT:
        raise ValueError(f"TMA needs an address that is a multiple of {_ALIGNMENT}, got {base.data_ptr():#x}; use .clone() of the view")
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(base=base, shape=[rows, cols], strides=[cols, 1], block_shape=list(block), padding="zero")
    return descriptor


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
    key = (id(kernel), device, *specialization, *constants, *constants.values())  # the kernel's own hash takes a lock and a Python call
    known = _compiled.get(key)
    if known is None:
        with compiling(kernel, constants):
            compiled = kernel[grid](*args, **constants)
        _compiled[key] = _ready(kernel, compiled, tuple(constants[p.name] for p in kernel.params[len(args) :]))
        return
    _, compiled, start, options, trailing = known
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    enter, leave = _active(knobs.runtime.launch_enter_hook), _active(knobs.runtime.launch_exit_hook)
    metadata = None if enter is None and leave is None else compiled.launch_metadata((x, y, z), stream, *args, *trailing)
    start(x, y, z, stream, compiled.function, *options, compiled.packed_metadata, metadata, enter, leave, *values, *trailing)
