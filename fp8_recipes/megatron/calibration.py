"""The first maxima of delayed scaling, measured before the first optimizer step.

Delayed scaling casts with scales made of the maxima of earlier microbatches. A run that has none (fresh, or from a checkpoint of bf16 or of another recipe)
casts with scale 1. Gradients of a mean over many tokens are smaller than E5M2's smallest value: they become zero, and the gradient behind a product of zeros
has no maximum to record. So the scales come right one operation after the other, from fc2 to fc1 and from the attention's output through dO, dP and dQKV to
the joint projection, one microbatch each, and what was recorded from half a gradient saturates the whole one. The optimizer would take its first steps with
parts of the gradient missing, which no warm-up softens where a run continues in the middle of its schedule (numbers: docs/recipes.md).

So the first iteration's microbatches run forward and backward until the scales stand still, the histories keep what the last pass found, and then they run
as the iteration. Everything else that those passes leave behind is taken back: gradients, random states, buffers of modules, the position in the data,
losses and metrics. For recipes of this package with delayed scaling; Megatron's own ``delayed`` keeps its behaviour.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..te.shims import replace
from . import arguments, delayed_state, metrics, report

STILL = 1.25
"""A pass that moves no scale by more than this factor ends the search: neighbours in E5M2 are up to so far apart."""
PASSES = 24
"""At most. A model of 4 layers takes 4 with four microbatches a pass, and 6 with one (docs/recipes.md)."""
_MARK = "_fp8_recipes_calibrated"
_STEP = ("forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler", "config", "forward_backward_func", "iteration")
"""Parameters of train_step. Not asked of the function, which others may have wrapped (scripts/profile_megatron.py)."""


def install() -> None:
    """Calibrate in front of the first ``megatron.training.training.train_step``. Idempotent.

    Megatron has no callback between the first batch and the first step. 0.19. Stays: it is a feature, not a work-around.
    """
    from megatron.training import training

    replace(training, "train_step", _train_step)


def wanted(args: Any) -> bool:
    """Does this run train under delayed scaling by a recipe of this package? ``args``: prepared arguments."""
    if getattr(args, "fp8_delayed_recipe", None):
        return True
    spec = arguments.in_force(args)
    return spec is not None and arguments.fp8_attention(args)


def _train_step(original: Any) -> Any:
    def train_step(*values: Any, **named: Any) -> Any:
        from megatron.training import get_args

        step = dict(zip(_STEP, values, strict=False)) | named
        if not hasattr(step["model"][0], _MARK):
            setattr(step["model"][0], _MARK, True)
            if wanted(get_args()):
                with _rewound(step["data_iterator"]) as rewind:
                    calibrate(step, rewind)
                    return original(*values, **named)
        return original(*values, **named)

    return train_step


def calibrate(step: dict[str, Any], rewind: Any) -> int:
    """Measure the maxima of every module that has none, and say so on rank 0. On every rank, as a collective. Returns the passes made, 0 if none is missing.

    step: arguments of Megatron's train_step, by name. rewind: called before every pass, so that all of them and the iteration behind them read the same
    microbatches.
    """
    from megatron.training import get_args

    model, args = step["model"], get_args()
    recipe = delayed_state.recipe_in_force(model)
    watched = [(name, module) for name, module in delayed_state.modules(model) if delayed_state.remembers(module, recipe)] if recipe else []
    anew = {name for name, module in watched if not delayed_state.has_maxima(module)}
    if not _largest(len(anew), model):
        return 0
    if getattr(args, "cuda_graph_impl", "none") not in (None, "none"):
        report.say(f"fp8_recipes: the first steps cast with scale 1: maxima are not calibrated under --cuda-graph-impl {args.cuda_graph_impl}")
        return 0
    kept = {name: tensor.clone() for name, tensor in delayed_state.tensors(model).items() if name.rsplit(".", 2)[0] not in anew}
    passes, moved = 0, float("inf")
    with _without_trace(model, step["config"]) as restore:
        while moved > STILL and passes < PASSES:
            moved = _largest(_pass(step, args, rewind, restore), model)
            passes += 1
    rewind()
    found = delayed_state.tensors(model)
    for name, tensor in kept.items():
        found[name].copy_(tensor)
    found_in = f"delayed scaling had no maxima: measured on the first iteration's microbatches in {passes} passes that train nothing"
    if moved <= STILL:
        report.say(f"fp8_recipes: {found_in}, until no scale moved by more than a quarter")
    else:
        report.say(
            f"fp8_recipes: WARNING: {found_in}, and scales still move by a factor of {moved:.3g}: some kernel returns other values for the same input, "
            "or the model is at a start where the smallest rounding decides; the first steps cast with what was found last"
        )
    return passes


def _pass(step: dict[str, Any], args: Any, rewind: Any, restore: Any) -> float:
    """All microbatches of the iteration forward and backward. Returns the largest factor by which a scale of this rank moved."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    model = step["model"]
    rows = get_num_microbatches() * len(model)  # of every history: one for each microbatch, and virtual stage
    before = {name: tensor.clone() for name, tensor in delayed_state.tensors(model).items() if name.endswith("scale")}
    rewind()
    for chunk in model:
        chunk.zero_grad_buffer()
    step["optimizer"].zero_grad()
    step["forward_backward_func"](
        forward_step_func=step["forward_step_func"],
        data_iterator=step["data_iterator"],
        model=model,
        num_microbatches=rows // len(model),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
        p2p_communicator=step.get("p2p_communicator"),
        pg_collection=step.get("pg_collection"),
    )
    restore()
    _forget_before(model, rows)
    after = {name: tensor for name, tensor in delayed_state.tensors(model).items() if name.endswith("scale")}
    if before.keys() != after.keys():
        return float("inf")  # the first forward pass makes the states
    ratios = [torch.maximum(before[name] / scale, scale / before[name]).max() for name, scale in after.items()]
    return float(torch.stack(ratios).max()) if ratios else 1.0


