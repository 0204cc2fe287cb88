"""Many policies at once against one at a time, and against returns summed along the steps."""

import pytest
import torch
from torch import Tensor

from isopo_mini.tasks import evaluate_many, random_mdp

DISCOUNT = 0.8


def setup(policies: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Three processes with two rewards each, and some policies for each: P, π and r."""
    mdps = [random_mdp(4, 3, discount=DISCOUNT, seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(policies, 3, 4, 3, generator=generator, dtype=torch.float64).softmax(dim=-1)
    costs = torch.rand(3, 4, 3, generator=generator, dtype=torch.float64)
    rewards = torch.stack([torch.stack([mdp.rewards, cost]) for mdp, cost in zip(mdps, costs, strict=True)])
    return torch.stack([mdp.transitions for mdp in mdps]), probs, rewards


def test_it_is_what_the_process_itself_says() -> None:
    transitions, probs, rewards = setup()
    returns, action_values = evaluate_many(transitions, probs, rewards, discount=DISCOUNT)
    assert returns.shape == (2, 3, 2)
    assert action_values.shape == (2, 3, 2, 4, 3)
    for n in range(2):
        for i in range(3):
            mdp = random_mdp(4, 3, discount=DISCOUNT, seed=i)
            for j in range(2):
                expected = mdp.expected_return(probs[n, i], rewards[i, j])
                torch.testing.assert_close(returns[n, i, j], expected, rtol=1e-12, atol=0)
                expected = mdp.action_values(probs[n, i], rewards[i, j])
                torch.testing.assert_close(action_values[n, i, j], expected, rtol=1e-12, atol=0)


def test_returns_are_the_sum_over_steps() -> None:
    transitions, probs, rewards = setup(policies=1)
    returns, _ = evaluate_many(transitions, probs, rewards, discount=DISCOUNT)
    for i in range(3):
        law, total = torch.full((4,), 0.25, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for step in range(200):
            visits = law[:, None] * probs[0, i]
            total += DISCOUNT**step * (visits * rewards[i]).sum(dim=(1, 2))
            law = torch.einsum("sa,sat->t", visits, transitions[i])
        torch.testing.assert_close(returns[0, i], total, rtol=1e-12, atol=0)


def test_rows_of_any_sum_are_linear_in_their_own_gradient() -> None:
    """∂J/∂π(a|s) is the visits of s times Q(s, a): rows are not scaled on the way."""
    transitions, probs, rewards = setup(policies=1)
    leaf = probs[0, 0].clone().requires_grad_()
    returns, action_values = evaluate_many(transitions[0], leaf, rewards[0], discount=DISCOUNT)
    (slope,) = torch.autograd.grad(returns[1], leaf)
    visits = random_mdp(4, 3, discount=DISCOUNT, seed=0).visitation(probs[0, 0]) / (1 - DISCOUNT)
    torch.testing.assert_close(slope, visits[:, None] * action_values[1].detach())


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_named() -> None:
    transitions, probs, rewards = setup()
    with pytest.raises(ValueError, match=r"probs: expected shape \(S=4 A=3\)"):
        evaluate_many(transitions, probs[..., :2], rewards, discount=DISCOUNT)
    with pytest.raises(ValueError, match="expected leading axes that broadcast, got"):
        evaluate_many(transitions, probs[:, :2], rewards, discount=DISCOUNT)
    with pytest.raises(TypeError, match="rewards: expected a floating-point tensor"):
        evaluate_many(transitions, probs, rewards.long(), discount=DISCOUNT)
    with pytest.raises(ValueError, match="discount: expected a number < 1"):
        evaluate_many(transitions, probs, rewards, discount=1.0)
    probs[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="probs"):
        evaluate_many(transitions, probs, rewards, discount=DISCOUNT)
