"""How a known kernel is started: the same arguments as through Triton's launcher object, and keys that tell apart whatever is compiled apart."""

from __future__ import annotations

import types
from importlib import import_module

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

module = import_module("fp8_recipes.kernels.launch")


def launcher(scratch: int):
    """Triton's launcher object around a function that records what it is given."""
    driver = pytest.importorskip("triton.backends.nvidia.driver", reason="this Triton has no NVIDIA backend")
    run, seen = object.__new__(driver.CudaLauncher), []
    run.launch = lambda *args: seen.append(args)
    run.num_ctas, run.global_scratch_size, run.global_scratch_align = 1, scratch, 128
    run.profile_scratch_size, run.profile_scratch_align = 0, 1
    run.launch_cooperative_grid, run.launch_pdl = False, True
    return run, seen


def test_an_unknown_version_starts_through_triton(monkeypatch):
    monkeypatch.setattr(module, "_KNOWN_LAUNCHER", False)
    run, _ = launcher(0)
    assert module._ready(None, types.SimpleNamespace(run=run), ()).start is run


@pytest.mark.skipif(not module._KNOWN_LAUNCHER, reason="this Triton's launcher is not known, so it is not passed by")
def test_a_kernel_without_scratch_memory_starts_as_through_triton():
    run, seen = launcher(0)
    ready = module._ready(None, types.SimpleNamespace(run=run), (128,))
    grid, rest = (3, 2, 1, 77, 99), ("packed", None, None, None, 4096, 5, 128)
    run(*grid, *rest)
    ready.start(*grid, *ready.options, *rest)
    assert ready.start is run.launch and len(seen) == 2 and seen[0] == seen[1]


def test_a_kernel_with_scratch_memory_starts_through_triton():
    run, _ = launcher(64)
    ready = module._ready(None, types.SimpleNamespace(run=run), ())
    assert ready.start is run and ready.options == ()


def test_specialisation():
    def key(*args):
        return module._specialize(args)[0]

    buffer = torch.zeros(64, dtype=torch.uint8)
    numbers = [1, 2, 16, 2**31, 2**31 + 1, -(2**31) - 1, 1.0, None]
    keys = [tuple(key(n)) for n in numbers]
    assert len(set(keys)) == len(numbers) - 1 and keys[4] == keys[5], "64 bits, no multiple of 16: both the same"
    assert key(3) == key(5) and key(32) == key(-48) and key(buffer) != key(buffer[1:]) and key(buffer) == key(buffer[16:])
    assert key(buffer) != key(buffer.view(torch.int8))
    assert module._specialize((buffer, 7))[1] == [buffer.data_ptr(), 7]
    with pytest.raises(TypeError, match="type str; pass it as a constant"):
        key("word")


def test_specialisation_of_gluons_descriptors():
    gluon = pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this Triton has no Gluon for Hopper")
    layout = import_module("triton.experimental.gluon.language").NVMMASharedLayout(128, 8, 2)
    bases = [torch.zeros(2, 32, dtype=dtype) for dtype in (torch.uint8, torch.int8)]
    made = [gluon.TensorDescriptor.from_tensor(base, [rows, 16], layout) for base in bases for rows in (1, 2)]
    keys, values = zip(*(module._specialize((d,)) for d in made), strict=True)
    assert len(set(map(tuple, keys))) == 4 and [v[0] is d for v, d in zip(values, made, strict=True)] == [True] * 4


def test_matrix_descriptor():
    """The first of a shape and the later ones are what Triton makes; what does not start on 16 bytes is refused by both."""
    base = torch.zeros(64 * 128 + 16, dtype=torch.uint8)
    for start in (0, 16):
        made = module.matrix_descriptor(base[start:], 64, 128, (32, 128))
        usual = TensorDescriptor.from_tensor(base[start : start + 64 * 128].view(64, 128), [32, 128])
        assert type(made) is TensorDescriptor and made.base.data_ptr() == usual.base.data_ptr()
        assert (list(made.shape), list(made.strides), made.block_shape, made.padding) == (list(usual.shape), list(usual.strides), [32, 128], usual.padding)
    with pytest.raises(ValueError, match="TMA needs an address that is a multiple of 16"):
        module.matrix_descriptor(base[8:], 64, 128, (32, 128))
    with pytest.raises(AssertionError, match="aligned"):
        module.matrix_descriptor(base, 64, 120, (32, 128))
