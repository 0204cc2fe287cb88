"""Three independent ways to one optimum; ties; how often they evaluate; the bounds that end value iteration."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.policies import TabularSoftmax
from isopo_mini.tasks import MDP, random_mdp, solve_linear_program
from isopo_mini.tasks.value_iteration import fixed_point


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("seed", range(3))
def test_policy_iteration_value_iteration_and_linear_program_agree(discount: float, seed: int) -> None:
    """Rounding of V: eps/(1−γ)², since V is of order 1/(1−γ) and the condition of I − γP, too."""
    mdp = random_mdp(8, 3, discount=discount, seed=seed, concentration=0.3)
    rounding = 10 * 2.2e-16 / (1 - discount) ** 2
    ours, iterated, program = mdp.policy_iteration(), mdp.value_iteration(), solve_linear_program(mdp)
    torch.testing.assert_close(ours.values, iterated.values, rtol=0, atol=rounding)
    torch.testing.assert_close(ours.action_values, iterated.action_values, rtol=0, atol=rounding)
    assert torch.equal(ours.probs, iterated.probs)
    assert torch.equal(ours.probs, program.probs)
    torch.testing.assert_close(program.value, mdp.initial_probs @ ours.values, rtol=0, atol=rounding)
    # And no policy of another kind: the values solve the optimality equation.
    torch.testing.assert_close(ours.values, ours.action_values.amax(dim=1), rtol=0, atol=rounding)


def moves(targets: list[list[int]]) -> Tensor:
    """Transitions that are certain: `targets[s][a]` is the next state."""
    return torch.nn.functional.one_hot(torch.tensor(targets), len(targets)).double()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0.3, 0.9, 0.9999]))
def test_ties_end_and_the_result_is_the_best_of_all_policies(data: Any, discount: float) -> None:
    """Certain moves and rewards of −1, 0, 1: ties everywhere. All 2^4 policies are enumerated."""
    numbers = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=4, max_size=4)
    rewards = torch.tensor(data.draw(numbers), dtype=torch.float64).clamp(max=2) - 1
    mdp = MDP(moves(data.draw(numbers)), rewards, discount=discount)
    every = [
        mdp.values(torch.nn.functional.one_hot(torch.tensor(choice), 2).double())
        for choice in itertools.product(range(2), repeat=4)
    ]
    best = mdp.policy_iteration()
    expected = torch.stack(every).amax(dim=0)
    torch.testing.assert_close(best.values, expected, rtol=1e-11, atol=1e-15 / (1 - discount) ** 2)
    assert torch.equal(best.probs.sum(dim=1), torch.ones(4, dtype=torch.float64))


def test_of_equal_actions_it_keeps_the_first() -> None:
    mdp = random_mdp(4, 3, discount=0.99, seed=0)
    same = MDP(mdp.transitions[:, :1].expand(4, 3, 4), torch.ones(4, 3, dtype=torch.float64), discount=0.99)
    assert torch.equal(same.policy_iteration().probs[:, 0], torch.ones(4, dtype=torch.float64))


def test_other_rewards_take_the_place_of_the_own() -> None:
    mdp = random_mdp(4, 3, discount=0.8, seed=2)
    other = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin = MDP(mdp.transitions, other, discount=0.8)
    assert torch.equal(mdp.policy_iteration(rewards=other).values, twin.policy_iteration().values)


@pytest.mark.parametrize("discount", [0.9, 0.999, 0.9999, 1 - 1e-6])
def test_evaluate_takes_a_handful_of_solves(discount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At γ = 0.9999 value iteration needs 300,000 steps to be sure of the same optimum by counting alone."""
    mdp, solves = random_mdp(20, 3, discount=discount, seed=0), []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda *arguments: (solves.append(1), solve(*arguments))[1])
    result = mdp.evaluate(TabularSoftmax(20, 3))
    assert 2 <= len(solves) <= 10
    assert result["gap"] > 0
    assert result["optimum"] == (mdp.initial_probs @ mdp.policy_iteration().values).item()


class TestFixedPoint:
    """Seen without the exact evaluation that ends `MDP.value_iteration`."""

    def steps(self, mdp: MDP, tolerance: float) -> tuple[Tensor, int]:
        count = 0

        def backup(values: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return mdp.bellman(values).amax(dim=1)

        start = torch.zeros(mdp.num_states, dtype=torch.float64)
        return fixed_point(backup, start, mdp.rewards.abs().max().item(), mdp.discount, tolerance), count

    @pytest.mark.parametrize("tolerance", [10.0, 1.0, 1e-2, 1e-6])
    @pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
    @pytest.mark.parametrize("certain", [True, False])
    def test_tolerance_is_kept(self, certain: bool, discount: float, tolerance: float) -> None:
        mdp = random_mdp(6, 2, discount=discount, seed=1)
        if certain:  # states do not mix: the hardest case for the bounds
            targets = torch.randint(6, (6, 2), generator=torch.Generator().manual_seed(0)).tolist()
            mdp = MDP(moves(targets), mdp.rewards, discount=discount)
        values, count = self.steps(mdp, tolerance)
        assert (values - mdp.policy_iteration().values).abs().max() <= tolerance
        size = mdp.rewards.abs().max().item() / (1 - discount)
        assert size * discount ** (count - 1) > tolerance or count == 0  # never more steps than the contraction needs

    def test_states_that_mix_need_no_more_steps_near_one(self) -> None:
        near, nearer = (self.steps(random_mdp(20, 3, discount=g, seed=0), 1e-6) for g in (0.99, 0.9999))
        assert nearer[1] < 2 * near[1] < 100
