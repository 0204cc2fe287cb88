"""ISOPO on several processes: data-parallel training with one Gram matrix for all of them, or with one for each.

    torchrun --nproc-per-node 2 -m isopo_mini.integrations.torchrun --task addition --steps 4 --out steps.csv

The parts that several processes need and one does not are in `ranks` and `data_parallel`; copy them. Every process
draws the same batch and keeps its own share of it, so that runs with any number of processes can be compared.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.engine import NTK, Isopo
from isopo_mini.experiments.provenance import provenance, write_table
from isopo_mini.experiments.setups import setup_of


class LogProbs(nn.Module):
    """log π of a batch as a `forward`, which is what `DistributedDataParallel` watches."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> Float[Tensor, "S T"]:
        """`policy.log_prob(batch)`."""
        return self.policy.log_prob(batch)  # type: ignore[operator, no-any-return]


@contextmanager
def ranks(device_type: str = "cpu", timeout: float = 60.0) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started; yields the device of this one.

    Args:
        device_type: `"cpu"`, or `"cuda"` with a GPU for each process.
        timeout: seconds. A process that waits longer for the others raises, and `torchrun` then ends them all.
    """
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def data_parallel(policy: nn.Module, damping: float, shared: bool) -> tuple[DistributedDataParallel, Isopo]:
    """The policy as all processes have it, and the engine for it.

    Args:
        policy: on the device of this process; DDP gives all the weights of the first.
        damping: ρ.
        shared: one Gram matrix a layer for the sequences of all processes; else each process has its own.

    Returns:
        What computes log-probabilities (call it, so that gradients are averaged), and the engine.
    """
    group = dist.group.WORLD if shared else None
    isopo = Isopo(policy, NTK(damping, scale="natural"), gram="sketched", process_group=group)
    return DistributedDataParallel(LogProbs(policy)), isopo


def train(
    policy: nn.Module,
    batches: Iterator[tuple[Batch, Float[Tensor, "S"]]],
    optimizer: torch.optim.Optimizer,
    damping: float,
    shared: bool,
) -> pd.DataFrame:
    """One step a batch, each process with its share of it.

    Args:
        batches: whole batches, the same in every process, with their advantages.

    Returns:
        One row a step: `reward` of the whole batch, `milliseconds` of the update, `bytes` that this process got from
        the others for its Gram matrices.

    Raises:
        ValueError: a batch cannot be shared out evenly.
    """
    parallel, isopo = data_parallel(policy, damping, shared)
    rows = []
    for batch, advantages in batches:
        own = share_of(len(batch))
        start = time.perf_counter()
        optimizer.zero_grad()
        with isopo.microbatch(advantages[own] / len(own)):
            (-parallel(batch.select(own)).sum()).backward()
        optimizer.step()
        isopo.end_step()
        milliseconds = 1000 * (time.perf_counter() - start)
        rows.append({"reward": batch.total_rewards().mean().item(), "milliseconds": milliseconds})
        rows[-1]["bytes"] = 0 if isopo.ranks is None else isopo.ranks.received - sum(row["bytes"] for row in rows[:-1])
    return pd.DataFrame(rows)


def share_of(sequences: int) -> Tensor:
    """The numbers of this process's sequences.

    Raises:
        ValueError: they cannot be shared out evenly.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    if sequences % size:
        raise ValueError(f"sequences: expected a multiple of the {size} processes, got {sequences}")
    return torch.arange(sequences).chunk(size)[rank]


def main(arguments: list[str] | None = None) -> None:
    """The command line, in each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="addition", help="a name of `experiments.setups.SETUPS`")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64, help="S, of all processes together")
    parser.add_argument("--damping", type=float, default=1.0, help="ρ")
    parser.add_argument("--step-size", type=float, default=20.0, help="of SGD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each process")
    parser.add_argument("--own", action="store_true", help="a Gram matrix for each process instead of one for all")
    parser.add_argument("--out", type=Path, required=True, help="the table, CSV; the weights are left beside it")
    options = parser.parse_args(arguments)
    checks.require_at_least("steps", options.steps, 1)
    torch.set_num_threads(1)
    with ranks(options.device) as device:
        torch.manual_seed(options.seed)
        setup = setup_of(options.task)
        task, policy = setup.make(device)
        generator = torch.Generator(device).manual_seed(options.seed)
        optimizer = torch.optim.SGD(policy.parameters(), lr=options.step_size)

        def batches() -> Iterator[tuple[Batch, Tensor]]:
            for _ in range(options.steps):
                batch = task.sample(policy, options.sequences, generator)
                yield batch, setup.all_advantages[setup.advantages](batch)

        table = train(policy, batches(), optimizer, options.damping, shared=not options.own)
        if dist.get_rank() == 0:
            settings = {name: value for name, value in vars(options).items() if name not in ("out", "device")}
            write_table(options.out, table, provenance(device, processes=dist.get_world_size(), **settings))
            save_model(policy, str(options.out.with_suffix(".safetensors")))


if __name__ == "__main__":
    main()
