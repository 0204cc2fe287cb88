"""Walks that end at random: their means are Q, their pairs have the law they should, and each costs what it should."""

import pytest
import torch

from isopo_mini.tasks import MDP, random_mdp
from isopo_mini.tasks.mdp_rollouts import sample_action_values

SAMPLES = 40_000


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.8])
def test_returns_and_pairs(discount: float) -> None:
    mdp = random_mdp(3, 2, discount=discount, seed=1)
    probs = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    found = sample_action_values(mdp, probs, SAMPLES, torch.Generator().manual_seed(0))
    # The law of the pairs: the first one uniform, then an ordinary walk from where it leads.
    first = torch.full((3, 2), 1 / 6, dtype=torch.float64)
    after = torch.einsum("sa,sat->t", first, mdp.transitions)
    rest = MDP(mdp.transitions, mdp.rewards, after, discount=discount).occupancy(probs)
    law = (1 - discount) * first + discount * rest
    pair = found.states * 2 + found.actions
    counts = torch.bincount(pair, minlength=6) / SAMPLES
    error = (law * (1 - law) / SAMPLES).sqrt().flatten()
    assert ((counts - law.flatten()).abs() < 5 * error).all()
    truth = mdp.action_values(probs).flatten()
    for index in range(6):
        returns = found.returns[pair == index]
        allowed = 5 * returns.std() / len(returns) ** 0.5 + 1e-12
        assert (returns.mean() - truth[index]).abs() < allowed
    assert found.steps / SAMPLES == pytest.approx(2 * discount / (1 - discount), rel=0.03)


def test_it_repeats_itself_and_needs_a_policy() -> None:
    mdp = random_mdp(4, 3, discount=0.5, seed=0)
    one, other = (sample_action_values(mdp, mdp.uniform(), 50, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.returns, other.returns)
    with pytest.raises(ValueError, match="num_samples: expected a finite number >= 1, got 0"):
        sample_action_values(mdp, mdp.uniform(), 0)
    with pytest.raises(ValueError, match="probs"):
        sample_action_values(mdp, 2 * mdp.uniform(), 5)
    with pytest.raises(ValueError, match="probs"):
        sample_action_values(mdp, mdp.uniform()[:2], 5)
