"""Real Megatron GPTs on the CPU under an architecture of this package: the released wheel's GPTModel from its local modules, in fp32."""

from __future__ import annotations

import contextlib
import os
import unittest.mock

import torch

from fp8_recipes.architecture import Architecture
from fp8_recipes.nn.gpt import GPT, GPTConfig

LAYERS, WIDTH, HEADS, GROUPS, FFN, VOCAB, SEQ, BATCH = 2, 64, 4, 2, 96, 64, 16, 2


@contextlib.contextmanager
def on_cpu(experts: bool = False):
    """Megatron puts scratch buffers onto the current GPU and draws dropout's numbers from its generator; its router multiplies through TransformerEngine."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    device = unittest.mock.patch("torch.cuda.current_device", return_value="cpu")
    generator = unittest.mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    router = unittest.mock.patch.object(moe_utils, "te_general_gemm", None) if experts else contextlib.nullcontext()
    with device, generator, router, torch.compiler.set_stance("force_eager"):
        yield


def initialise(rank: int = 0, world: int = 1, store: str = "", tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
    """torch.distributed over gloo, Megatron's process groups, our shims. ``store``: a file that all ranks share."""
    from megatron.core import parallel_state

    from fp8_recipes.megatron import shims

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    shims.install()
    kind = torch.distributed.FileStore(store, world) if store else torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, store=kind)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel)


def finish() -> None:
    from megatron.core import parallel_state

    torch.distributed.barrier()  # leave together: a rank that is gone early may abort in gloo's threads
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    del os.environ["RANK"], os.environ["WORLD_SIZE"]  # or later tests of this process take it for one of torchrun's


def config_of(architecture: Architecture, **changes):
    """TransformerConfig as fog_arguments and Megatron make it of the flags."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "ffn_hidden_size": architecture.ffn_width(FFN),
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": architecture.gated,
        "activation_func": torch.nn.functional.silu if architecture.gated else torch.nn.functional.gelu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "pipeline_dtype": torch.float32,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": architecture.qk == "tanh",  # one operation of this package; the others' is TransformerEngine's, in CUDA
    }
    return TransformerConfig(**given | changes)


def build(architecture: Architecture, first: bool = True, last: bool = True, tied: bool = False, vocab: int = VOCAB, **changes):
    """GPTModel; ``first``, ``last``: is this stage the pipeline's first, its last? tied: does the output layer share the embedding's weight?"""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_model import GPTModel

    from fp8_recipes.megatron import fog

    config = config_of(architecture, **changes)
    with on_cpu():
        model = GPTModel(
            config=config,
            transformer_layer_spec=fog.block_spec(architecture, config),
            vocab_size=vocab,
            max_sequence_length=SEQ,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            pre_process=first,
            post_process=last,
        )
    model.ddp_config = DistributedDataParallelConfig()  # what finalize_model_grads reads of a wrapped model
    return model


def plain(architecture: Architecture) -> GPT:
    """The same model of `fp8_recipes.nn.gpt`, with gains away from their initial values so that no gradient is there by symmetry."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab=VOCAB, layers=LAYERS, width=WIDTH, heads=HEADS, ffn=FFN, seq=SEQ, kv_heads=GROUPS, arch=architecture))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape)
        elif not name.startswith("embedding"):
            parameter.data *= 4  # far from a model that says nothing
    return model


def interleave(qkv: torch.Tensor) -> torch.Tensor:
    """Rows of a joint projection from all queries, all keys, all values to Megatron's order: the queries, the key and the value of each group."""
    head = WIDTH // HEADS
    q, k, v = qkv.split((HEADS * head, GROUPS * head, GROUPS * head))
    parts = [t.reshape(GROUPS, -1, *qkv.shape[1:]) for t in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(qkv.shape)


_NAMES = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "head.weight": "output_layer.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv.weight": "self_attention.linear_qkv.weight",
    "attention.q_norm.": "self_attention.q_layernorm.",
    "attention.k_norm.": "self_attention.k_layernorm.",
    "attention.proj.weight": "self_attention.linear_proj.weight",
    "attention_post.weight": "self_attn_bda.post.weight",
    "mlp_norm.weight": "pre_mlp_layernorm.weight",
    "mlp.gate_up.weight": "mlp.linear_fc1.weight",
    "mlp.up.weight": "mlp.linear_fc1.weight",
    "mlp.down.weight": "mlp.linear_fc2.weight",
    "mlp.activation.": "mlp.activation_func.",
    "mlp_post.weight": "mlp_bda.post.weight",
}


def translate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by `nn.gpt`'s parameter names, as values of Megatron's parameters."""
    result = {}
    for name, tensor in tensors.items():
        prefix, rest = "", name
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            prefix = f"decoder.layers.{index}."
        old = next(key for key in sorted(_NAMES, key=len, reverse=True) if rest == key or (key.endswith(".") and rest.startswith(key)))
        value = interleave(tensor) if rest == "attention.qkv.weight" else tensor
        result[prefix + _NAMES[old] + rest[len(old) :]] = value.view(1) if value.dim() == 0 else value
    return result


def shard(name: str, parameter: torch.Tensor, whole: torch.Tensor, rank: int, world: int, gated: bool) -> torch.Tensor:
    """This rank's part of a whole parameter (or gradient), by the attributes that Megatron gave the parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if gated and "linear_fc1" in name:
        return torch.cat([half.chunk(world)[rank] for half in whole.chunk(2)])
    return whole.chunk(world, dim=parameter.partition_dim)[rank]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, SEQ), generator=generator)
    return tokens, labels


def run(model, tokens, labels):
    """Output of one forward pass of a GPTModel (or of its first stage)."""
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    return model(tokens, positions, mask, labels=labels)


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by name, after Megatron's own sum over tensor-parallel ranks."""
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    _allreduce_non_tensor_model_parallel_grads([model], model.config)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
