"""The metrics inside Megatron: which modules of a GPTModel are watched, and the calls that connect them to a run.

    metrics.install(model, args)      after the model is built (with the optimizer, see `weight_scaling_hook`)
    metrics.install_training_log()    once: `after_step` runs after every iteration, on every rank

Flags (set by `arguments`): ``fp8_metrics_interval`` (0 = off), ``fp8_metrics_log`` (path of the JSON lines), ``fp8_alarm`` ("warn" or "stop").
TensorBoard and Weights & Biases get the same numbers if Megatron was given ``--tensorboard-dir`` or ``--wandb-project``.

Watched: output of linear_qkv, input of the FFN's linear_fc2 (dense, experts), output of the layer; under FP8 every input, weight and gradient of the linears.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..formats import scale_from_amax
from ..metrics import Alarm, Alarms, JsonLines, MonitorHooks, RunMetrics, Target, TensorBoard, Thresholds, WandB
from ..metrics.alarms import FATAL
from ..metrics.hooks import BLOCK_OUTPUT, DOWN_INPUT, QKV
from ..metrics.sinks import read_kurtosis
from ..recipe import RecipeError
from ..tensor import ScaledTensor
from ..weight_scaling import ATTRIBUTE, measure_amax

_MARK = "_fp8_recipes_metrics"
_PROJECTIONS = (("linear_qkv", QKV), ("linear_q_proj", "q"), ("linear_q_up_proj", "q"), ("linear_kv_up_proj", "kv"))


_Number = float | torch.Tensor | None


class _Installed:
    """The one set of metrics of this process."""

    run: RunMetrics | None = None
    args: Any = None
    started = False


# --- finding the modules ----------------------------------------------------------------------------------------------------------------------------------


def layers_of(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """("layers.N", layer) for every transformer layer of the model's chunks on this rank, N the global number from 1. Multi-token-prediction layers, which
    count from 1 too, are left out."""
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if all(hasattr(module, name) for name in ("layer_number", "self_attention", "mlp")) and "mtp" not in path.split("."):
                yield f"layers.{int(module.layer_number)}", module  # type: ignore[call-overload]


def find_targets(chunks: Iterable[torch.nn.Module], args: Any) -> list[Target]:
    """Targets of a Megatron model. Raises RuntimeError where a pipeline of one stage has none."""
    found: list[Target] = []
    for name, layer in layers_of(chunks):
        group = _tp_group(layer)
        for attribute, tensor in _PROJECTIONS:
            projection = getattr(layer.self_attention, attribute, None)
            if projection is not None:
                found.append(Target(f"{name}.{tensor}", projection, shard=group))
        found += [Target(f"{name}.{tensor}", fc2, "input", shard=part) for tensor, fc2, part in _down_projections(layer.mlp, group)]
        whole = group is not None and not getattr(args, "sequence_parallel", False)
        found.append(Target(f"{name}.{BLOCK_OUTPUT}", layer, copies=dist.get_world_size(group) if whole else 1))
    if not found and getattr(args, "pipeline_model_parallel_size", 1) == 1:
        raise RuntimeError("this model has no layers with self_attention and mlp, so there is nothing to take metrics of; use --fp8-metrics-interval 0")
    return found


def _down_projections(mlp: Any, group: Any) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    """(tensor, module, group that splits its features) of a dense MLP, or of the experts and shared experts of an MoE layer."""
    experts = getattr(mlp, "experts", None)
    if experts is None:
        if getattr(mlp, "linear_fc2", None) is not None:
            yield DOWN_INPUT, mlp.linear_fc2, group
        return
    inner = [experts] if getattr(experts, "linear_fc2", None) is not None else list(getattr(experts, "local_experts", []))
    for expert in inner:
        yield DOWN_INPUT, expert.linear_fc2, _group(getattr(expert, "tp_group", None))
    shared = getattr(mlp, "shared_experts", None)
    if shared is not None:
        yield f"shared_{DOWN_INPUT}", shared.linear_fc2, group


def _tp_group(layer: Any) -> Any:
    collection = getattr(layer.self_attention, "pg_collection", None)
    return _group(getattr(collection, "tp", None))


def _group(group: Any) -> Any:
    return group if group is not None and dist.is_initialized() and dist.get_world_size(group) > 1 else None


# --- what the linears quantise ----------------------------------------------------------------------------------------------------------------------------


def observe_quantised(chunks: list[torch.nn.Module], hooks: MonitorHooks) -> None:
    """Report every quantised tensor: TransformerEngine's modules, the fused MLP, the LM head, and once a step the weights under predicted scales."""
    from ..te.observe import observe_modules
    from .head import OutputLayer

    predicted: list[tuple[str, Any]] = []
    for module in (module for chunk in chunks for module in chunk.modules() if isinstance(module, OutputLayer)):
        module.fp8_observer = functools.partial(hooks.observe, "output_layer")
        predicted += [("output_layer.weight", p) for p in module.parameters(recurse=False) if hasattr(p, ATTRIBUTE)]
    for name, layer in layers_of(chunks):
        named = [(f"{name}.{path}", module) for path, module in layer.named_modules() if path]
        observe_modules(named, hooks)
        predicted += [(f"{path}.weight", p) for path, module in named for p in module.parameters(recurse=False) if hasattr(p, ATTRIBUTE)]
        if getattr(layer.mlp, "linear_fc2", None) is not None:
            layer.mlp.fp8_observer = _fused_observer(hooks, layer, name)  # type: ignore[union-attr]
        if getattr(layer.mlp, "experts", None) is not None:
            layer.mlp.fp8_observer = _experts_observer(hooks, layer, name)  # type: ignore[union-attr]
    hooks.before_reading.append(lambda: _add_predicted(hooks, predicted))


