"""What delayed scaling remembers (maxima and scales, of attention and of linears) in Megatron's checkpoints, as plain tensors.

TransformerEngine pickles it into every module's extra state and refuses to read a pickle back (NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 allows it), and
Megatron leaves attention's out. So a run with delayed scaling could not resume, or not with its own bits. Here every module saves four tensors:

    fp8_delayed_scaling.decoder.layers.3.self_attention.core_attention.forward.amax_history    [history, slots] fp32
    fp8_delayed_scaling.decoder.layers.3.self_attention.core_attention.forward.scale           [slots] fp32          ... and backward

Layers are counted over the whole model, and maxima are reduced over tensor, data and context parallel ranks, so all these ranks hold the same values: one
of them writes, and a checkpoint loads under any other division of the model. A run without delayed scaling asks for none of it.

Row 0 of a history collects the maxima since it was last moved on. After a training step it is zero; after an evaluation it is not, and differs between
ranks until the next reduction. `settle` makes that reduction early. A maximum does not care, so the run that goes on keeps its bits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..te.shims import replace

KEY = "fp8_delayed_scaling"
FORMATS = ("torch_dist", "torch")
"""Values of --ckpt-format that take these tensors."""
DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
_STACK = re.compile(r"(decoder|encoder)\.layers\.\d+$")


@dataclass
class _Now:
    """Which of Megatron's functions is under way. saving: into a format that takes tensors. loading: the model that `load_checkpoint` fills."""

    saving: bool = False
    loading: Sequence[torch.nn.Module] | None = None


_now = _Now()


def install() -> None:
    """Put the tensors into ``megatron.training``'s checkpoints and take them out again, in place of TransformerEngine's pickles. Idempotent.

    Megatron has no callback for either: ``save_checkpoint`` runs on every rank, ``generate_state_dict`` makes what is written, ``_load_base_checkpoint``
    knows the directory. 0.19 with TransformerEngine 2.20. Can go when TransformerEngine keeps delayed scaling's state without a pickle and Megatron saves
    attention's.
    """
    from megatron.training import checkpointing, training
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for place in (checkpointing, training):  # training imports both names
        replace(place, "save_checkpoint", _save_checkpoint)
        replace(place, "load_checkpoint", _load_checkpoint)
    replace(checkpointing, "generate_state_dict", _generate_state_dict)
    replace(checkpointing, "_load_base_checkpoint", _load_base_checkpoint)
    replace(TransformerEngineBaseModule, "get_extra_state", _get_extra_state)
    replace(TransformerEngineBaseModule, "set_extra_state", _set_extra_state)


# --- Megatron's functions -----------------------------------------------------------------------------------------------------------------------------------


