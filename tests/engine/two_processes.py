"""Two processes that talk over gloo, for tests of what several ranks do together, and what they share out."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

RANKS, SEQUENCES = 2, 6


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


def make_data(positions: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens of all sequences, and their advantages: the same in every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (SEQUENCES, positions), generator=generator)
    return tokens, torch.randn(SEQUENCES, generator=generator).double()


def log_prob(policy: nn.Module, tokens: Tensor) -> Tensor:
    """log π of each sequence, of all tokens but its first."""
    log_probs = policy(tokens[:, :-1]).log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None])[..., 0].sum(dim=1)
