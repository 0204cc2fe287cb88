"""Two processes with half of the sequences each take the step of one process with all of them."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import RANKS, SEQUENCES, join, log_prob, make_data, spawn

from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled, Transform
from isopo_mini.policies import CausalTransformer

POSITIONS, VOCABULARY = 5, 9
K = 4  # of the sketches, smaller than both sides of most weights
TRANSFORMS: list[Transform] = [NTK(0.3), NTK(0.3, scale="natural"), FisherNormalized(), LayerScaled()]


def make_policy() -> nn.Module:
    torch.manual_seed(0)
    return CausalTransformer(VOCABULARY, POSITIONS, width=8, layers=2, heads=2).double()


def two_steps(policy: nn.Module, isopo: Isopo, tokens: Tensor, advantages: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of two steps: in the second, the moving averages have a past."""
    found = []
    for factor in (1.0, -0.5):
        policy.zero_grad()
        with isopo.microbatch(factor * advantages):
            log_prob(policy, tokens).sum().backward()
        isopo.end_step()
        found.append(
            {n.removeprefix("module."): p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        )
    return found


def half_of_the_sequences(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    tokens, advantages = (values.chunk(RANKS)[rank] for values in make_data(POSITIONS, VOCABULARY))
    results, received = [], []
    for transform in TRANSFORMS:
        policy = make_policy()
        parallel = nn.parallel.DistributedDataParallel(policy)
        isopo = Isopo(policy, transform, gram="sketched", sketch_size=K, process_group=dist.group.WORLD)
        results.append(two_steps(parallel, isopo, tokens, advantages / len(tokens)))
        assert isopo.ranks is not None
        received.append(torch.tensor(isopo.ranks.received))
    torch.save((results, received), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left."""
    made = tmp_path_factory.mktemp("ranks")
    spawn(half_of_the_sequences, str(made))
    return made


def test_the_step_is_that_of_one_process_with_all_sequences(folder: Path) -> None:
    tokens, advantages = make_data(POSITIONS, VOCABULARY)
    for number, transform in enumerate(TRANSFORMS):
        policy = make_policy()
        isopo = Isopo(policy, transform, gram="sketched", sketch_size=K)
        whole = two_steps(policy, isopo, tokens, advantages / SEQUENCES)
        own = [two_steps(policy, Isopo(policy, transform), part, a / 3) for part, a in halves(tokens, advantages)]
        for rank in range(RANKS):
            results, _ = torch.load(folder / f"{rank}.pt", weights_only=True)
            for step in range(2):
                for name, gradient in whole[step].items():
                    torch.testing.assert_close(results[number][step][name], gradient, rtol=1e-9, atol=1e-12)
        # Without the shared Gram matrix the step is another one, so the comparison above can fail.
        mean = (own[0][0]["head.weight"] + own[1][0]["head.weight"]) / RANKS
        assert (mean - whole[0]["head.weight"]).norm() > 0.01 * mean.norm()


def halves(tokens: Tensor, advantages: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tokens.chunk(RANKS), advantages.chunk(RANKS), strict=True))


def test_what_travels_is_as_large_as_the_sketches(folder: Path) -> None:
    """k² numbers a sequence and weight matrix at most (k more with a bias), however large the weights are."""
    for rank in range(RANKS):
        _, received = torch.load(folder / f"{rank}.pt", weights_only=True)
        policy = make_policy()
        matrices = [p for p in policy.parameters() if p.dim() == 2]
        vectors = sum(p.numel() for p in policy.parameters() if p.dim() == 1)
        at_most = (SEQUENCES // RANKS) * (len(matrices) * K * (K + 1) + vectors) * 8
        steps, counts = 2, SEQUENCES // RANKS * 8 + 8  # the advantages, and how many there are
        assert 0 < received[0] <= steps * (at_most + counts)


def one_sequence_more(rank: int, port: int) -> None:
    join(rank, port)
    tokens, advantages = make_data(POSITIONS, VOCABULARY)
    isopo = Isopo(make_policy(), NTK(0.3), gram="sketched", process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"expected as many sequences in every process of the group, got \[2, 3\]"):
        two_steps(isopo.model, isopo, tokens[: 2 + rank], advantages[: 2 + rank])
    dist.destroy_process_group()


def test_every_process_needs_as_many_sequences() -> None:
    spawn(one_sequence_more)


def one_leaves(rank: int, port: int, way: str, left: str) -> None:
    """The second process goes in the middle of a step; the first writes down how long it waited for it."""
    join(rank, port, seconds=3.0)
    tokens, advantages = (values.chunk(RANKS)[rank] for values in make_data(POSITIONS, VOCABULARY))
    policy = make_policy()
    isopo = Isopo(policy, NTK(0.3), gram="sketched", process_group=dist.group.WORLD)
    began = time.monotonic()

    def step() -> None:
        with isopo.microbatch(advantages):
            total = log_prob(policy, tokens).sum()
            if rank == 1:
                time.sleep(12.0 if way == "hangs" else 0.0)
                os._exit(0)  # without a goodbye
            total.backward()

    with pytest.raises(RuntimeError, match=r"(?i)closed|reset|timed out|timeout"):
        step()
    Path(left).write_text(str(time.monotonic() - began), encoding="utf-8")
    os._exit(0)


@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_nobody_waits_longer_than_the_timeout_of_the_group(way: str, tmp_path: Path) -> None:
    spawn(one_leaves, way, str(tmp_path / "waited"))
    assert float((tmp_path / "waited").read_text(encoding="utf-8")) < 10.0


def test_sketches_travel_and_nothing_else_does(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "meeting"), 1), rank=0, world_size=1)
    try:
        policy, group = make_policy(), dist.group.WORLD
        for gram in ("auto", "dense", "ghost"):
            with pytest.raises(
                ValueError, match=f"gram: expected 'sketched' or .signs. with a process group.*got '{gram}'"
            ):
                Isopo(policy, NTK(), gram=gram, process_group=group)
        isopo = Isopo(policy, FisherNormalized("token"), gram="sketched", process_group=group)
        with pytest.raises(ValueError, match="norm: expected 'sequence' where Gram matrices are shared"):
            two_steps(policy, isopo, *make_data(POSITIONS, VOCABULARY))
        advantages = torch.ones(4, dtype=torch.float64)
        with (
            pytest.raises(ValueError, match=r"block_size: expected None with a process group, .* got 2"),
            isopo.microbatch(advantages, block_size=2),
        ):
            pass
    finally:
        dist.destroy_process_group()
