"""Two gloo processes on this machine."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """For MASTER_PORT: nobody listens there, not even the same test in another of pytest's workers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(function: Any, *args: Any) -> None:
    """Run ``function(rank, *args)`` in two processes that form one gloo group; raises what either raises."""
    mp.spawn(_run, args=(free_port(), function, args), nprocs=2)


def _run(rank: int, port: int, function: Any, args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(rank, *args)
        dist.barrier()  # a rank that leaves while the other is still under way may abort in gloo's threads
    finally:
        dist.destroy_process_group()
