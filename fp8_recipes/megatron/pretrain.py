"""GPT pretraining with the released Megatron-Core wheel, which has everything but a launcher.

    torchrun --nproc-per-node N -m fp8_recipes.pretrain_gpt <Megatron's flags> --fp8-recipe moss

All of Megatron's flags, its own --fp8-recipe values and plain bf16 run through here too, so that peers are measured under the same launcher. Text data and
mock data; SFT, fill-in-the-middle
and packed documents need Megatron's own pretrain_gpt.py with one line on top: ``import fp8_recipes.megatron_adaptor``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from typing import Any

import torch

from ..recipe import RecipeError
from . import report, shims

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_UNSUPPORTED = {
    "sft": "--sft",
    "fim_data": "--fim-data",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
}


def main(argv: list[str] | None = None) -> None:
    """Parse, validate, train. ``argv``: the command line without the program name (default: sys.argv)."""
    start = time.time()
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    try:
        shims.install()
    except (ImportError, RuntimeError) as error:  # something is missing or of an untested version
        sys.exit(f"fp8_recipes: {error}")
    try:
        _, container = configure()
    except RecipeError as error:  # asked for something that cannot be honoured
        sys.exit(f"fp8_recipes: {error}")
    except OSError as error:  # a file that a flag names
        sys.exit(f"fp8_recipes: {error.filename}: {error.strerror}" if error.filename else f"fp8_recipes: {error}")
    if not torch.cuda.is_available():
        sys.exit("fp8_recipes: Megatron trains on CUDA GPUs and torch finds none; 'fp8-recipes demo' trains a small model without one")
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps

    set_startup_timestamps(program_start=start, main_entry=time.time())
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron's contract: the builder decides itself which ranks hold data
    try:
        pretrain(container, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except SystemExit:  # Megatron leaves this way at --exit-interval and --exit-duration
        report.print_summary()
        raise
    report.print_summary()
    torch.distributed.destroy_process_group()


def configure() -> tuple[argparse.Namespace, Any]:
    """Install the shims, parse and validate the command line, build Megatron's configuration. Needs no GPU."""
    shims.install()
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"eval_interval": 1000})  # 0.19 divides by it even with --eval-iters 0
    given = [flag for name, flag in _UNSUPPORTED.items() if getattr(args, name, None)]
    if given:
        raise RecipeError(
            f"{', '.join(given)}: not in this launcher; use Megatron's own pretrain_gpt.py with 'import fp8_recipes.megatron_adaptor' as its first line"
        )
    return args, pretrain_cfg_container_from_args(args, gpt_config_from_args(args))


# --- data -------------------------------------------------------------------------------------------------------------------------------------------------


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> Any:
    """(train, valid, test) datasets of at least ``samples`` sequences each."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args, print_rank_0
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()

    def on_this_rank() -> bool:
        return is_first_or_last_pipeline_stage(vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0

    print_rank_0("> building train, validation and test datasets ...")
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, on_this_rank, dataset_config(args)).build()


def dataset_config(args: argparse.Namespace) -> Any:
    """Megatron's GPTDatasetConfig from its flags."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as stream:
            sequences = json.load(stream)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        tokenizer=build_tokenizer(args),
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size if args.sequence_parallel else 0,
    )


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """This rank's share of the next microbatch; every value None on middle pipeline stages."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(_BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = dict.fromkeys(_BATCH_KEYS)
    if tp_rank == 0:
        sample = next(data_iterator)
        batch.update({key: sample[key].cuda(non_blocking=True) for key in _BATCH_KEYS if sample.get(key) is not None})
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=args.mtp_num_layers is not None,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {key: batch[key] for key in _BATCH_KEYS}


# --- one microbatch -----------------------------------------------------------------------------------------------------------------------------------------


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """Megatron's forward_step contract: (output, loss function of the output)."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    kwargs = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    loss = partial(loss_func, batch["loss_mask"])
    if return_schedule_plan:  # --overlap-moe-expert-parallel-comm
        return model.build_schedule_plan(*inputs, **kwargs), loss
    return model(*inputs, **kwargs), loss


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(sum of the losses of this microbatch, number of tokens, report). ``output``, ``loss_mask``: [batch, seq]."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        check = partial(get_rerun_state_machine().validate_result, result=loss, tolerance=0.0, fatal=True)
        check(rejection_func=torch.isnan, message="NaN in the loss of this rank")
        check(rejection_func=torch.isinf, message="Inf in the loss of this rank")
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}