def _save_checkpoint(original: Any) -> Any:
    signature = inspect.signature(original)

    def save_checkpoint(*values: Any, **named: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        local = signature.bind(*values, **named).arguments.get("non_persistent_ckpt", False) and args.non_persistent_ckpt_type == "local"
        settle()
        _now.saving = args.ckpt_format in FORMATS and not local
        try:
            return original(*values, **named)
        finally:
            _now.saving = False

    return save_checkpoint


def _generate_state_dict(original: Any) -> Any:
    def generate_state_dict(args: Any, model: Any, *values: Any, **named: Any) -> Any:
        state_dict = original(args, model, *values, **named)
        found = tensors(model) if _now.saving else {}
        if found:
            state_dict[KEY] = {name: _sharded(name, tensor) for name, tensor in found.items()} if args.ckpt_format == "torch_dist" else found
        return state_dict

    return generate_state_dict


def _load_checkpoint(original: Any) -> Any:
    def load_checkpoint(ddp_model: Any, *values: Any, **named: Any) -> Any:
        _now.loading = ddp_model
        try:
            return original(ddp_model, *values, **named)
        finally:
            _now.loading = None

    return load_checkpoint


def _load_base_checkpoint(original: Any) -> Any:
    def _load_base_checkpoint(load_dir: Any, args: Any, rank0: bool = False, *values: Any, **named: Any) -> Any:
        result = original(load_dir, args, rank0, *values, **named)
        state_dict, path, _, kind = result
        if _now.loading is not None and not rank0 and state_dict is not None:  # before the weights: FP8 parameters are cast by these scales
            restore(_now.loading, str(path), None if kind.name == "GLOBAL" else state_dict.pop(KEY, {}))
        return result

    return _load_base_checkpoint


def _get_extra_state(original: Any) -> Any:
    def get_extra_state(self: Any) -> Any:
        if _now.saving and any(True for _ in _states(self)):
            return torch.empty(0, dtype=torch.uint8)
        return original(self)

    return get_extra_state


def _set_extra_state(original: Any) -> Any:
    """A pickle of an older checkpoint is passed over instead of ending the run, in bf16 too; `restore` says that maxima are gathered anew."""
    from transformer_engine.pytorch._extra_state import unsafe_pickle_extra_state_enabled

    def set_extra_state(self: Any, state: Any) -> None:
        if unsafe_pickle_extra_state_enabled():
            original(self, state)

    return set_extra_state


# --- what is kept -------------------------------------------------------------------------------------------------------------------------------------------


def modules(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """(name, module) of every TransformerEngine module of this rank's ``chunks``; layers are numbered over the whole model, from 0."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for chunk in chunks:
        numbered: dict[str, str] = {}
        for path, module in chunk.named_modules():
            path = re.sub(r"^(module\.)+", "", path)
            if _STACK.match(path):
                numbered[path] = f"{path.rpartition('.')[0]}.{int(module.layer_number) - 1}"  # type: ignore[arg-type]
            if isinstance(module, TransformerEngineBaseModule):
                layer = next((prefix for prefix in numbered if path.startswith(prefix + ".")), "")
                yield (numbered[layer] + path[len(layer) :] if layer else path), module


def _states(module: Any) -> Iterator[tuple[str, Any]]:
    """(direction, TransformerEngine's state with amax_history and scale) of a module under delayed scaling; nothing of any other."""
    from transformer_engine.pytorch import DotProductAttention

    recipe = module.fp8_meta.get("recipe")
    if isinstance(module, DotProductAttention) and recipe is not None and not recipe.fp8_dpa:
        return  # it has one, all zeros, whenever the linears around it are delayed
    for direction, key in DIRECTIONS.items():
        state = module.fp8_meta.get(key)
        if getattr(state, "amax_history", None) is not None:
            yield direction, state


def has_maxima(module: Any) -> bool:
    """Of gradients: an evaluation before the first step leaves those of the forward pass. A history of one step is empty between two; its scale is not 1."""
    state = dict(_states(module)).get("backward")
    return state is not None and bool((state.amax_history != 0).any() or (state.scale != 1).any())


def tensors(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """{"<module>.<direction>.amax_history": [history, slots], "<module>.<direction>.scale": [slots], ...} of this rank's modules, fp32, not copied."""
    found: dict[str, torch.Tensor] = {}
    for name, module in modules(chunks):
        for direction, state in _states(module):
            found[f"{name}.{direction}.amax_history"] = state.amax_history
            found[f"{name}.{direction}.scale"] = state.scale
    return found


def _sharded(name: str, tensor: torch.Tensor) -> Any:
    """Held alike by all tensor and data (and context) parallel ranks: Megatron writes it once."""
    from megatron.core.utils import make_sharded_tensor_for_checkpoint

    return make_sharded_tensor_for_checkpoint(tensor, f"{KEY}.{name}")


def settle() -> None:
    """Reduce the maxima collected since the last reduction (row 0 of every history) over their group, in place. On every rank, as a collective."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager, split_and_copy

    if not torch.distributed.is_initialized():
        return
    state = FP8GlobalStateManager.quantization_state
    for key, rows in state.global_amax_buffer.items():
        recipe, group = state.autocast_arguments[FP8GlobalStateManager.split_key_in_buffer(key)[1]]
        if rows and recipe.reduce_amax and torch.distributed.get_world_size(group) > 1:
            together = torch.cat(rows)
            torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX, group=group)
            split_and_copy(together, rows, [row.numel() for row in rows])


# --- restoring ------------------------------------------------------------------------------------------------------------------------------------------------


def recipe_in_force(chunks: Sequence[torch.nn.Module]) -> Any:
    """The TransformerEngine recipe under which modules of ``chunks`` remember maxima in this run, None if none do (bf16, current scaling, ...)."""
    from megatron.core import fp8_utils
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    if not config.fp8:
        return None
    recipe = fp8_utils.get_fp8_recipe(config)
    return recipe if recipe.delayed() or (recipe.custom() and recipe.fp8_dpa) else None


def remembers(module: Any, recipe: Any) -> bool:
    """Will this module keep maxima under ``recipe``? Under recipes of this package attention alone does."""
    from transformer_engine.pytorch import DotProductAttention

    if isinstance(module, DotProductAttention):
        return bool(recipe.fp8_dpa)
    in_fp8 = getattr(module, "will_execute_quantized", None)  # --te-precision-config-file may say otherwise
    return bool(recipe.delayed()) and (in_fp8 is None or bool(in_fp8(True)))


def restore(chunks: Sequence[torch.nn.Module], path: str, saved: dict[str, torch.Tensor] | None = None) -> None:
    """Give this rank's modules the maxima and scales of the checkpoint at ``path``, and say on rank 0 how many have them. On every rank, as a collective.

    saved: the tensors of a checkpoint that has been read (format torch); None: a torch_dist checkpoint, of which only these are read here.
    """
    from megatron.core.utils import get_model_config

    recipe = recipe_in_force(chunks)
    if recipe is None:
        return
    wanted = {name: module for name, module in modules(chunks) if remembers(module, recipe)}
    if saved is None:
        saved = _read(path, set(wanted))
    restored = {name for name, module in wanted.items() if _put(name, module, recipe, saved)}
    _register([wanted[name] for name in wanted if name in restored], recipe, get_model_config(chunks[0]))
    resized = {len(saved[f"{name}.forward.amax_history"]) for name in restored} - {len(state.amax_history) for n in restored for _, state in _states(wanted[n])}
    _report(path, restored, wanted.keys() - restored, resized)


def _read(path: str, names: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of the named modules as far as the torch_dist checkpoint at ``path`` has them, on the CPU."""
    from megatron.core import dist_checkpointing

    known = {key[len(KEY) + 1 :]: shape for key, shape in dist_checkpointing.load_tensors_metadata(path).items() if key.startswith(KEY + ".")}
    if not known:  # the same on every rank
        return {}
    ours = [name for name in known if name.rsplit(".", 2)[0] in names]
    empty = {name: _sharded(name, torch.empty(known[name].global_shape, dtype=known[name].dtype)) for name in ours}
    return dict(dist_checkpointing.load({KEY: empty}, path).get(KEY, {}))


def _put(name: str, module: Any, recipe: Any, saved: dict[str, torch.Tensor]) -> bool:
    """Copy one module's tensors into its state. False if they are not all there, or of another shape."""
    kept = {direction: [saved.get(f"{name}.{direction}.{what}") for what in ("amax_history", "scale")] for direction in DIRECTIONS}
    if any(tensor is None for pair in kept.values() for tensor in pair):
        return False
    module.fp8_meta["num_gemms"] = _products(module)
    module.init_fp8_meta_tensors(recipe)  # nothing where there was a forward pass already
    states = dict(_states(module))
    if any(kept[direction][1].shape != states[direction].scale.shape for direction in DIRECTIONS):  # type: ignore[union-attr]
        return False  # experts divided over another number of ranks
    with torch.no_grad():
        for direction, (history, scale) in kept.items():
            state = states[direction]
            state.scale.copy_(scale)
            rows = min(len(history), len(state.amax_history)) - 1  # type: ignore[arg-type]
            state.amax_history.zero_()
            state.amax_history[0].copy_(history[0])  # type: ignore[index]  # since the last move
            if rows:
                state.amax_history[-rows:].copy_(history[-rows:])  # type: ignore[index]  # the newest are the last
    return True


def _register(restored: list[Any], recipe: Any, config: Any) -> None:
    """Let the modules take part in the very next reduction, as they would have in the run that went on.

    TransformerEngine registers a module at its first forward pass. Where a rank runs several regions in turn (virtual pipeline stages), the first of them
    would move the histories of its own modules only.
    """
    from megatron.core import parallel_state
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    group = parallel_state.get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red)  # as get_fp8_context
    for module in restored:
        if getattr(module, "te_quant_params", None) is None:  # a module with a recipe of its own has a reduction of its own
            module.fp8_meta.update(recipe=recipe, fp8_group=group)
            FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(module.fp8_meta)


def _products(module: Any) -> int:
    """TransformerEngine's num_gemms of a module: three slots each forward, two backward."""
    from transformer_engine.pytorch import DotProductAttention, LayerNormMLP

    if isinstance(module, DotProductAttention):
        return 3
    return 2 if isinstance(module, LayerNormMLP) else int(getattr(module, "num_gemms", 1))


def _report(path: str, restored: set[str], missing: set[str], resized: set[int]) -> None:
    """One line on rank 0 about the modules of all ranks. resized: lengths of histories that are not this run's."""
    from megatron.training import get_args
    from transformer_engine.pytorch._extra_state import unsafe_pickle_extra_state_enabled

    from .calibration import wanted

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    parts: list[Any] = [(restored, missing, resized)]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, (restored, missing, resized))
        if torch.distributed.get_rank() != 0:
            return
    there, absent, other = (set().union(*column) for column in zip(*parts, strict=True))
    anew = "start anew: " + ("measured before the first step" if wanted(get_args()) else "empty history, scale 1 in the first step")
    if unsafe_pickle_extra_state_enabled():
        anew += ", unless TransformerEngine's pickles have theirs"
    if not there:
        line = f"{path} holds no maxima of delayed scaling (from bf16, another recipe or an older version): all {len(absent)} modules {anew}"
    elif absent:
        examples = ", ".join(sorted(absent)[:3])
        line = f"maxima and scales of {len(there)} modules as saved; {len(absent)} are not in {path} or of another shape ({examples}): they {anew}"
    else:
        line = f"maxima and scales of {len(there)} modules under delayed scaling as saved"
    if other:
        line += f"; history of {', '.join(map(str, sorted(other)))} there: the newest steps that fit are kept"
    print(f"fp8_recipes: {line}", flush=True)
