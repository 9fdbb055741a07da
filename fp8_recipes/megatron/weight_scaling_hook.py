"""Automatic weight scaling in Megatron: one clock per process, fed by the optimizers' learning rates, one anchor per FP8 weight.

The hook runs where it must: after the FP32 update, before the next forward pass casts the weight. A step skipped for NaN or Inf does not step the inner
optimizer, so it does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..weight_scaling import WeightScaling
from . import arguments, metrics, report

_clocks: list[WeightScaling] = []
"""Clocks of the models built in this process, for `reanchor_all`."""


def install() -> None:
    """Wrap optimizer creation and checkpoint save / load in ``megatron.training``. Idempotent.

    Megatron has no parameter or callback for either; ``training.py`` imports the three names into itself, so they are replaced there and where they are
    defined. 0.19.
    Can go when pretrain() takes callbacks (Megatron-Bridge has them).
    """
    from megatron.training import checkpointing, training

    from .shims import replace

    replace(training, "get_megatron_optimizer", _with_weight_scaling)
    for name in ("save_checkpoint", "load_checkpoint"):
        replace(checkpointing, name, _with_reanchor)
        replace(training, name, _with_reanchor)


def _with_weight_scaling(original: Any) -> Any:
    def get_megatron_optimizer(config: Any, model_chunks: Any, *rest: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *rest, **kwargs)
        from megatron.training import get_args

        on_model_and_optimizer(get_args(), model_chunks, optimizer)
        return optimizer

    return get_megatron_optimizer


def _with_reanchor(original: Any) -> Any:
    def with_reanchor(*rest: Any, **kwargs: Any) -> Any:
        result = original(*rest, **kwargs)
        reanchor_all()
        return result

    return with_reanchor


def reanchor_all() -> None:
    """Measure every weight again at its next use: at a save and at a load alike, so that the run that goes on and the run that resumes see the same scales."""
    for clock in _clocks:
        clock.reanchor()


def on_model_and_optimizer(args: Any, model_chunks: Any, optimizer: Any) -> WeightScaling | None:
    """Print what runs in which precision, start automatic weight scaling if a recipe in use predicts (returns its clock), log and metrics if asked for."""
    if getattr(args, "fp8_log", None):
        report.install_log(args.fp8_log)
    chunks = list(model_chunks) if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    specs = specs_in_use(args)
    clock = _start_scaling(args, chunks, optimizer, specs) if specs else None
    if not specs and report.wanted(args) and report.is_rank_0():
        print(report.precision_table(args, chunks), flush=True)
    if metrics.install(chunks, args) is not None:  # after the scales: it reports weights under them; and for bf16 and stock recipes too
        metrics.install_training_log()
    return clock


def _start_scaling(args: Any, chunks: list[Any], optimizer: Any, specs: list[str]) -> WeightScaling | None:
    from . import head, mlp
    from .shims import refuse_wrong_device

    if torch.cuda.is_available():
        refuse_wrong_device()
    head.check(args, chunks)
    mlp.mark_weights(chunks)
    if report.is_rank_0():
        print(report.precision_table(args, chunks), flush=True)
    recipes = [arguments.resolve(spec) for spec in specs]
    recipes += [recipe.dense_recipe for recipe in recipes if recipe.dense]
    predicted = [recipe for recipe in recipes if recipe.weight_scale == "predicted"]
    if not predicted:
        return None
    experts, dense = any(r.moe == "flow" for r in predicted), any(r.dense_recipe is r for r in predicted)
    return attach(chunks, optimizer, interval=min(r.interval for r in predicted), dense=dense, experts=experts)


def specs_in_use(args: Any) -> list[str]:
    """Specifications of our recipes that this run uses: by --fp8-recipe and by the per-module precision file."""
    from . import factories

    spec = arguments.in_force(args)
    specs = [spec] if spec else []
    path = getattr(args, "te_precision_config_file", None)
    if path:
        import yaml

        with open(path) as stream:
            names = (factories.recipe_name(value) for value in _values_of("custom_recipe_factory", yaml.safe_load(stream)))
            specs += [name for name in names if name and name not in specs]
    return specs


def _values_of(key: str, tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _values_of(key, value)
    elif isinstance(tree, list):
        for item in tree:
            yield from _values_of(key, item)


def attach(chunks: list[torch.nn.Module], optimizer: Any, interval: int, dense: bool = True, experts: bool = False) -> WeightScaling:
    """Put TransformerEngine's linear weights in the model's chunks, and an FP8 head's, under one clock, driven by all inner optimizers of ``optimizer``.

    dense, experts: those of the dense linears; those of the grouped ones, one scale per expert.
    """
    clock = WeightScaling(interval=interval, on_message=report.say)
    weights = [(weight, group) for chunk in chunks for weight, group in fp8_weights(chunk, dense, experts)]
    for weight, group in weights:
        clock.track(weight, group)
    inner = inner_optimizers(optimizer)
    for one in inner:
        clock.attach(one)
    _clocks.append(clock)
    report.say(f"fp8_recipes: {len(weights)} weight scales predicted from the learning rate, measured every {clock.effective_interval or 1} steps")
    return clock


def fp8_weights(model: torch.nn.Module, dense: bool = True, experts: bool = False) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """(weight, process group) of TransformerEngine's dense linears and of its grouped ones, as asked, and of an FP8 LM head under a predicted scale.

    The group is that of the tensor-parallel ranks that hold the other shards, None if unsharded; an expert's weight is whole on one rank.
    """
    from transformer_engine.pytorch import GroupedLinear

    from ..te.factory import weights_of
    from . import head

    yield from head.predicted_weights(model)
    if dense:
        yield from ((weight, group) for _, weight, group in weights_of(model))
    for module in model.modules():
        if experts and isinstance(module, GroupedLinear):
            yield from ((parameter, None) for parameter in module.parameters(recurse=False) if parameter.dim() == 2)


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's: one per ChainedOptimizer member, less the stubs of ranks that own no parameters."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    found: list[torch.optim.Optimizer] = []
    for member in members:
        if hasattr(member, "chained_optimizers"):
            found += inner_optimizers(member)
            continue
        inner = getattr(member, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            found.append(inner)
        elif isinstance(member, torch.optim.Optimizer):
            found.append(member)
        elif not getattr(member, "is_stub_optimizer", False):
            raise RuntimeError(
                f"{type(member).__name__} holds no torch optimizer to read the learning rate from; use --optimizer adam, or weight_scale=measured in the recipe"
            )
    return found
