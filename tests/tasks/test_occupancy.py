"""The linear program against value iteration, against its own dual, and against constraints solved on paper."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.tasks import MDP, random_mdp, solve_linear_program

# Arguments of `random_mdp`: a strategy that built the process itself would draw random numbers.
instances = st.fixed_dictionaries(
    {
        "num_states": st.integers(1, 5),
        "num_actions": st.integers(1, 4),
        "discount": st.sampled_from([0.0, 0.3, 0.9]),
        "seed": st.integers(0, 1000),
    }
)
quick = settings(max_examples=40, deadline=None)


def bandit(*rewards: float) -> MDP:
    """One state, γ = ½: J is twice the expected reward."""
    return MDP(torch.ones(1, len(rewards), 1), torch.tensor([rewards], dtype=torch.float64), discount=0.5)


def costs(mdp: MDP, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(mdp.rewards.shape, generator=generator, dtype=torch.float64)


@quick
@given(instances)
def test_without_constraints_it_is_value_iteration(instance: dict[str, Any]) -> None:
    mdp = random_mdp(**instance)
    solution, best = solve_linear_program(mdp), mdp.value_iteration()
    torch.testing.assert_close(solution.value, mdp.initial_probs @ best.values, rtol=0, atol=1e-12)
    assert solution.multipliers.shape == (0,)
    # Every state is a first state, so all are visited, and no policy is better in any of them.
    torch.testing.assert_close(mdp.values(solution.probs), best.values, rtol=0, atol=1e-11)


@quick
@given(instances, st.integers(0, 100), st.floats(0.05, 0.95))
def test_constrained_optimum_meets_the_optimality_conditions(instance: dict[str, Any], seed: int, share: float) -> None:
    """With λ the policy is optimal for r + λg without constraint, meets the bound, and pays only where it binds."""
    mdp = random_mdp(**instance)
    rewards = costs(mdp, seed)
    free = mdp.expected_return(mdp.value_iteration().probs, rewards)
    best = mdp.initial_probs @ mdp.value_iteration(rewards=rewards).values
    bound = (free + share * (best - free)).item()  # what the optimum for r alone just misses
    solution = solve_linear_program(mdp, [(rewards, bound)])
    probs, multiplier = solution.probs, solution.multipliers[0]
    assert multiplier >= 0
    reached = mdp.expected_return(probs, rewards)
    assert reached >= bound - 1e-11
    assert (multiplier * (reached - bound)).abs() < 1e-11 * (1 + multiplier)
    assert torch.equal(mdp.expected_return(probs), solution.value)
    assert torch.equal(mdp.occupancy(probs), solution.occupancy)
    mixed = mdp.rewards + multiplier * rewards
    dual = mdp.initial_probs @ mdp.value_iteration(rewards=mixed).values - multiplier * bound
    torch.testing.assert_close(dual, solution.value, rtol=0, atol=1e-10 * (1 + multiplier.item()))


@pytest.mark.parametrize("discount", [0.5, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("seed", range(3))
def test_exact_at_any_discount(discount: float, seed: int) -> None:
    """The solver alone misses bound and value by up to 1e-10/(1−γ)², 1e-3 here. Rounding may: eps/(1−γ)²."""
    mdp = random_mdp(20, 3, discount=discount, seed=seed, concentration=0.3)
    rewards, rounding = costs(mdp, seed), 10 * 2.2e-16 / (1 - discount) ** 2
    best = mdp.policy_iteration()
    free = solve_linear_program(mdp)
    torch.testing.assert_close(free.value, mdp.initial_probs @ best.values, rtol=0, atol=rounding)
    low = mdp.expected_return(best.probs, rewards)
    high = mdp.initial_probs @ mdp.policy_iteration(rewards=rewards).values
    bound = ((low + high) / 2).item()
    solution = solve_linear_program(mdp, [(rewards, bound)])
    assert (solution.probs > 0).sum() == 21  # deterministic but for one state: the constraint binds
    assert mdp.expected_return(solution.probs, rewards).item() == pytest.approx(bound, rel=0, abs=rounding)
    assert torch.equal(mdp.expected_return(solution.probs), solution.value)
    mixed = mdp.rewards + solution.multipliers * rewards  # any price bounds J from above; λ leaves no gap
    dual = mdp.initial_probs @ mdp.policy_iteration(rewards=mixed).values - solution.multipliers[0] * bound
    torch.testing.assert_close(dual, solution.value, rtol=0, atol=rounding)


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e12, 1e30])
def test_units_of_rewards_and_costs(unit: float) -> None:
    """The solver's tolerances are absolute: rewards of 1e-12 would all be the same to it."""
    mdp = random_mdp(6, 3, discount=0.9, seed=0)
    low = mdp.expected_return(mdp.policy_iteration().probs, costs(mdp)).item()
    one = solve_linear_program(mdp, [(costs(mdp), low + 0.3)])
    other = MDP(mdp.transitions, unit * mdp.rewards, discount=0.9)
    for solution in (
        solve_linear_program(other, [(costs(mdp), low + 0.3)]),
        solve_linear_program(other, [(costs(mdp) / unit, (low + 0.3) / unit)]),
    ):
        torch.testing.assert_close(solution.probs, one.probs, rtol=0, atol=1e-11)
        torch.testing.assert_close(solution.value, unit * one.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(solution.multipliers, unit**2 * one.multipliers, rtol=1e-10, atol=0)


def test_a_bound_that_the_best_policy_just_meets() -> None:
    """At γ = 0.9999 rounding moves J by more than 1e-10: what is reachable on paper must not be called infeasible."""
    for seed in range(5):
        mdp = random_mdp(10, 3, discount=0.9999, seed=seed)
        best = mdp.policy_iteration(rewards=costs(mdp))
        bound = mdp.expected_return(best.probs, costs(mdp))
        solution = solve_linear_program(mdp, [(costs(mdp), bound.item())])
        torch.testing.assert_close(mdp.expected_return(solution.probs, costs(mdp)), bound, rtol=1e-11, atol=0)


def test_constraints_that_say_the_same() -> None:
    """Their prices are not determined, their sum is."""
    mdp = random_mdp(5, 3, discount=0.9, seed=1)
    bound = mdp.expected_return(mdp.policy_iteration().probs, costs(mdp)).item() + 0.3
    once = solve_linear_program(mdp, [(costs(mdp), bound)])
    twice = solve_linear_program(mdp, [(costs(mdp), bound)] * 2)
    torch.testing.assert_close(twice.value, once.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(twice.multipliers.sum(), once.multipliers.sum(), rtol=1e-6, atol=0)


def test_three_hundred_states_take_seconds() -> None:
    """Presolved and dense it took a minute and a half. The limit, of CPU time, leaves room for slow machines."""
    mdp = random_mdp(300, 10, discount=0.99, seed=0)
    start = time.process_time()
    solution = solve_linear_program(mdp)
    assert time.process_time() - start < 30
    torch.testing.assert_close(solution.value, mdp.initial_probs @ mdp.policy_iteration().values, rtol=1e-12, atol=0)


def test_multipliers_are_the_price_of_the_bounds() -> None:
    mdp = random_mdp(5, 3, discount=0.8, seed=5)
    first, second = costs(mdp, 1), costs(mdp, 2)
    free = [mdp.expected_return(mdp.value_iteration().probs, g).item() for g in (first, second)]
    bounds = [value + 0.1 for value in free]
    solution = solve_linear_program(mdp, list(zip((first, second), bounds, strict=True)))
    assert (solution.multipliers > 0.01).all()
    for i in range(2):
        step = [1e-4 * (i == j) for j in range(2)]
        high, low = (
            solve_linear_program(mdp, [(first, bounds[0] + sign * step[0]), (second, bounds[1] + sign * step[1])])
            for sign in (1, -1)
        )
        slope = (high.value - low.value).item() / 2e-4  # exact: the optimum is linear in the bound nearby
        assert slope == pytest.approx(-solution.multipliers[i].item(), rel=1e-5)


def test_three_arms_on_paper() -> None:
    """Rewards (1, ½, 0), a constraint on (0, ½, 1) of at least ½ (J_g ≥ 1): mix the outer arms, or take the middle."""
    solution = solve_linear_program(bandit(1.0, 0.4, 0.0), [(torch.tensor([[0.0, 0.5, 1.0]]), 1.0)])
    torch.testing.assert_close(solution.probs, torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64))
    assert solution.value.item() == pytest.approx(1.0)
    assert solution.multipliers.item() == pytest.approx(1.0)
    solution = solve_linear_program(bandit(1.0, 0.8, 0.0), [(torch.tensor([[0.0, 0.5, 1.0]]), 1.0)])
    torch.testing.assert_close(solution.probs, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))


