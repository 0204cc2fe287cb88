"""Two processes that talk over gloo, for tests of what several ranks do together."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def join(rank: int, port: int, seconds: float = 60.0) -> None:
    """This process becomes one of two."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=seconds))


def spawn(worker: Callable[..., None], *arguments: Any) -> None:
    """Run `worker(rank, port, *arguments)` in both; what one of them raises is raised here."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    mp.spawn(worker, args=(port, *arguments), nprocs=RANKS)
