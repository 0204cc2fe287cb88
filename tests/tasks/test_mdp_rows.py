"""Probabilities as people type them, or as float32 keeps them. What a row lacks would be lost 1/(1−γ) times."""

import pytest
import torch
from torch import Tensor

from isopo_mini.policies import TabularSoftmax
from isopo_mini.tasks import MDP, npg_step, random_mdp

THIRD = 1 / 3
discounts = pytest.mark.parametrize("discount", [0.0, 0.9, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9])


def thirds(typed: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((3, 2, 3), typed, dtype=dtype)


@discounts
@pytest.mark.parametrize(
    "rows",
    [thirds(0.33333), thirds(0.333333), thirds(THIRD), thirds(THIRD, torch.float32)],
    ids=["five digits", "six digits", "float64", "float32"],
)
@pytest.mark.parametrize("start", [[1.0, 0.0, 0.0], [0.33333, 0.33333, 0.33333]])
@pytest.mark.parametrize("half", [0.5, 0.499997])
def test_rewards_of_one_are_worth_one_over_one_minus_gamma(
    rows: Tensor, start: list[float], half: float, discount: float
) -> None:
    mdp = MDP(rows, torch.ones(3, 2).to(rows), torch.tensor(start).to(rows), discount=discount)
    probs = torch.full((3, 2), half).to(rows)
    assert mdp.expected_return(probs).item() * (1 - discount) == pytest.approx(1, abs=1e-12)
    assert mdp.policy_iteration().values.numpy() * (1 - discount) == pytest.approx(1, abs=1e-12)
    assert mdp.visitation(probs).sum().item() == pytest.approx(1, abs=1e-12)
    assert mdp.occupancy(probs).sum().item() == pytest.approx(1, abs=1e-12)


@discounts
def test_typed_rows_are_the_rows_that_were_meant(discount: float) -> None:
    """Everything else, too: values of random rewards. The rounding of a row, 1e-16, counts 1/(1−γ) times."""
    rewards = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    typed, meant = (MDP(thirds(number), rewards, discount=discount) for number in (0.33333, THIRD))
    probs = torch.tensor([[0.33333, 0.66667], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    probs[0] += 4e-6
    for name in ("values", "action_values", "expected_return", "occupancy", "stationary", "average_reward"):
        found, expected = getattr(typed, name)(probs), getattr(meant, name)(probs / probs.sum(dim=1, keepdim=True))
        torch.testing.assert_close(found, expected, rtol=1e-14 / (1 - discount), atol=1e-14)


def test_rows_of_sum_one_are_left_alone() -> None:
    """So that a process made from another's rows is the same to the last digit."""
    mdp = random_mdp(30, 3, discount=0.9, seed=0)
    assert torch.equal(MDP(mdp.transitions, mdp.rewards, discount=0.9).transitions, mdp.transitions)
    typed = MDP(thirds(0.33333), torch.ones(3, 2, dtype=torch.float64), discount=0.9)
    assert torch.equal(MDP(typed.transitions, typed.rewards, discount=0.9).transitions, typed.transitions)


def test_derivative_in_the_probabilities_themselves() -> None:
    """∂J/∂π(a|s) = d_s Q(s, a)/(1−γ), as in the textbooks: Q, not Q − V, so the sum of a row is not differentiated."""
    mdp = random_mdp(4, 3, discount=0.9, seed=0)
    probs = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).repeat(4, 1)
    for typed in (probs, probs.float(), probs * (1 + 3e-6)):
        leaf = typed.clone().requires_grad_()
        mdp.expected_return(leaf).backward()
        expected = 10 * mdp.visitation(probs)[:, None] * mdp.action_values(probs)
        torch.testing.assert_close(leaf.grad, expected.to(typed.dtype), rtol=1e-5, atol=0)


def test_a_probability_that_rounding_made_negative_is_zero() -> None:
    rows = thirds(0.5)
    rows[:, :, 1] = -1e-13
    mdp = MDP(rows, torch.ones(3, 2, dtype=torch.float64), discount=0.9)
    assert (mdp.transitions[:, :, 1] == 0).all()
    mdp.sample(TabularSoftmax(3, 2), 5, generator=torch.Generator().manual_seed(0))  # torch.multinomial refuses < 0
    probs = torch.tensor([[1 + 1e-13, -1e-13]], dtype=torch.float64).repeat(3, 1)
    assert torch.equal(npg_step(mdp, probs, 0.1), torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(3, 1))
    assert (mdp.occupancy(probs) >= 0).all()


@pytest.mark.usefixtures("unchecked")
def test_rows_further_off_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"transitions: expected .* got sum 0.9999 and smallest 0.3333 at state 0, act"
    ):
        MDP(thirds(0.3333), torch.ones(3, 2, dtype=torch.float64), discount=0.9)
    with pytest.raises(ValueError, match=r"transitions: expected .* got sum 1.00\d* and smallest 0.33"):
        MDP(thirds(THIRD, torch.bfloat16), torch.ones(3, 2, dtype=torch.float64), discount=0.9)
    mdp = MDP(thirds(THIRD), torch.ones(3, 2, dtype=torch.float64), discount=0.9)
    with pytest.raises(ValueError, match="rewards: expected finite numbers, got nan"):
        mdp.value_iteration(rewards=torch.full((3, 2), torch.nan))
    with pytest.raises(TypeError, match=r"values: expected a floating-point tensor, got torch\.int64"):
        mdp.bellman(torch.zeros(3, dtype=torch.int64))
