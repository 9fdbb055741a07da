"""Metrics that foresee divergence: kurtosis per layer, and what FP8 itself shows (saturation, flush share, scale range, fold flushes).

    table = MomentTable()                                   device-side sums, added up over microbatches and ranks before any ratio
    hooks = MonitorHooks(gpt_targets(model), table)         what of a model is watched, and in which steps
    metrics = RunMetrics(hooks, sinks=[JsonLines("runs/a/metrics.jsonl")], alarms=Alarms())
    ...
    metrics.after_step(step, loss=loss)                     every optimizer step; does nothing but count in most of them

Megatron: `fp8_recipes.megatron.metrics`. Reading a run afterwards: ``fp8-recipes inspect RUN``.
"""

from .alarms import Alarm, Alarms, Thresholds
from .hooks import MonitorHooks, Target, gpt_targets, observe_linears
from .run import RunMetrics
from .sinks import JsonLines, TensorBoard, WandB
from .table import MomentTable, Reading

__all__ = [
    "Alarm",
    "Alarms",
    "JsonLines",
    "MomentTable",
    "MonitorHooks",
    "Reading",
    "RunMetrics",
    "Target",
    "TensorBoard",
    "Thresholds",
    "WandB",
    "gpt_targets",
    "observe_linears",
]
