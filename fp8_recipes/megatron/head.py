"""The LM head in FP8: the products of Megatron's output layer, and the loss between them, under a recipe with ``head=fp8``.

    forward    x [S/TP, B, H] bf16 -[quantise]-> FP8 -[all-gather]-> fprop with this rank's rows of the vocabulary -> logits [S, B, V/TP] bf16 -> loss
    backward   dloss -[softmax's gradient + quantise, E5M2]-> FP8 -dgrad-> bf16 -[reduce-scatter]-> dx
               wgrad from the saved FP8 x, gathered again, into main_grad

With sequence parallelism x travels as FP8, half of bf16's bytes; without it nothing is gathered and dx is summed over the ranks. Saved: this rank's x in FP8,
and the logits in bf16. The gradient of the logits exists in FP8 only (`head_loss`); where somebody else makes the loss, it is quantised from theirs.

GPTModel's output layer is `tensor_parallel.ColumnParallelLinear`, Megatron's own module: no TransformerEngine recipe reaches it. `install` turns it into a
subclass that replaces the product and its gradients; parameters and their names, checkpoints, padding of the vocabulary and the gathering of logits stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch.autograd.function import once_differentiable

from ..nn import products
from ..recipe import Recipe, RecipeError
from ..tensor import ScaledTensor
from . import arguments, head_loss

Observer = Callable[[str, "torch.Tensor | None", ScaledTensor], None]
"""``observer(role, x, q)``: role "input" or "grad", the tensor (None where it was made in FP8) and its quantised form; under sequence parallelism x is this
rank's tokens."""


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer with FP8 products. Made by `install` from the layer that GPTModel built."""

    recipe: Recipe
    fp8_observer: Observer | None

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **how: Any) -> torch.Tensor:
        """Logits [S, B, V/TP] of ``input``, as `ColumnParallelLinear.forward` asks for them. weight: this layer's, or the embedding's that is tied to it."""
        unsharded = how["tp_group"] is None or how["tp_group"].size() == 1
        options = Options(
            recipe=self.recipe,
            group=None if unsharded else how["tp_group"],
            sequence_parallel=how["sequence_parallel"],
            sum_dx=how["allreduce_dgrad"],
            fuse_wgrad=how["gradient_accumulation_fusion"],
            observer=self.fp8_observer if self.training else None,
        )
        edge = head_loss.Edge(self.recipe, options.group)
        logits = _Logits.apply(input, weight, options, edge)
        if head_loss.takes(self.recipe):
            edge.mark(logits)
        return logits


def install(model: Any) -> None:
    """Run the output layer of a GPTModel in FP8 if the recipe in force says so; a pipeline stage without one is left alone. Idempotent.

    Raises RecipeError for a layer that cannot: other rows than multiples of 16, another class, a bias, a sharded copy.
    """
    spec, layer = arguments.in_force(model.config), getattr(model, "output_layer", None)
    recipe = arguments.resolve(spec).head_recipe if spec else None
    if recipe is None or layer is None or isinstance(layer, OutputLayer):
        return
    problem = _problem(layer, recipe)
    if problem:
        raise RecipeError(f"--fp8-recipe {spec}: {problem}, or: {arguments.head_in_bf16(str(spec))}")
    layer.__class__ = OutputLayer
    layer.recipe, layer.fp8_observer = recipe, None
    model.compute_language_model_loss = head_loss.fused(model.compute_language_model_loss)


def _problem(layer: Any, recipe: Recipe) -> str | None:
    rows, ranks = layer.output_size_per_partition, layer.output_size // layer.output_size_per_partition
    checks = (
        (
            type(layer) is ColumnParallelLinear,
            f"the LM head in FP8 is Megatron's ColumnParallelLinear, and this model's output layer is a {type(layer).__name__}; use the former",
        ),
        (layer.bias is None, "the LM head in FP8 has no bias, and this model's output layer has one; build it without"),
        (layer.gtp_remat_size == 1, "the LM head in FP8 needs each rank to hold its rows of the vocabulary whole; use no generalized tensor parallelism"),
        (
            rows % products.ALIGNMENT == 0,
            f"the LM head in FP8 needs a multiple of {products.ALIGNMENT} rows of the vocabulary on each rank, and {layer.output_size} rows on {ranks} ranks "
            f"are {rows}; use --make-vocab-size-divisible-by {products.ALIGNMENT} or a multiple of it",
        ),
        (
            recipe.global_scale == "unit" or not layer.sequence_parallel,
            f"the LM head in FP8 with --sequence-parallel quantises each rank's tokens by themselves, and global_scale={recipe.global_scale} is one scale for "
            "all; use global_scale=unit",
        ),
    )
    return next((reason for ok, reason in checks if not ok), None)


def predicted_weights(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """(weight, process group of its other shards or None) of every FP8 output layer in ``model`` under a predicted scale: its own weight, or the embedding's
    that is tied to it."""
    module: Any
    for module in model.modules():
        layer = getattr(module, "output_layer", None) if isinstance(module, GPTModel) else None
        if isinstance(layer, OutputLayer) and layer.recipe.weight_scale == "predicted":
            weight = module.shared_embedding_or_output_weight() if module.share_embeddings_and_output_weights else layer.weight
            yield weight, layer.tp_group if layer.tp_group.size() > 1 else None


def check(args: Any, chunks: list[torch.nn.Module]) -> None:
    """Raise RecipeError where the recipe has head=fp8 and a model's output layer stayed in bf16, because the model is no GPTModel or was built before."""
    spec = arguments.in_force(args)
    if spec is None or arguments.resolve(spec).head_recipe is None:
        return
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if path.split(".")[-1] == "output_layer" and not isinstance(module, OutputLayer):
                raise RecipeError(
                    f"--fp8-recipe {spec}: {path} ({type(module).__name__}) would stay in bf16; the LM head runs in FP8 in Megatron's GPTModel only, built "
                    f"after fp8_recipes was imported. {arguments.head_in_bf16(spec)}"
                )


