"""One of two ranks (gloo, CPU) of the models in `fog_models`: ``python fog_worker.py RANK DIRECTORY MODE:ARCHITECTURE ...``.

Reads the whole model's parameters from DIRECTORY/ARCHITECTURE.pt, writes loss and gradients of its part to DIRECTORY/MODE-ARCHITECTURE-RANK.pt. MODE: "tp",
"sp" (tensor parallelism without and with sequence parallelism) or "pp". All jobs in one process: importing Megatron takes longer than they do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fog_models as models
import torch

from fp8_recipes.architecture import from_name


def load(model, whole: dict[str, torch.Tensor], rank: int, gated: bool, first_layer: int = 0) -> None:
    tensor_parallel = model.config.tensor_model_parallel_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = global_name(name, first_layer)
            parameter.copy_(models.shard(name, parameter, whole[key], rank, tensor_parallel, gated) if tensor_parallel > 1 else whole[key])


def global_name(name: str, first_layer: int) -> str:
    """decoder.layers.0 of a stage is decoder.layers.<first_layer> of the model."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def main(rank: int, directory: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        mode, _, name = job.partition(":")
        parallel = {"pipeline_parallel": 2} if mode == "pp" else {"tensor_parallel": 2}
        models.initialise(rank, 2, str(directory / f"store-{mode}-{name}"), **parallel)
        with models.on_cpu():
            result = one(rank, mode, from_name(name), torch.load(directory / f"{name}.pt"))
        torch.save(result, directory / f"{mode}-{name}-{rank}.pt")
        models.finish()


def one(rank: int, mode: str, architecture, whole):
    tokens, labels = models.batch()
    if mode == "pp":
        return pipeline(rank, architecture, whole, tokens, labels)
    model = models.build(architecture, tensor_model_parallel_size=2, sequence_parallel=mode == "sp")
    load(model, whole, rank, architecture.gated)
    loss = models.run(model, tokens, labels).mean()
    loss.backward()
    return {"loss": loss.detach(), "gradients": models.gradients(model)}


def pipeline(rank: int, architecture, whole, tokens, labels):
    """Forward and backward of one microbatch through two stages of one layer each."""
    model = models.build(architecture, first=rank == 0, last=rank == 1, pipeline_model_parallel_size=2)
    load(model, whole, rank, architecture.gated, first_layer=rank * models.LAYERS // 2)
    shape = (models.SEQ, models.BATCH, models.WIDTH)
    loss = torch.zeros(())
    if rank == 0:
        hidden = models.run(model, tokens, None)
        torch.distributed.send(hidden.detach().contiguous(), 1)
        gradient = torch.empty(shape)
        torch.distributed.recv(gradient, 1)
        hidden.backward(gradient)
    else:
        hidden = torch.empty(shape)
        torch.distributed.recv(hidden, 0)
        model.set_input_tensor(hidden.requires_grad_())
        loss = models.run(model, tokens, labels).mean()
        loss.backward()
        torch.distributed.send(hidden.grad.contiguous(), 0)
    gradients = {global_name(name, rank * models.LAYERS // 2): gradient for name, gradient in models.gradients(model).items()}
    return {"loss": loss.detach(), "gradients": gradients}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
