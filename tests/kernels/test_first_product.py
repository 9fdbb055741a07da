"""The hook by which a pass of Triton's is added for Hopper, and whom it leaves alone."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs

first_product = import_module("fp8_recipes.kernels.first_product")
PRODUCT = SimpleNamespace(__name__="_grouped_gemm_kernel")


def hook() -> Any:
    return knobs.runtime.add_stages_inspection_hook


@pytest.mark.skipif(not first_product._KNOWN, reason="this Triton has no such hook or pass")
def test_products_are_compiled_with_the_pass_and_only_while_they_are() -> None:
    with first_product.compiling(PRODUCT, {}):
        assert hook() is first_product._add_pass
    assert hook() is None
    for kernel, constants in ((PRODUCT, {"ACCUMULATE": True}), (SimpleNamespace(__name__="_quantize_kernel"), {})):
        with first_product.compiling(kernel, constants):
            assert hook() is None
    with pytest.raises(RuntimeError, match="ends anyway"), first_product.compiling(PRODUCT, {}):
        raise RuntimeError("ends anyway")
    assert hook() is None


@pytest.mark.skipif(not first_product._KNOWN, reason="this Triton has no such hook or pass")
def test_the_hook_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(*asked: Any) -> None: ...

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", others)
    with first_product.compiling(PRODUCT, {}):
        assert hook() is others
    assert hook() is others


def test_the_stage_is_replaced_on_hopper_only() -> None:
    def stage(source: Any, metadata: Any) -> None: ...

    for capability, replaced in ((90, True), (100, False), (80, False), (None, False)):
        stages = {"ttir": stage, "ttgir": stage}
        assert first_product._add_pass(None, stages, None, None, capability) is None
        assert (stages["ttgir"] is not stage) == replaced and stages["ttir"] is stage


def test_a_newer_triton_asks_for_a_part_of_its_key() -> None:
    key, digest = first_product._add_pass()
    assert key and key == digest and isinstance(key, str)
