"""One of two ranks (gloo, CPU) of a GPTModel with its LM head in FP8: ``python head_worker.py RANK DIRECTORY MODE ...``; MODE "tp" or "sp" (tensor parallelism
without and with sequence parallelism). Reads the whole model's parameters from DIRECTORY/whole.pt, writes what it computed to DIRECTORY/MODE-RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import fog_models as models
import torch
from fog_worker import load

from fp8_recipes.architecture import from_name
from fp8_recipes.weight_scaling import WeightScaling

ARCHITECTURE = from_name("olmo2")  # its norms run under sequence parallelism without TransformerEngine


def build(recipe: str, **changes):
    """GPTModel on the CPU, its layers Megatron's local ones in fp32, its output layer as ``recipe`` says, the layer's weight under automatic scaling by a clock
    that measures at every use."""
    from fp8_recipes.megatron import head

    model = models.build(ARCHITECTURE, fp8="e4m3", fp8_recipe=recipe, **changes)
    model.config.fp8 = None  # the head has read it; the layers' FP8 would need a GPU
    clock = WeightScaling()
    for weight, group in head.predicted_weights(model):
        clock.track(weight, group)
    return model


def step(model) -> dict:
    """Loss and gradients by name of one microbatch, after Megatron's own sums over ranks."""
    with models.on_cpu():
        loss = models.run(model, *models.batch()).mean()
        loss.backward()
        return {"loss": loss.detach(), "gradients": models.gradients(model)}


def main(rank: int, directory: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    for mode in modes:
        models.initialise(rank, 2, str(directory / f"store-{mode}"), tensor_parallel=2)
        model = build("moss", tensor_model_parallel_size=2, sequence_parallel=mode == "sp")
        load(model, torch.load(directory / "whole.pt"), rank, gated=True)
        torch.save(step(model), directory / f"{mode}-{rank}.pt")
        models.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
