"""Two processes under DistributedDataParallel: each transforms its own microbatch, and the gradients are averaged."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("trl")

from by_sequences import Reference
from peft import LoraConfig
from tiny_grpo import EXACT, SINGLE, Run, make_config, make_model, relative_error

from isopo_mini.engine import NTK, FisherNormalized

pytestmark = pytest.mark.filterwarnings("default")

RANKS, SECONDS = 2, 240
CASES: dict[str, dict[str, Any]] = {
    "NTK": {"transform": NTK(0.5), "options": {"gradient_accumulation_steps": 2, "max_steps": 2}},
    "Fisher": {"transform": FisherNormalized(), "options": {"num_iterations": 2, "max_steps": 2}},
    # The bonus has a backward pass of its own, whose gradients are exchanged together with the engine's.
    "entropy": {"transform": NTK(0.5, scale="natural"), "options": {"entropy_coef": 0.2, "max_steps": 2}},
    "LoRA": {"transform": NTK(0.5), "options": {"max_steps": 2, "learning_rate": 1e-3}, "lora": True},
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def one_rank(rank: int, port: int, folder: str) -> None:
    """Train every case; leave what `.grad` held, and what this rank alone should have made, for every step."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS)
    )
    torch.set_num_threads(1)
    for name, case in CASES.items():
        transform = case["transform"]
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        run = Run(Reference(transform)).of(
            make_model(),
            make_config(folder, ddp_backend="gloo", **case["options"]),
            transform=transform,
            peft_config=lora if case.get("lora") else None,
        )
        assert isinstance(run.trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        steps = [(step.gradients, step.expected) for step in run.steps]
        torch.save(steps, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def joined(context: Any, seconds: float) -> bool:
    """Did all processes end in time? Those that did not are stopped, so that nothing hangs."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if context.join(timeout=1.0):
                return True
        return False
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks have left."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(one_rank, args=(free_port(), str(folder)), nprocs=RANKS, join=False)
    assert joined(context, SECONDS), f"expected two ranks to train in {SECONDS} seconds"
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes(name: str, folder: Path) -> None:
    ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    tolerance = EXACT if name in ("NTK", "Fisher") else SINGLE  # in the others there is trl's own head
    for steps in zip(*ranks, strict=True):
        mean = {key: sum(expected[key] for _, expected in steps) / RANKS for key in steps[0][1]}
        for gradients, expected in steps:
            assert relative_error(gradients, mean) <= tolerance
            assert relative_error(expected, mean) > 1e-3  # the ranks have different sequences
