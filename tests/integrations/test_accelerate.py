"""A plain loop with accelerate, as the docstring of `isopo_mini.integrations` has it."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

pytest.importorskip("accelerate")

from accelerate import Accelerator

from isopo_mini.engine import NTK, FisherNormalized, Isopo
from isopo_mini.policies.transformer import CausalTransformer

pytestmark = pytest.mark.filterwarnings("default")

WORDS, SEQUENCES, ACCUMULATED = 7, 4, 2


def make_policy() -> nn.Module:
    torch.manual_seed(1)
    return CausalTransformer(WORDS, 8, width=8, layers=2, heads=2).double()


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randint(0, WORDS, (SEQUENCES, 5), generator=generator),
            torch.randn(SEQUENCES, dtype=torch.float64, generator=generator),
        )
        for _ in range(count)
    ]


def log_prob(policy: nn.Module, tokens: Tensor) -> Tensor:
    """Σ_t log π(y_t | y_<t), one a sequence."""
    return policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))


def by_hand(transform: Any) -> dict[str, Tensor]:
    """Two steps of two microbatches each, without accelerate: the mean of the two steps' gradients, then SGD."""
    policy, batches = make_policy(), make_batches(2 * ACCUMULATED)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    isopo = Isopo(policy, transform)
    for first in range(0, len(batches), ACCUMULATED):
        for tokens, advantages in batches[first : first + ACCUMULATED]:
            with isopo.microbatch(advantages / ACCUMULATED):
                (-log_prob(policy, tokens).sum()).backward()
        optimizer.step()
        isopo.end_step()
        optimizer.zero_grad()
    return policy.state_dict()


def with_accelerate(transform: Any, *, told: bool) -> dict[str, Tensor]:
    """The loop of the docstring."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    policy = make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    isopo = Isopo(policy, transform)
    optimizer.register_step_post_hook(lambda *_: isopo.end_step())
    model, optimizer = accelerator.prepare(policy, optimizer)
    for tokens, advantages in make_batches(2 * ACCUMULATED):
        with accelerator.accumulate(model):
            scale = 1 / accelerator.gradient_accumulation_steps if told else 1.0
            with isopo.microbatch(advantages, loss_scale=scale):
                accelerator.backward(-log_prob(model, tokens).sum())
            optimizer.step()
            optimizer.zero_grad()
    return policy.state_dict()


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    "transform",
    [NTK(0.5), NTK(0.5, scale="natural"), FisherNormalized(), FisherNormalized(scale="natural")],
    ids=lambda transform: f"{type(transform).__name__}-{transform.scale}",
)
def test_the_loop_of_the_docstring(transform: Any) -> None:
    assert largest_difference(with_accelerate(transform, told=True), by_hand(transform)) < 1e-13


@pytest.mark.parametrize("transform", [NTK(0.5, scale="natural"), FisherNormalized()], ids=["NTK-natural", "Fisher"])
def test_a_division_that_the_engine_is_not_told_of_changes_the_step(transform: Any) -> None:
    """The wrong loop: `accelerator.backward` divides by 2, so that a step of degree −1 is 4 times too long."""
    assert largest_difference(with_accelerate(transform, told=False), by_hand(transform)) > 1e-4
