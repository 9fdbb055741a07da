"""Real Megatron models built without memory, in a process of their own (it initialises torch.distributed): what the launcher says of them at start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def reports(*flags: str) -> list[list[str]]:
    """The lines of the precision table of each model, white space folded, and last "TRACKED" and the number of FP8 weights."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "RANK": "0", "WORLD_SIZE": "1"}
    given = [f"{f} --no-rope-fusion" for f in flags]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[" ".join(line.split()) for line in report.splitlines()] for report in json.loads(done.stdout.splitlines()[-1])]


def build(flags: str) -> str:
    """Runs in the subprocess: one model, by the launcher's own path."""
    import torch
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.global_vars import unset_global_variables

    from fp8_recipes.megatron import pretrain, report, weight_scaling_hook

    unset_global_variables()
    unset_num_microbatches_calculator()
    sys.argv = ["pretrain_gpt", *flags.split()]
    args, container = pretrain.configure()
    container.model.transformer.perform_initialization = False
    collection = ProcessGroupCollection.use_mpu_process_groups()
    really = torch.cuda.is_available, torch.cuda.current_device, torch.cuda.device_count
    # TransformerEngine's constructors ask; on the meta device nothing else needs a GPU.
    torch.cuda.is_available, torch.cuda.current_device, torch.cuda.device_count = lambda: True, lambda: "meta", lambda: 1
    with torch.device("meta"):
        model = container.model.get_builder_cls()(container.model).build_model(collection)
    table = report.precision_table(args, [model])
    report.is_rank_0 = lambda: False
    tracked = len(list(weight_scaling_hook.fp8_weights(model, experts=True)))
    torch.cuda.is_available, torch.cuda.current_device, torch.cuda.device_count = really
    return f"{table}\nTRACKED {tracked}"


def main() -> None:
    import torch

    from fp8_recipes.megatron import shims

    shims.install()
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    torch.cuda.get_device_capability = lambda *_: (9, 0)  # --moe-grouped-gemm asks
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel(1, 1)
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    print("\n" + json.dumps([build(flags) for flags in sys.argv[1:]]))


if __name__ == "__main__":
    main()