def _fused_observer(hooks: MonitorHooks, layer: torch.nn.Module, name: str) -> Any:
    """For the fused MLP, where fc2 is not called as a module: its input exists as FP8 only, so its kurtosis is that of the payload."""

    def observer(linear: str, role: str, x: torch.Tensor | None, q: ScaledTensor) -> None:
        if not (hooks.active and layer.training):
            return
        hooks.observe(f"{name}.mlp.{linear}", role, x, q)
        if (linear, role) == ("linear_fc2", "input"):
            hooks.table.same_values(f"{name}.{DOWN_INPUT}", f"{name}.mlp.linear_fc2.input")

    return observer


def _experts_observer(hooks: MonitorHooks, layer: torch.nn.Module, name: str) -> Any:
    """For experts that `nn.experts` runs, where no module is called: inputs and gradients of all experts of this rank together. The fold that is counted is
    to one target for all of them, an upper bound of the folds of each."""

    def observer(linear: str, role: str, x: torch.Tensor | None, q: ScaledTensor, source: torch.Tensor | None) -> None:
        if not (hooks.active and layer.training) or q.shape[0] == 0:
            return
        hooks.observe(f"{name}.mlp.experts.{linear}", role, x, q, source)
        if (linear, role) == ("linear_fc2", "input"):
            hooks.table.same_values(f"{name}.{DOWN_INPUT}", f"{name}.mlp.experts.linear_fc2.input")

    return observer


def _add_predicted(hooks: MonitorHooks, weights: list[tuple[str, Any]]) -> None:
    """Weights under the scale that their next use will take. A measurement that is due is made beside the anchor: parameters may still be on their way to this
    rank (--overlap-param-gather), and the anchor must not come of old ones."""
    if not weights:
        return
    bounds: list[tuple[torch.Tensor, float]] = []
    for _, weight in weights:
        state = getattr(weight, ATTRIBUTE)
        bounds.append((measure_amax(weight.detach(), state.group).float(), 0.0) if state.due() else state.amax_and_increment(weight.detach()))
    increments = torch.tensor([increment for _, increment in bounds], dtype=torch.float32, pin_memory=bounds[0][0].is_cuda)
    amax = torch.stack([amax.float() for amax, _ in bounds]) + increments.to(bounds[0][0].device, non_blocking=True)
    scales = scale_from_amax(amax)[:, None].expand(-1, 4).contiguous()  # each at a multiple of 16 bytes, so that the kernel compiles once for all
    for (name, weight), scale in zip(weights, scales.unbind(), strict=True):
        hooks.table.add(name, weight, scale=scale[0])


# --- connecting them to a run -----------------------------------------------------------------------------------------------------------------------------


def install(model: Any, args: Any) -> RunMetrics | None:
    """Put the hooks on ``model`` (one chunk or a list). None if ``args.fp8_metrics_interval`` is 0. Raises RecipeError for what cannot be watched."""
    interval = int(getattr(args, "fp8_metrics_interval", 0) or 0)
    if interval == 0:
        return None
    check(args)
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    hooks = MonitorHooks(find_targets(chunks, args), interval=interval)
    if getattr(args, "fp8", None):
        observe_quantised(chunks, hooks)
    stops, alarms = _stops(args), Alarms(Thresholds(warmup=_warmup(args)))
    _Installed.run = RunMetrics(hooks, alarms=alarms, stop_on=FATAL if stops else (), stop=_save_and_exit if stops else None)
    _Installed.args, _Installed.started = args, False
    return _Installed.run


