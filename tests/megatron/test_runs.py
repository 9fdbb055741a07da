"""What the tests of Megatron training on a GPU share (megatron_runs.py), without a GPU: which cuDNN cannot, and when losses count as near."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import megatron_runs  # noqa: E402

from fp8_recipes.megatron import attention_arguments  # noqa: E402


@pytest.mark.parametrize(("version", "skipped"), [((9, 14, 0), True), ((9, 18, 1), True), ((9, 19, 0), False), ((9, 20, 1), False), (None, False)])
def test_fp8_attention_is_skipped_exactly_where_the_launcher_refuses_it(monkeypatch, version, skipped):
    monkeypatch.setattr(attention_arguments, "cudnn_version", lambda: version)
    for recipe in ("bf16", "tensorwise", "moss", "fog:attention=bf16"):
        megatron_runs.skip_without_right_cudnn(recipe)
    if not skipped:
        megatron_runs.skip_without_right_cudnn("fog")
        return
    with pytest.raises(pytest.skip.Exception, match=rf"cuDNN {version[0]}\.{version[1]}\.{version[2]}: .* 9\.19\.0 is the first"):
        megatron_runs.skip_without_right_cudnn("fp8_flow_moe:attention=fp8")


def losses(**changed: float) -> dict[int, float]:
    """From 6 down to 3 in as many steps as the trainings have; step5=... puts another value there."""
    falling = {step: 6 - 3 * (step - 1) / (megatron_runs.STEPS - 1) for step in range(1, megatron_runs.STEPS + 1)}
    return falling | {int(name.removeprefix("step")): value for name, value in changed.items()}


def test_near_means_every_step():
    megatron_runs.assert_near(losses(step5=losses()[5] * 1.019), losses())
    with pytest.raises(AssertionError, match="step 5: "):
        megatron_runs.assert_near(losses(step5=losses()[5] * 1.021), losses())
    with pytest.raises(AssertionError, match="FP8 cannot have run"):
        megatron_runs.assert_near(losses(), losses())
    short = losses()
    del short[megatron_runs.STEPS]
    with pytest.raises(AssertionError, match="steps "):
        megatron_runs.assert_near(short, losses())
    flat = dict.fromkeys(losses(), 6.0)
    with pytest.raises(AssertionError, match="does not learn"):
        megatron_runs.assert_near(flat | {1: 6.01}, flat)
