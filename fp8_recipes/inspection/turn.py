"""When a loss turned: a definition simple enough to check by eye, so that a warning can be said to have come before it or not."""

from __future__ import annotations

import math
from itertools import accumulate

from .read import Series

WINDOW = 20
"""Losses over which is averaged, the last one included."""
RISE = 0.1
"""Share by which the average must stay above its lowest value so far. With half of it, healthy runs of small batches had turned where the text was harder."""


def running_mean(loss: Series) -> Series:
    """Mean of the last `WINDOW` recorded losses, from the first step that has as many; infinite where one of them is not finite."""
    steps, values = list(loss), [v if math.isfinite(v) else math.inf for v in loss.values()]
    return {steps[i - 1]: sum(values[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(steps) + 1)}


def turned(loss: Series) -> int | None:
    """The first step from which on, to the end of the run and over `WINDOW` recorded steps at least, the running mean is more than `RISE` above its lowest
    value so far. None if the loss did not turn, or came back."""
    mean = running_mean(loss)
    start, length = None, 0
    for (step, value), low in zip(mean.items(), accumulate(mean.values(), min), strict=True):
        above = value > (1 + RISE) * low or not math.isfinite(value)
        start, length = (start if length else step, length + 1) if above else (None, 0)
    return start if length >= WINDOW else None
