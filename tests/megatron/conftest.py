"""Real Megatron and TransformerEngine, no GPU: parsing, validation and configuration work without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BASE = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 5 --lr 3e-4 --bf16 --normalization RMSNorm --swiglu --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 256 --eval-iters 0 --use-distributed-optimizer"
)


def needs_upstream():
    pytest.importorskip("torch", reason="torch is not installed")  # first: TransformerEngine finds NCCL through the libraries that torch has loaded
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")


@pytest.fixture
def base_flags():
    return BASE


@pytest.fixture(scope="module")
def groups():
    """torch.distributed over gloo, Megatron's process groups of one rank, our shims."""
    needs_upstream()
    import moe_layers

    moe_layers.initialise()
    yield
    moe_layers.finish()


@pytest.fixture
def parse(monkeypatch):
    """parse("--fp8-recipe moss") -> arguments from Megatron's real parser, shims installed, not validated."""
    needs_upstream()
    from fp8_recipes.megatron import shims

    shims.install()
    from megatron.training import arguments

    def run(flags: str = "", base: str = BASE):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *base.split(), *flags.split()])
        return arguments.parse_args()

    return run


@pytest.fixture
def configure(monkeypatch):
    """configure("--fp8-recipe moss") -> (arguments, PretrainConfigContainer) by the launcher's own path; Megatron's globals are cleared afterwards."""
    needs_upstream()
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    from fp8_recipes.megatron import pretrain

    def run(flags: str = "", base: str = BASE):
        unset_global_variables()
        unset_num_microbatches_calculator()
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *base.split(), *flags.split()])
        return pretrain.configure()

    yield run
    unset_global_variables()
    unset_num_microbatches_calculator()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small text dataset, for the trainings of one module."""
    from fp8_recipes import data

    path = tmp_path_factory.mktemp("training")
    data.build_from_roots(path / "text", data.default_roots(), max_mb=4)
    return path


@pytest.fixture(scope="module")
def train(workspace: Path, request: pytest.FixtureRequest):
    """The module's `megatron_runs.Trainings`, from its MODEL, FLAGS and ENVIRONMENT."""
    from megatron_runs import Trainings

    module = request.module
    return Trainings(workspace, module.MODEL, getattr(module, "FLAGS", ""), getattr(module, "ENVIRONMENT", {}))