def _forget_before(model: Sequence[torch.nn.Module], rows: int) -> None:
    """Drop all but the newest ``rows`` of the histories. Behind a product of flushed weights a norm divides by next to nothing: such maxima are too large."""
    for name, tensor in delayed_state.tensors(model).items():
        if name.endswith("amax_history"):
            tensor[:-rows].zero_()


# --- what a pass must not leave -----------------------------------------------------------------------------------------------------------------------------


class _Replay:
    """An iterator whose items can be read again from the first; as Megatron's own replay, a shallow copy each time."""

    def __init__(self, source: Any) -> None:
        self.source, self.position = source, 0
        self.items: list[Any] = []

    def __next__(self) -> Any:
        if self.position == len(self.items):
            self.items.append(next(self.source))
        self.position += 1
        return copy.copy(self.items[self.position - 1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@contextlib.contextmanager
def _rewound(data_iterator: Any) -> Iterator[Any]:
    """A function that puts ``data_iterator`` (one, a list of them for virtual stages, None where no data is read) back to where it is now."""
    iterators = [each for each in (data_iterator if isinstance(data_iterator, list) else [data_iterator]) if each is not None]
    replays = [_Replay(each.iterable) for each in iterators]
    for each, replay in zip(iterators, replays, strict=True):
        each.iterable = replay  # inside Megatron's RerunDataIterator, which the iteration itself may rewind

    def rewind() -> None:
        for replay in replays:
            replay.position = 0

    try:
        yield rewind
    finally:
        for each, replay in zip(iterators, replays, strict=True):
            each.iterable = replay.source


@contextlib.contextmanager
def _without_trace(model: Sequence[torch.nn.Module], config: Any) -> Iterator[Any]:
    """Passes in here are not timed, watched or checked for reproducibility. Yields a function that takes back what a pass changed; gradients are left to the
    next `zero_grad_buffer`."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training import get_timers

    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state(), get_cuda_rng_tracker().get_states()
    found = (buffer for chunk in model for module in chunk.modules() for buffer in module._buffers.values())  # Megatron's DDP has a list called buffers
    buffers = [(buffer, buffer.clone()) for buffer in found if buffer is not None]

    def restore() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(states[3])
        get_cuda_rng_tracker().set_states(dict(states[4]))
        for buffer, value in buffers:  # expert bias, tokens counted by routers
            buffer.copy_(value)
        get_moe_metrics_tracker().clear()
        MTPLossLoggingHelper.clean_metrics_in_tracker()

    machine = get_rerun_state_machine()
    mode, timers = machine.mode, config.timers
    machine.mode = RerunMode.DISABLED  # set_mode prints a warning each time
    config.timers = None
    try:
        with metrics.paused():
            yield restore
    finally:
        machine.mode = mode
        config.timers = timers
        get_timers()("batch-generator", log_level=2).reset()


def _largest(value: float, model: Sequence[torch.nn.Module]) -> float:
    """The largest ``value`` of all ranks, so that all decide alike."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return float(value)
    together = torch.tensor([value], dtype=torch.float64, device=next(model[0].parameters()).device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return float(together)
