"""What of a model is watched and when: forward hooks for activations, observers for quantised tensors.

A step is observed if its number is a multiple of the interval; the first step after start is observed too, so that a curve has a beginning. In other steps a
hook costs one comparison.

Activation recomputation runs a forward pass again inside backward. There the autograd engine is at work, so a hook can tell (``_in_backward``) and counts
nothing: each tensor is counted once, whatever is recomputed and by whose implementation. Evaluation (``module.training`` false) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..nn.linear import Linear
from ..tensor import ScaledTensor
from .table import MomentTable, Reading

QKV, DOWN_INPUT, BLOCK_OUTPUT = "qkv", "down_input", "block_output"
"""The tensors FOG watches: output of the QKV projection, input of the FFN's down projection, output of a block (residual stream)."""
FORWARD_ROLES, GRAD_ROLE = ("activation", "input", "weight"), "grad"


@dataclass(frozen=True)
class Target:
    """One watched activation.

    name: "layers.N.TENSOR", N from 1. side: which end of ``module``, "input" or "output". shard: process group over which its features are split, or None.
    copies: on how many ranks the whole tensor exists (tensor parallelism without sequence parallelism), else 1.
    """

    name: str
    module: torch.nn.Module
    side: str = "output"
    shard: Any = None
    copies: int = 1

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            raise ValueError(f"side of target {self.name!r} must be 'input' or 'output', got {self.side!r}")


def in_backward() -> bool:
    """Is the autograd engine running a backward pass on this thread?"""
    return torch._C._current_graph_task_id() != -1


class MonitorHooks:
    """Forward hooks on ``targets`` that add to ``table`` in observed steps.

    interval: observe every so many steps. Targets that share a name are parts of one tensor (experts, each a module of its own).
    Raises ValueError for an interval below 1 and for parts that are not cut alike.
    """

    def __init__(self, targets: Iterable[Target], table: MomentTable | None = None, *, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"the metrics interval must be at least 1 step, got {interval}")
        self.table = MomentTable() if table is None else table
        self.interval = interval
        self.active = True
        """Is the step now running observed?"""
        self.before_reading: list[Callable[[], None]] = []
        """Called at the end of an observed step: the place to add what changes once a step, such as weights."""
        self.targets = list(targets)
        seen: dict[str, Target] = {}
        for t in self.targets:
            first = seen.setdefault(t.name, t)
            if (first.side, first.shard, first.copies) != (t.side, t.shard, t.copies):
                raise ValueError(f"two targets are called {t.name!r} but are not parts of one tensor (side, shard or copies differ); rename one")
        self._handles = [t.module.register_forward_hook(self._hook(t), with_kwargs=True) for t in self.targets]

    def _hook(self, target: Target) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.active or not module.training or in_backward():
                return
            found = (output,) if target.side == "output" else (*args, *kwargs.values())
            x = first_tensor(found)
            if x is None:
                raise TypeError(f"the {target.side} of {type(module).__name__} ({target.name}) holds no floating tensor to take moments of")
            self.table.add(target.name, x, shard=target.shard, copies=target.copies)

        return hook

    def observe(self, name: str, role: str, x: torch.Tensor | None, q: ScaledTensor, source: torch.Tensor | None = None) -> None:
        """Add a quantised tensor under "name.role". Forward roles are not counted again when recomputed. source: see `MomentTable.add`."""
        if self.active and not (role in FORWARD_ROLES and in_backward()):
            self.table.add(f"{name}.{'input' if role == 'activation' else role}", x, q, fold=role != "weight", source=source)

    def end_step(self, step: int) -> dict[str, Reading] | None:
        """Call after every optimizer step, on every rank. Readings if the step was observed, else None; decides whether step + 1 is observed."""
        readings = None
        if self.active:
            for before in self.before_reading:
                before()
            readings = self.table.reduce()
            self.table.reset()
        self.active = (step + 1) % self.interval == 0
        return readings

    def also(self, handle: Any) -> None:
        """Remove ``handle`` (of a hook that somebody else registered) together with these hooks."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def first_tensor(values: Iterable[Any]) -> torch.Tensor | None:
    """The first floating tensor in ``values``, looking into tuples and lists."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (tuple, list)):
            found = first_tensor(value)
            if found is not None:
                return found
    return None


def gpt_targets(model: torch.nn.Module) -> list[Target]:
    """Targets of a GPT of `fp8_recipes.nn`: any model with ``blocks``, each with ``attention.qkv`` and ``mlp.down``."""
    blocks = getattr(model, "blocks", None)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks to watch; name the modules yourself with Target")
    found: list[Target] = []
    for number, block in enumerate(blocks, start=1):
        found.append(Target(f"layers.{number}.{QKV}", block.attention.qkv))
        found.append(Target(f"layers.{number}.{DOWN_INPUT}", block.mlp.down, "input"))
        found.append(Target(f"layers.{number}.{BLOCK_OUTPUT}", block))
    return found


def observe_linears(model: torch.nn.Module, hooks: MonitorHooks) -> int:
    """Hand every tensor that an `fp8_recipes.nn.Linear` of ``model`` quantises to ``hooks``; returns how many layers. Names: the layer's, as in
    ``named_modules``, with blocks counted from 1 as "layers.N"."""
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            module.observer = partial(_report, hooks, module, layer_name(path))
            count += 1
    return count


def _report(hooks: MonitorHooks, module: torch.nn.Module, name: str, role: str, x: torch.Tensor, q: ScaledTensor) -> None:
    if module.training:  # evaluation may run between two steps
        hooks.observe(name, role, x, q)


def layer_name(path: str) -> str:
    """ "blocks.0.mlp.down" -> "layers.1.mlp.down"; paths without a block stay."""
    head, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    return f"layers.{int(number) + 1}.{rest}" if head == "blocks" and number.isdigit() else path
