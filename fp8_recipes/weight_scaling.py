"""Automatic weight scaling: a weight's scale predicted from the learning rate instead of measured (MOSS, arXiv 2511.05811, section 3.2).

One Adam step moves a weight by at most ``lr * bound``, so since it was last measured ("anchored") its maximum has grown by at most ``bound * sum(lr)``:

    amax(W_t) <= amax(W_anchor) + bound * sum of the learning rates since

and the scale of that bound is safe without reading the weight. Three points the paper leaves open:

* ``bound`` is not 1. Cauchy-Schwarz gives ``|m_hat| / sqrt(v_hat) <= 1.165`` for betas (0.9, 0.95), 7.27 for (0.9, 0.999) (`adam_update_bound`).
* Decoupled weight decay only shrinks ``|W|``, and gradient clipping does not matter (Adam's step does not depend on the gradient's size): neither enters.
* The bf16 weight is the rounded fp32 master. The master may be one rounding (2**-8) above the weight that was measured, and the next weight one rounding above
  its master: the anchor is widened by both, the distance travelled by one.

Power-of-two scales make the prediction nearly free of loss: a prediction too high by less than a binade gives the same scale, and one binade more gives
the same values except where they become subnormal. The quantiser saturates, so even a violated bound clips instead of overflowing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ADAM_FAMILY = ("Adam", "AdamW", "FusedAdam", "HybridDeviceOptimizer", "CPUAdam", "DeepSpeedCPUAdam")
"""Optimizer class names whose step is bounded by ``lr * adam_update_bound(betas)``."""
BF16_ROUNDING = 2.0**-8
ATTRIBUTE = "fp8_predicted_scale"
"""Parameters under automatic scaling carry their `PredictedScale` under this attribute name."""


def adam_update_bound(beta1: float, beta2: float, steps: int = 100_000) -> float:
    """Supremum over t <= steps of ``|m_hat_t| / sqrt(v_hat_t)`` over all gradient sequences.

    With ``m_t = (1-b1) sum b1^i g`` and ``v_t = (1-b2) sum b2^i g^2`` Cauchy-Schwarz gives
    ``|m_t| <= (1-b1) sqrt(sum (b1^2/b2)^i / (1-b2)) sqrt(v_t)``; the bias corrections multiply it by
    ``sqrt(1-b2^t) / (1-b1^t)``. With ``b1**2 >= b2`` there is no bound: ValueError.
    """
    if not (0 <= beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"betas must lie in [0, 1), got ({beta1}, {beta2})")
    ratio = beta1 * beta1 / beta2
    if ratio >= 1:
        raise ValueError(f"betas ({beta1}, {beta2}): beta1**2 must be below beta2 for Adam's step to be bounded; use weight_scale=measured")
    best = 0.0
    t = 1
    while t <= steps:
        raw = (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt((1 - ratio**t) / (1 - ratio))
        best = max(best, raw * math.sqrt(1 - beta2**t) / (1 - beta1**t))
        t = t + 1 if t < 64 else int(t * 1.1)
    limit = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio))
    return max(best, limit)


@dataclass
class PredictedScale:
    """Anchor of one weight. ``anchor_amax`` is 0-dim fp32 on the weight's device; None until first measured."""

    clock: WeightScaling
    group: Any = None
    """Process group whose ranks must agree on the anchor (tensor-parallel shards of one weight), or None."""
    anchor_amax: torch.Tensor | None = None
    anchor_travel: float = 0.0
    anchor_step: int = -1
    generation: int = -1

    def due(self) -> bool:
        """Must the maximum be measured before the next use?"""
        clock = self.clock
        if self.anchor_amax is None or self.generation != clock.generation:
            return True
        return clock.steps - self.anchor_step >= clock.effective_interval

    def amax_and_increment(self, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(anchor amax, increment) such that ``amax(weight) <= anchor + increment``; measures first when due. No host synchronisation."""
        if self.due():
            self.clock.close_step()
            self.anchor_amax = measure_amax(weight.detach(), self.group)
            self.anchor_travel, self.anchor_step = self.clock.travel, self.clock.steps
            self.generation = self.clock.generation
        assert self.anchor_amax is not None
        travelled = (self.clock.travel - self.anchor_travel) * (1 + BF16_ROUNDING)
        return self.anchor_amax, travelled


def measure_amax(weight: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Largest |w|, widened by two bf16 roundings (down to the weight measured, up to the weight predicted); 0-dim fp32 on the weight's device.

    Agreed by maximum over ``group``'s ranks if given.
    """
    amax = torch.linalg.vector_norm(weight, ord=math.inf).float() * (1 + BF16_ROUNDING) ** 2
    if group is not None:
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    return amax


@dataclass
class WeightScaling:
    """The clock of automatic scaling: how far any weight can have travelled since step 0.

    interval: steps between true measurements (MOSS: 500).
    Register weights with `track`, the optimizer with `attach`; call `reanchor` after loading and after saving a checkpoint, so that a resumed run has
    the bits of the run that went on.
    """

    interval: int = 500
    travel: float = 0.0
    steps: int = 0
    generation: int = 0
    attached: bool = False
    bounded: bool = True
    on_message: Callable[[str], None] = print
    _bounds: dict[tuple[float, float], float] = field(default_factory=dict)
    _stepped: set[int] = field(default_factory=set)
    _step_reach: float = 0.0

    @property
    def effective_interval(self) -> int:
        """`interval`, or 0 (measure at every use) while no optimizer with a bounded step reports its learning rate."""
        return self.interval if self.attached and self.bounded else 0

    def track(self, weight: torch.nn.Parameter, group: Any = None) -> PredictedScale:
        """Put ``weight`` under automatic scaling; idempotent."""
        state = getattr(weight, ATTRIBUTE, None)
        if state is None:
            state = PredictedScale(self, group)
            setattr(weight, ATTRIBUTE, state)
        return state

    def reanchor(self) -> None:
        """Measure every weight again at its next use.

        The clock starts from zero, as it does in a process that has just loaded the checkpoint: same sums, same bits.
        """
        self.generation += 1
        self.travel, self.steps = 0.0, 0
        self.close_step()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Count ``optimizer``'s learning rates from now on. An optimizer outside `ADAM_FAMILY` switches to measuring every step, and says so."""
        if type(optimizer).__name__ not in ADAM_FAMILY:
            self.bounded = False
            self.on_message(
                f"fp8_recipes: automatic weight scaling has no bound for {type(optimizer).__name__} (known: {', '.join(ADAM_FAMILY)}); "
                "weights are measured again at every step"
            )
        else:
            for group in optimizer.param_groups:
                self._reach(group)  # betas without a bound raise now, not at the first step
        self.attached = True
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        reach = max((self._reach(g) for g in optimizer.param_groups), default=0.0) if self.bounded else 0.0
        if id(optimizer) in self._stepped:
            self.close_step()
        if not self._stepped:
            self.advance(reach)
            self._step_reach = reach
        elif reach > self._step_reach:
            self.travel += reach - self._step_reach
            self._step_reach = reach
        self._stepped.add(id(optimizer))

    def close_step(self) -> None:
        """Whatever optimizer steps next belongs to a new step.

        A measurement closes the step too: it has seen what came before it and nothing of what comes after.
        """
        self._stepped.clear()

    def _reach(self, group: dict[str, Any]) -> float:
        """Largest possible change of a weight of this parameter group in one step."""
        betas = group.get("betas")
        if betas is None:
            return 0.0
        key = (float(betas[0]), float(betas[1]))
        if key not in self._bounds:
            self._bounds[key] = adam_update_bound(*key)
        rate = abs(float(group["lr"]))
        if not math.isfinite(rate):
            raise ValueError(f"learning rate {rate} of a parameter group: the scale of its weights cannot be predicted, and the step has made them NaN")
        return rate * self._bounds[key]

    def advance(self, reach: float) -> None:
        """One optimizer step in which no weight moved by more than ``reach``."""
        self.travel += reach
        self.steps += 1
