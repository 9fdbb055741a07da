"""One of two ranks (gloo, CPU) that save and load checkpoints under delayed scaling: ``python delayed_worker.py RANK DIRECTORY JOBS.json``.

Real Megatron models by the launcher's own path, Megatron's own save and load, TransformerEngine's own states and their reduction. What a GPU would do is
left out: a step opens the FP8 region, lets every module set up as in a forward pass, and writes maxima where the casting kernels would (`step`).
A job: name; flags; load, save: directories; first: number of the first step; steps before the save, after it; evaluate: before the save; pickles: save as
TransformerEngine does. Writes to DIRECTORY/NAME-RANK.pt what the job's modules remembered when it had loaded, when it saved and at its end, the scales that
each step read, and what was printed.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
import types
import zlib
from pathlib import Path

import torch

FLAGS = (
    "--num-layers 2 --hidden-size 128 --ffn-hidden-size 128 --num-attention-heads 2 --kv-channels 128 --seq-length 128 --max-position-embeddings 128 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 9 --lr 3e-4 --bf16 --normalization RMSNorm --swiglu --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 256 --eval-iters 0 --no-rope-fusion --use-cpu-initialization "
    "--no-save-optim --no-load-optim --no-save-rng --no-load-rng"
)


def without_gpu() -> None:
    """Let TransformerEngine and Megatron build their modules, states and checkpoints on the CPU."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.training import checkpointing
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import quantization

    hopper = {"get_device_capability": (9, 0), "get_device_properties": types.SimpleNamespace(major=9, minor=0)}
    for name, answer in ({"is_available": True, "current_device": "cpu", "device_count": 1, "synchronize": None} | hopper).items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    create = quantization.RecipeState.create
    quantization.RecipeState.create = staticmethod(lambda recipe, **given: create(recipe, **given | {"device": torch.device("cpu")}))
    quantization.get_default_fp8_recipe = DelayedScaling
    quantization.check_recipe_support = lambda recipe: None
    quantization.FP8GlobalStateManager.is_fp8_available = lambda: (True, "")
    checkpointing.read_metadata = lambda path: (int(Path(path).read_text()), False)  # upstream agrees on it through a CUDA tensor


def build(flags: str):
    """(model chunks, arguments) of this rank."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.global_vars import unset_global_variables
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from fp8_recipes.megatron import pretrain

    FP8GlobalStateManager.reset()
    unset_global_variables()
    unset_num_microbatches_calculator()
    sys.argv = ["pretrain_gpt", *FLAGS.split(), *flags.split()]
    torch.cuda.is_available = lambda: False
    args, container = pretrain.configure()
    torch.cuda.is_available = lambda: True
    parallel_state.destroy_model_parallel()
    sizes = {"expert_model_parallel_size": args.expert_model_parallel_size, "expert_tensor_parallel_size": args.expert_tensor_parallel_size}
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size, **sizes)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return [container.model.get_builder_cls()(container.model).build_model(groups, pre_process=first, post_process=last)], args


def step(chunks, number: int, rank: int, training: bool = True) -> dict[str, torch.Tensor]:
    """One microbatch: the scales that it casts with, by module. Maxima differ between ranks, and halve from step to step."""
    from megatron.core import fp8_utils
    from megatron.core.utils import get_model_config
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from fp8_recipes.megatron import delayed_state

    recipe = delayed_state.recipe_in_force(chunks)
    inside = [] if recipe is None else [(n, m) for n, m in delayed_state.modules(chunks) if delayed_state.remembers(m, recipe)]
    read: dict[str, torch.Tensor] = {}

    def cast(key: str) -> None:
        for name, module in inside:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {name} {number} {rank} {training}".encode()))
            read[f"{name}.{key}"] = torch.stack([q.scale.clone() for q in module.quantizers[key]])
            for quantizer in module.quantizers[key]:
                torch.maximum(quantizer.amax, (1 + torch.rand(1, generator=generator)) * 2.0 ** (5 - number), out=quantizer.amax)

    with torch.set_grad_enabled(training), fp8_utils.get_fp8_context(get_model_config(chunks[0])):
        for _, module in inside:  # as TransformerEngineBaseModule.prepare_forward
            module.init_fp8_metadata(num_gemms=delayed_state._products(module))
            FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(module.fp8_meta)
        cast("scaling_fwd")
    if training:
        cast("scaling_bwd")
        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
    return read


def run(job: dict, rank: int, directory: Path) -> dict:
    from megatron.training import checkpointing, training
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from fp8_recipes.megatron import delayed_state

    where = "".join(f" --{verb} {directory / job[verb]}" for verb in ("load", "save") if verb in job) + (" --save-interval 9" if "save" in job else "")
    chunks, _ = build(job["flags"] + where)
    result: dict = {"read": []}
    if "load" in job:
        training.load_checkpoint(chunks, None, None)
        result["loaded"] = copy(delayed_state.tensors(chunks))
        result["registered"] = sum(map(len, FP8GlobalStateManager.quantization_state.global_amax_buffer.values()))
    number = job.get("first", 1)
    for _ in range(job.get("before", 0)):
        result["read"].append(step(chunks, number, rank))
        number += 1
    if job.get("evaluate"):
        step(chunks, 0, rank, training=False)
        result["unsettled"] = copy(delayed_state.tensors(chunks))
    if "save" in job:
        save = inspect.unwrap(checkpointing.save_checkpoint) if job.get("pickles") else training.save_checkpoint
        save(7, chunks, None, None, 0)
        result["saved"] = copy(delayed_state.tensors(chunks))
    for _ in range(job.get("after", 0)):
        result["read"].append(step(chunks, number, rank))
        number += 1
    result["end"] = copy(delayed_state.tensors(chunks))
    return result


def copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def main(rank: int, directory: Path, jobs: list[dict]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", CUDA_DEVICE_MAX_CONNECTIONS="1", NVTE_UNFUSED_FP8_UPDATE="1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    from fp8_recipes.megatron import shims

    shims.install()
    without_gpu()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=torch.distributed.FileStore(str(directory / "store"), 2))
    torch.compiler.set_stance("force_eager")
    for job in jobs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = run(job, rank, directory)
        torch.save(result | {"printed": [line for line in printed.getvalue().splitlines() if "maxima" in line]}, directory / f"{job['name']}-{rank}.pt")
    torch.distributed.barrier()  # leave together: a rank that is gone early may abort in gloo's threads
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
