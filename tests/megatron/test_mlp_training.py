"""FP8 weights kept over the microbatches of a step, trained through scripts/launch.sh on a GPU: the losses of a run that casts at every use, bit for bit."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from megatron_runs import STEPS, one_gpu  # noqa: E402

MODEL = "tiny"
ENVIRONMENT = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


class TestOneGpu:
    pytestmark = one_gpu

    @pytest.mark.parametrize(("flags", "values"), [("", ("ffn", "row")), (FULL, ("ffn",))], ids=["plain", "recompute"])
    def test_kept_weights_have_the_same_bits(self, train, flags, values):
        losses, _ = train("moss:interval=3", flags)
        assert len(losses) == STEPS
        for value in values:
            found, log = train(f"moss:interval=3,weight_cache={value}", flags)
            assert found == losses, value
            assert f"weight_cache={value} keeps their FP8 weights from the first microbatch of a step to the last" in log
