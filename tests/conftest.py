"""Tests marked `gpu` and `multi_gpu` skip, with the reason, where there are too few GPUs."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("multi_gpu") and found < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA GPUs, found {found}"))
        elif item.get_closest_marker("gpu") and found < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
