"""Tests marked `gpu` and `multi_gpu` skip, with the reason, where there are too few GPUs; without a GPU one thread per process.

The tensors here are small: OpenMP's threads would wait for each other at every operation, on a busy machine ten times longer than they compute.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("multi_gpu") and found < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA GPUs, found {found}"))
        elif item.get_closest_marker("gpu") and found < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
