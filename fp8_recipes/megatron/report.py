"""What the user is told at start (which layer runs what) and what is kept of every iteration (JSON lines)."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..metrics.alarms import layer_ranges
from . import arguments, fog_arguments

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def wanted(args: Any) -> bool:
    """Is there something of ours to tell of a run without a recipe of ours: an architecture, FP8 attention (recipe fog)?"""
    return fog_arguments.asked(args) or arguments.fp8_attention(args)


def precision_table(args: Any, chunks: list[torch.nn.Module]) -> str:
    """Table of this rank's modules: name, layers, weight shape, precision. Layers of one name, shape and precision share a row."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for chunk in chunks:
        for name, shape, precision, layer in _modules(args, chunk):
            rows.setdefault((name, shape, precision), []).append(layer)
    spec = str(args.fp8_recipe) if getattr(args, "fp8", None) or arguments.in_force(args) else "bf16"
    title = f"fp8_recipes {__version__}: --fp8-recipe {spec}"
    architecture = fog_arguments.architecture_of(args)
    if architecture is not None:
        title += f"\n  {architecture}"
    if arguments.in_force(args):
        recipe = arguments.resolve(spec)
        title += f"\n  {recipe}" + (f"\n  other layers: {replace(recipe.dense_recipe, head=recipe.head)}" if recipe.dense else "")
    body = [("module", "layers", "weight", "runs in")] + [(name, _ranges(layers), shape, precision) for (name, shape, precision), layers in rows.items()]
    widths = [max(len(row[column]) for row in body) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return "\n".join([title, *("  " + line for line in lines + _attention(chunks) + _moe_layers(args, chunks) + _fused_mlps(args, chunks) + _head(chunks))])


def _attention(chunks: list[torch.nn.Module]) -> list[str]:
    """Which attention layers bounded by tanh take their queries and keys through one operation, and which not, and why."""
    from . import fog_attention

    ways: dict[str, list[int]] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, fog_attention.BoundedSelfAttention):
                ways.setdefault(fog_attention.describe(module), []).append(int(module.layer_number))
    return [f"attention of layers {_ranges(layers)}: {way}" for way, layers in ways.items()]


def _head(chunks: list[torch.nn.Module]) -> list[str]:
    """What an LM head in FP8 replaces: Megatron's loss too, where its gradient can be made in FP8 at once."""
    from . import head, head_loss

    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, head.OutputLayer)]
    loss = "in one pass each way, its gradient made in FP8" if layers and head_loss.takes(layers[0].recipe) else "Megatron's"
    return [f"LM head: products in FP8, cross-entropy {loss} (head=bf16: both Megatron's, in bf16)"] if layers else []


def _fused_mlps(args: Any, chunks: list[torch.nn.Module]) -> list[str]:
    """Whether the MLPs run as one function (see `mlp`) or module by module, and why."""
    if not (arguments.in_force(args) and args.fp8):
        return []
    from megatron.core.transformer.mlp import MLP

    from .mlp import static_reason, weight_cache_note

    recipe = arguments.resolve(str(args.fp8_recipe)).dense_recipe
    gated = bool(getattr(args, "swiglu", True))
    fused = f"in FP8 layers {'norm, fc1, SwiGLU' if gated else 'fc1, activation'} and fc2 as one function"
    ways: dict[str, int] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MLP):
                reason = static_reason(module, recipe)
                way = fused if reason is None else f"module by module: {reason}"
                way += weight_cache_note(module, recipe)
                ways[way] = ways.get(way, 0) + 1
    return [f"{count} MLPs: {way}" for way, count in ways.items()]


def _moe_layers(args: Any, chunks: list[torch.nn.Module]) -> list[str]:
    """Which MoE layers run as one function from dispatch to combine, and which as Megatron's own modules, and why. Raises RecipeError (see `moe.check`)."""
    if not arguments.is_flow(arguments.in_force(args)):
        return []
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from . import moe

    ways: dict[str, list[int]] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                ways.setdefault(moe.describe(module), []).append(int(module.layer_number or -1))
    return [f"MoE layers {_ranges(layers)}: {way}" for way, layers in ways.items()]