def _warmup(args: Any) -> int:
    """Steps in which kurtosis is not judged: the learning rate's warm-up, however it was given, and at least the default."""

    def number(name: str) -> float:
        return getattr(args, name, None) or 0

    samples = number("lr_warmup_samples") / max(number("global_batch_size"), 1)
    share = number("lr_warmup_fraction") * (number("lr_decay_iters") or number("train_iters"))
    return int(max(Thresholds.warmup, number("lr_warmup_iters"), samples, share))


def _stops(args: Any) -> bool:
    return getattr(args, "fp8_alarm", "warn") == "stop"


def check(args: Any) -> None:
    """Raise RecipeError, naming the flag and the way out, where the metrics cannot be right."""
    interval = getattr(args, "fp8_metrics_interval", 0) or 0
    if interval < 0:
        raise RecipeError(f"--fp8-metrics-interval {interval}: must be 0 (off) or a number of iterations")
    if interval == 0:
        idle = [flag for flag, given in (("--fp8-metrics-log", getattr(args, "fp8_metrics_log", None)), ("--fp8-alarm stop", _stops(args))) if given]
        if idle:
            raise RecipeError(f"{', '.join(idle)} does nothing without --fp8-metrics-interval N (10, say); add it or drop the flag")
        return
    graphs = getattr(args, "cuda_graph_impl", "none")
    if graphs not in (None, "none"):
        raise RecipeError(f"--cuda-graph-impl {graphs}: a replayed graph calls no hooks, so the metrics would miss it; use --fp8-metrics-interval 0 with it")
    if _stops(args) and not getattr(args, "save", None):
        raise RecipeError("--fp8-alarm stop saves a checkpoint before it ends the run, so it needs --save PATH --save-interval N")


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Nothing that runs in here is measured."""
    hooks = _Installed.run.hooks if _Installed.run else None
    active = hooks is not None and hooks.active
    if hooks is not None:
        hooks.active = False
    try:
        yield
    finally:
        if hooks is not None:
            hooks.active = active


def after_step(iteration: int, loss: _Number = None, grad_norm: _Number = None, learning_rate: _Number = None) -> None:
    """After every iteration, on every rank. The scalars are written beside the readings by the last rank, the one that has the loss; nothing waits for them
    in other steps."""
    run = _Installed.run
    if run is None:
        return
    if not _Installed.started:
        _start(run, _Installed.args, iteration)
    run.after_step(iteration, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)


def _start(run: RunMetrics, args: Any, iteration: int) -> None:
    """At the first iteration: sinks on the last rank (where Megatron has its writers), and on all ranks what a resumed run had seen."""
    _Installed.started = True
    path = getattr(args, "fp8_metrics_log", None)
    history: list[Any] = [[]]
    if _is_last_rank():
        if path and Path(path).is_file():
            history = [read_kurtosis(path, before=iteration)]
        run.sinks = _sinks(path)
    if dist.is_initialized():
        dist.broadcast_object_list(history, src=dist.get_world_size() - 1)
    for step, kurtosis in history[0]:
        run.alarms.remember(step, kurtosis)


def _sinks(path: str | None) -> list[Any]:
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    found: list[Any] = [JsonLines(path)] if path else []
    if tensorboard is not None:
        found.append(TensorBoard(tensorboard))
    if wandb is not None:
        found.append(WandB(wandb))
    return found


def _is_last_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def _save_and_exit(alarms: list[Alarm]) -> None:
    """Megatron looks at --exit-interval after training_log, saves and leaves: the way out that all ranks take together."""
    if _is_last_rank():
        print(f"fp8_recipes: {alarms[0].message}; saving a checkpoint and ending the run (--fp8-alarm stop)", flush=True)
    _Installed.args.exit_interval = alarms[0].step


def install_training_log() -> None:
    """Call `after_step` from ``megatron.training.training.training_log``, which runs after every iteration. Idempotent."""
    from megatron.training import training

    if not hasattr(training.training_log, _MARK):  # a mark of its own: `report.install_log` wraps the same function
        training.training_log = with_after_step(training.training_log)


def with_after_step(original: Any) -> Any:
    """``training_log`` with `after_step` in front."""

    @functools.wraps(original)
    def training_log(*values: Any, **kwargs: Any) -> Any:
        # loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, grad_norm
        after_step(values[3], values[0].get("lm loss"), values[7], values[2])
        return original(*values, **kwargs)

    setattr(training_log, _MARK, True)
    return training_log
