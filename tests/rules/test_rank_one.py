"""The Fisher matrix of one sampled score, written out densely, and what its step can and cannot do."""

import pytest
import torch
from torch import Tensor

from isopo_mini.batch import Batch
from isopo_mini.geometry import fisher
from isopo_mini.policies import MLP
from isopo_mini.rules import RankOneNaturalGradient
from isopo_mini.rules.rule_parts import flat_gradient
from isopo_mini.tasks.bandit import ContextualBandit


def of_batch(sequences: int = 12) -> tuple[MLP, Batch]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 4, generator=generator).double()
    bandit = ContextualBandit(torch.randn(3, 5, generator=generator).double(), features=features)
    policy = MLP(4, 5, (6,)).double()
    return policy, bandit.sample(policy, sequences, generator)


def given_advantages(batch: Batch) -> Tensor:
    return torch.linspace(-1, 2, len(batch), dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.01, 1.0, 100.0])
def test_it_is_the_dense_solve_with_one_score(damping: float) -> None:
    """For exactly one of the twelve scores (λI + ggᵀ)⁻¹ times the gradient of all, by a dense solve, is the step."""
    policy, batch = of_batch()
    scores = fisher.score_matrix(policy, batch.observations, batch.actions, batch.mask)
    gradient = scores.T @ given_advantages(batch) / len(batch)
    rule = RankOneNaturalGradient(damping, advantages=given_advantages, seed=3)
    rule.step(policy, batch, torch.optim.SGD(policy.parameters(), lr=0.0))
    step, identity = -flat_gradient(policy), torch.eye(len(gradient), dtype=torch.float64)
    candidates = [torch.linalg.solve(damping * identity + torch.outer(g, g), gradient) for g in scores]
    agrees = [torch.allclose(step, candidate, rtol=1e-8) for candidate in candidates]
    assert 1 <= sum(agrees) < len(scores)
    longest = scores.square().sum(dim=1).max()
    assert step @ gradient >= gradient.square().sum() / (damping + longest) > 0


def test_every_unit_is_drawn_alike_often() -> None:
    """Over 600 steps that change nothing each of four scores is used about 150 times."""
    policy, batch = of_batch(40)
    pairs = torch.stack([batch.groups, batch.actions[:, 0]], dim=1).unique(dim=0)[:4]  # four that differ
    index = [next(s for s in range(40) if (batch.groups[s], batch.actions[s, 0]) == tuple(pair)) for pair in pairs]
    batch = batch.select(torch.tensor(index))
    scores = fisher.score_matrix(policy, batch.observations, batch.actions, batch.mask)
    rule = RankOneNaturalGradient(0.1, advantages=given_advantages)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    gradient = scores.T @ given_advantages(batch) / len(batch)
    candidates = torch.stack(
        [torch.linalg.solve(0.1 * torch.eye(len(gradient)) + torch.outer(g, g), gradient) for g in scores]
    )
    used = torch.zeros(4)
    for _ in range(600):
        rule.step(policy, batch, optimizer)
        used[(candidates + flat_gradient(policy)).norm(dim=1).argmin()] += 1
    assert (used > 100).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping: expected a finite number > 0, got 0.0"),
        ({"minibatches": 0}, "minibatches: expected a finite number >= 1, got 0"),
        ({"unit": "word"}, "unit: expected one of sequence, step, token, got 'word'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankOneNaturalGradient(**options)


def test_more_minibatches_than_units() -> None:
    policy, batch = of_batch(3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="number of units in the batch: expected a finite number >= 4, got 3"):
        RankOneNaturalGradient(minibatches=4).step(policy, batch, optimizer)