def _modules(args: Any, chunk: torch.nn.Module) -> list[tuple[str, str, str, int]]:
    """(name without layer number, weight shape, precision, global layer number or -1) of every module that multiplies or normalises."""
    from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, LayerNormMLP, Linear

    from .head import OutputLayer

    attention = "FP8 (attention)" if arguments.fp8_attention(args) else "bf16 (attention)"
    found: list[tuple[str, str, str, int]] = []
    layers: dict[str, int] = {}
    for path, module in chunk.named_modules():
        path = re.sub(r"^(module\.)+", "", path)
        if hasattr(module, "layer_number") and re.search(r"layers\.\d+$", path):
            layers[path] = int(module.layer_number)
        owner = next((layers[prefix] for prefix in layers if path.startswith(prefix + ".")), -1)
        name = _LAYER.sub("layers.*.", path)
        weights = [tuple(p.shape) for p in module.parameters(recurse=False)]
        matrix = next((shape for shape in weights if len(shape) == 2), None)
        if isinstance(module, (Linear, LayerNormLinear, LayerNormMLP)):
            found.append((name, _shape(matrix), _precision(args, module, owner), owner))
        elif isinstance(module, GroupedLinear):
            found.append((name, f"{module.num_gemms} of {_shape(matrix)}", _precision(args, module, owner, experts=True), owner))
        elif isinstance(module, OutputLayer):
            name = name if matrix else f"{name} (weight of the embedding)"
            found.append((name, _shape((module.output_size_per_partition, module.input_size)), f"FP8 {module.recipe.name}, dy {module.recipe.grad}", owner))
        elif matrix is not None:
            router = path.endswith(".router") and getattr(args, "moe_router_dtype", None)
            found.append((name, _shape(matrix), f"bf16, products in {router}" if router else "bf16", owner))
        elif weights:
            found.append((name, _shape(weights[0]), "bf16" if weights[0] == (1,) else "bf16 (norm)", owner))
        elif path.endswith("core_attention"):
            found.append((name, "-", attention, owner))
    return found


def _precision(args: Any, module: Any, layer: int, experts: bool = False) -> str:
    override = getattr(module, "te_quant_params", None)
    if override is not None:
        recipe = override.training_recipe
        chosen = recipe.custom_recipe_factory or recipe.fp8_quantization_recipe
        return f"FP8 {chosen} (precision file)" if chosen else "bf16 (precision file)"
    spec = arguments.in_force(args)
    if not (getattr(args, "fp8", None) or (experts and spec)):
        return "bf16"
    if layer > 0 and getattr(args, "first_last_layers_bf16", False):
        first, last = args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16
        if layer <= first or layer > args.num_layers - last:
            return "bf16 (first / last)"
    if spec and not experts:
        return f"FP8 {arguments.resolve(spec).dense or spec.partition(':')[0]}"
    return f"FP8 {str(args.fp8_recipe).partition(':')[0]}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "-"


def _ranges(numbers: list[int]) -> str:
    """`layer_ranges`; modules outside layers -> "-"."""
    return layer_ranges(n for n in numbers if n > 0)


def is_rank_0() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def say(message: str) -> None:
    """Print on rank 0."""
    if is_rank_0():
        print(message, flush=True)


class IterationLog:
    """One JSON line per iteration.

    Keys: iteration, lm_loss, lm_loss_hex (the exact bits), grad_norm, learning_rate, ms (wall time since the last line), peak_mb, skipped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last: float | None = None

    def write(self, iteration: int, loss: dict[str, Any], learning_rate: Any, grad_norm: Any, skipped: int) -> None:
        """Reads the loss from the device, so it waits for the iteration; ``ms`` is therefore the iteration's own time."""
        values = {key: float(value) for key, value in loss.items()}
        now = time.perf_counter()
        line: dict[str, Any] = {"iteration": iteration}
        for key, value in values.items():
            line[key.replace(" ", "_")] = value
            line[key.replace(" ", "_") + "_hex"] = value.hex()
        line["grad_norm"] = None if grad_norm is None else float(grad_norm)
        line["learning_rate"] = None if learning_rate is None else float(learning_rate)
        line["ms"] = None if self._last is None else (now - self._last) * 1e3
        line["peak_mb"] = peak_mb()
        line["skipped"] = int(skipped)
        with open(self.path, "a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._last = time.perf_counter()


def peak_mb() -> float | None:
    """Largest memory held by tensors since the process began, in MB of 2**20 bytes as Megatron counts; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def install_log(path: str) -> None:
    """Write `IterationLog` lines to ``path`` from ``megatron.training.training.training_log``, on the last rank (the one that has the loss). Idempotent."""
    from megatron.training import training
    from megatron.training.utils import is_last_rank

    from .shims import replace

    log = IterationLog(path)

    def wrapper(original: Any) -> Any:
        def training_log(*values: Any, **kwargs: Any) -> Any:
            # loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, grad_norm
            if is_last_rank():
                log.write(values[3], values[0], values[2], values[7], values[6])
            return original(*values, **kwargs)

        return training_log

    replace(training, "training_log", wrapper)


def print_summary() -> None:
    """One machine-readable line per run on rank 0: peak memory over all ranks (`parse_log` reads it)."""
    peak = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], dtype=torch.float64, device="cuda")
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    allocated, reserved = (int(x) for x in peak.tolist())
    say("fp8_recipes_summary " + json.dumps({"peak_allocated_bytes": allocated, "peak_reserved_bytes": reserved}))
