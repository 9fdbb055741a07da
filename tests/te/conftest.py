"""The gpu tests of this folder need TransformerEngine; they skip, with the reason, without it."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def _needs_transformer_engine(request):
    if request.node.get_closest_marker("gpu") and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