@dataclass(frozen=True)
class Options:
    """group: ranks that hold the other rows of the vocabulary, None if this one holds all. sequence_parallel: x is a part of the tokens. sum_dx: dx is summed
    over the group. fuse_wgrad: wgrad is added to ``weight.main_grad`` in the product's epilogue."""

    recipe: Recipe
    group: Any
    sequence_parallel: bool
    sum_dx: bool
    fuse_wgrad: bool
    observer: Observer | None


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, options: Options, edge: head_loss.Edge) -> torch.Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()  # [tokens of this rank, H]
        ranks = options.group.size() if options.sequence_parallel else 1
        products.check_alignment(x.device, tokens=rows.shape[0] * ranks, hidden=rows.shape[1], vocabulary=weight.shape[0])
        operand = products.weight_operand(weight, options.recipe)
        q = products.quantize_activation(rows, options.recipe)
        if options.observer is not None:
            options.observer("input", rows, q)
        whole = _gather(q, options.group)() if options.sequence_parallel else q
        logits = products.fprop(whole, operand, out_dtype=x.dtype)  # [all tokens, V/TP]
        ctx.edge = edge
        ctx.options, ctx.operand, ctx.shape, ctx.dtype, ctx.granularity = options, operand, x.shape, x.dtype, q.granularity
        ctx.parameter = weight  # main_grad is an attribute of this very object
        kept = (q.payload, q.scale, q.tile_exponent, q.global_scale) if ctx.needs_input_grad[1] else ()
        # The operand reads the weight again in backward: saving it makes autograd refuse a weight that was changed in between.
        ctx.save_for_backward(weight, *kept)
        # As matmul does it: autograd takes no in-place change of a view made here, and Megatron's cross-entropy changes its input where that is FP32.
        return torch.ops.aten._unsafe_view(logits, (x.shape[0] * ranks, *x.shape[1:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        options: Options = ctx.options
        recipe, weight = options.recipe, ctx.parameter
        need_x, need_weight = ctx.needs_input_grad[:2]
        _, *kept = ctx.saved_tensors
        dq, rows = ctx.edge.take(dlogits), None  # [all tokens, V/TP]
        if dq is None:
            rows = dlogits.reshape(-1, dlogits.shape[-1]).contiguous()
            dq = products.quantize_grad(rows, recipe)
        if options.observer is not None:
            options.observer("grad", rows, dq)
        x = _input(kept, ctx.granularity, options) if need_weight else None  # on its way while dgrad runs
        dx = summed = dw = None
        if need_x:
            dx = products.dgrad(dq, ctx.operand, out_dtype=ctx.dtype, promote=recipe.promote)
            summed = _sum_over_ranks(dx, options)  # on its way while wgrad runs
        if x is not None:
            last = [dq]
            del dq  # wgrad is its last reader, and frees it when the transposed form exists
            into = {"out": weight.main_grad, "accumulate": True} if options.fuse_wgrad else {"out_dtype": weight.dtype}
            dw = products.wgrad(last.pop(), x(), recipe, **into)
            if options.fuse_wgrad:
                dw = _stand_in(weight)
        return None if summed is None else summed().view(ctx.shape), dw, None, None


def _input(kept: list[Any], granularity: str, options: Options) -> Callable[[], ScaledTensor]:
    """x of all tokens, from what forward kept of this rank's."""
    payload, scale, tile_exponent, global_scale = kept
    q = ScaledTensor(payload, scale, granularity, tile_exponent, global_scale)
    return _gather(q, options.group) if options.sequence_parallel else lambda: q


def _gather(q: ScaledTensor, group: Any) -> Callable[[], ScaledTensor]:
    """Start collecting the rows of all ranks; the function returned waits for them. A row has its own scales, so the whole is what one rank would have made."""
    parts: list[Any] = []
    works: list[Any] = []
    for part in (q.payload.view(torch.uint8), q.scale, q.tile_exponent):
        whole = None if part is None else part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
        if part is not None:
            works.append(dist.all_gather_into_tensor(whole, part, group=group, async_op=True))
        parts.append(whole)
    payload, scale, tile_exponent = parts

    def finish() -> ScaledTensor:
        for work in works:
            work.wait()
        return ScaledTensor(payload.view(q.payload.dtype), scale, q.granularity, tile_exponent)

    return finish


def _sum_over_ranks(dx: torch.Tensor, options: Options) -> Callable[[], torch.Tensor]:
    """Start summing dx [all tokens, H] over the ranks' rows of the vocabulary; the function returned waits and gives this rank's tokens."""
    if options.sequence_parallel:
        part = dx.new_empty(dx.shape[0] // options.group.size(), dx.shape[1])
        work = dist.reduce_scatter_tensor(part, dx, group=options.group, async_op=True)
    elif options.sum_dx:
        part, work = dx, dist.all_reduce(dx, group=options.group, async_op=True)
    else:
        return lambda: dx

    def finish() -> torch.Tensor:
        work.wait()
        return part

    return finish


def _stand_in(weight: Any) -> torch.Tensor | None:
    """What autograd gets in place of a gradient that is in main_grad already, by Megatron's protocol."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))
