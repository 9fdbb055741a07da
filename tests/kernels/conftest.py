"""Kernel tests run on a GPU if there is one, else on the CPU under Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fp8_recipes.kernels import common  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs one Hopper GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as bytes 0x7F: NaN in both FP8 formats, 3.4e38 in fp32, so that an element no kernel wrote cannot pass."""

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        t = torch.empty(shape, dtype=dtype, device=device)
        t.reshape(-1).view(torch.uint8).fill_(0x7F)
        return t

    monkeypatch.setattr(common, "empty", poisoned)


@pytest.fixture
def tma_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter loads and stores through descriptors but lacks their reduction: give it one (add is all we use)."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_descriptor_reduce(self, kind, desc, value, indices):
        assert "ADD" in str(kind).upper()
        old = self.create_descriptor_load(desc, indices, None, None)
        self.create_descriptor_store(desc, TensorHandle(old.data + value.data, value.dtype), indices)

    monkeypatch.setattr(InterpreterBuilder, "create_descriptor_reduce", create_descriptor_reduce, raising=False)


@pytest.fixture(autouse=True)
def quiet_numpy() -> None:
    """The interpreter computes with numpy, which warns where a GPU makes NaN silently."""
    import numpy

    numpy.seterr(all="ignore")