def test_a_slack_constraint_costs_nothing() -> None:
    mdp = random_mdp(4, 3, discount=0.9, seed=0)
    solution, free = solve_linear_program(mdp, [(costs(mdp), -1.0)]), solve_linear_program(mdp)
    assert solution.multipliers.item() == 0
    torch.testing.assert_close(solution.value, free.value)


def test_states_never_visited_are_uniform() -> None:
    transitions = torch.zeros(2, 3, 2)
    transitions[:, :, 0] = 1
    mdp = MDP(transitions, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([1.0, 0.0]), discount=0.9)
    solution = solve_linear_program(mdp)
    expected = torch.tensor([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(solution.probs, expected)
    assert solution.value.item() == pytest.approx(10)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_infeasible_says_which_and_how_far_one_can_get(self) -> None:
        mdp, easy, hard = bandit(1.0, 0.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        with pytest.raises(ValueError, match=r"constraints\[0\]: .* got 2.5 where the best value is 2$"):
            solve_linear_program(mdp, [(hard, 2.5)])
        # Each alone can be met; together not.
        with pytest.raises(
            ValueError, match=r"constraints\[1\]: .* got 1 where the best value is 0.5 while those before it hold"
        ):
            solve_linear_program(mdp, [(easy, 1.5), (hard, 1.0)])

    def test_shape_and_number(self) -> None:
        with pytest.raises(ValueError, match=r"constraints\[1\]: expected shape \(S=1 A=2\), got \(2,\)"):
            solve_linear_program(bandit(1.0, 0.0), [(torch.zeros(1, 2), 0.0), (torch.zeros(2), 0.0)])
        with pytest.raises(ValueError, match=r"constraints\[0\]: expected finite numbers, got nan"):
            solve_linear_program(bandit(1.0, 0.0), [(torch.full((1, 2), torch.nan), 0.0)])
        with pytest.raises(ValueError, match=r"constraints\[0\], its bound: expected finite numbers, got nan"):
            solve_linear_program(bandit(1.0, 0.0), [(torch.zeros(1, 2), float("nan"))])
        with pytest.raises(TypeError, match=r"constraints\[0\]: expected a floating-point tensor, got torch.int64"):
            solve_linear_program(bandit(1.0, 0.0), [(torch.zeros(1, 2, dtype=torch.int64), 0.0)])
