"""Finite processes: closed forms, every policy enumerated, finite differences, simulation, fixed points."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev

from isopo_mini.geometry.fisher import exact_fisher
from isopo_mini.policies import MLP, TabularSoftmax
from isopo_mini.tasks import MDP, npg_step, random_mdp


def double(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def stay_or_go(discount: float = 0.9) -> MDP:
    """Two states; action 0 stays, action 1 goes to the other; only staying in state 1 pays. Starts in state 0."""
    stay, go = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    transitions = torch.tensor([[stay[s], go[s]] for s in range(2)], dtype=torch.float64)
    return MDP(transitions, double([0.0, 0.0], [1.0, 0.0]), double(1.0, 0.0), discount=discount)


def random_probs(states: int, actions: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(states, actions, generator=generator, dtype=torch.float64).softmax(dim=1)


def every_deterministic_policy(mdp: MDP) -> Tensor:
    """All A^S of them, `(A^S, S, A)`."""
    choices = torch.tensor(list(itertools.product(range(mdp.num_actions), repeat=mdp.num_states)))
    return torch.nn.functional.one_hot(choices, mdp.num_actions).double()


# Arguments of `random_mdp`: a strategy that built the process itself would draw random numbers.
instances = st.fixed_dictionaries(
    {
        "num_states": st.integers(1, 5),
        "num_actions": st.integers(1, 4),
        "discount": st.sampled_from([0.0, 0.3, 0.9, 0.99]),
        "seed": st.integers(0, 1000),
        "concentration": st.sampled_from([0.1, 1.0]),
    }
)
quick = settings(max_examples=40, deadline=None)


class TestClosedForms:
    """With p = π(go|0) and q = π(stay|1): V(1) = q + γ(q V(1) + (1−q) V(0)), V(0) = γ((1−p) V(0) + p V(1))."""

    @pytest.mark.parametrize(("p", "q", "discount"), [(0.3, 0.6, 0.9), (1.0, 1.0, 0.5), (0.2, 0.0, 0.99)])
    def test_two_states(self, p: float, q: float, discount: float) -> None:
        mdp, probs = stay_or_go(discount), double([1 - p, p], [q, 1 - q])
        ratio = discount * p / (1 - discount * (1 - p))  # V(0) / V(1)
        v1 = q / (1 - discount * q - discount * (1 - q) * ratio)
        torch.testing.assert_close(mdp.values(probs), double(ratio * v1, v1))
        assert mdp.expected_return(probs).item() == pytest.approx(ratio * v1)
        torch.testing.assert_close(mdp.policy_transitions(probs), double([1 - p, p], [1 - q, q]))
        torch.testing.assert_close(mdp.policy_rewards(probs), double(0.0, q))
        torch.testing.assert_close(
            mdp.action_values(probs),
            double([discount * ratio * v1, discount * v1], [1 + discount * v1, discount * ratio * v1]),
        )
        # In the long run the chain is in state 1 a share p / (p + 1 − q) of the time.
        share = p / (p + 1 - q)
        torch.testing.assert_close(mdp.stationary(probs), double(1 - share, share))
        assert mdp.average_reward(probs).item() == pytest.approx(share * q)

    def test_optimum_of_two_states(self) -> None:
        """Go, then stay for ever: V*(1) = 1/(1−γ), V*(0) = γ/(1−γ)."""
        best = stay_or_go().value_iteration()
        torch.testing.assert_close(best.values, double(9.0, 10.0))
        torch.testing.assert_close(best.action_values, double([8.1, 9.0], [10.0, 8.1]))
        assert torch.equal(best.probs, double([0.0, 1.0], [1.0, 0.0]))

    def test_one_state_is_a_bandit(self) -> None:
        mdp = MDP(torch.ones(1, 3, 1), double([0.2, 1.0, 0.5]), discount=0.75)
        probs = double([0.5, 0.25, 0.25])
        assert mdp.expected_return(probs).item() == pytest.approx(4 * 0.475)
        torch.testing.assert_close(mdp.advantages(probs), double([0.2, 1.0, 0.5]) - 0.475)
        torch.testing.assert_close(mdp.visitation(probs), double(1.0))
        # τ log Σ exp(r/τ) each step; its policy is softmax(r/τ).
        soft = mdp.soft_value_iteration(0.5)
        assert soft.values.item() == pytest.approx(4 * 0.5 * (mdp.rewards / 0.5).logsumexp(dim=1).item())
        torch.testing.assert_close(soft.probs, (mdp.rewards / 0.5).softmax(dim=1))

    def test_without_future(self) -> None:
        mdp, probs = random_mdp(4, 3, discount=0.0, seed=0), random_probs(4, 3)
        torch.testing.assert_close(mdp.action_values(probs), mdp.rewards)
        torch.testing.assert_close(mdp.visitation(probs), mdp.initial_probs)
        torch.testing.assert_close(mdp.value_iteration().values, mdp.rewards.amax(dim=1))


class TestEvaluation:
    @quick
    @given(instances)
    def test_bellman_equations_and_both_forms_of_the_return(self, instance: dict[str, Any]) -> None:
        mdp = random_mdp(**instance)
        probs = random_probs(mdp.num_states, mdp.num_actions)
        values, action_values = mdp.values(probs), mdp.action_values(probs)
        torch.testing.assert_close((probs * action_values).sum(dim=1), values)
        assert (probs * mdp.advantages(probs)).sum(dim=1).abs().max() < 1e-12 / (1 - mdp.discount)
        occupancy = mdp.occupancy(probs)
        assert occupancy.sum().item() == pytest.approx(1)
        inner = (occupancy * mdp.rewards).sum() / (1 - mdp.discount)
        torch.testing.assert_close(inner, mdp.expected_return(probs))

    @quick
    @given(instances, st.integers(0, 1000))
    def test_performance_difference_lemma(self, instance: dict[str, Any], seed: int) -> None:
        """J(π') − J(π) = Σ d'_s π'(a|s) A_π(s, a) / (1−γ): visits of one policy, advantages of the other."""
        mdp = random_mdp(**instance)
        first, second = (random_probs(mdp.num_states, mdp.num_actions, seed + i) for i in range(2))
        lemma = (mdp.occupancy(second) * mdp.advantages(first)).sum() / (1 - mdp.discount)
        difference = mdp.expected_return(second) - mdp.expected_return(first)
        assert lemma.item() == pytest.approx(difference.item(), abs=1e-12 / (1 - mdp.discount))

    def test_sum_over_time(self) -> None:
        mdp, probs = random_mdp(4, 3, discount=0.8, seed=1), random_probs(4, 3)
        law, total, visits = (
            mdp.initial_probs,
            torch.zeros((), dtype=torch.float64),
            torch.zeros(4, dtype=torch.float64),
        )
        for t in range(200):  # 0.8^200 = 4e-20
            total += 0.8**t * law @ mdp.policy_rewards(probs)
            visits += 0.2 * 0.8**t * law
            law = law @ mdp.policy_transitions(probs)
        torch.testing.assert_close(mdp.expected_return(probs), total)
        torch.testing.assert_close(mdp.visitation(probs), visits)
        # What the law tends to is the stationary one.
        torch.testing.assert_close(law, mdp.stationary(probs))

    def test_other_rewards_take_the_place_of_the_own(self) -> None:
        mdp, probs = random_mdp(4, 3, discount=0.8, seed=2), random_probs(4, 3)
        other = torch.rand(4, 3, dtype=torch.float64)
        twin = MDP(mdp.transitions, other, mdp.initial_probs, discount=0.8)
        for name in ("policy_rewards", "values", "action_values", "advantages", "expected_return", "logit_gradient"):
            torch.testing.assert_close(getattr(mdp, name)(probs, other), getattr(twin, name)(probs), rtol=0, atol=0)
        assert mdp.average_reward(probs, other) == twin.average_reward(probs)
        assert torch.equal(mdp.value_iteration(rewards=other).values, twin.value_iteration().values)
        soft = mdp.soft_value_iteration(0.1, rewards=other)
        assert torch.equal(soft.values, twin.soft_value_iteration(0.1).values)
        assert torch.equal(npg_step(mdp, probs, 0.1, rewards=other), npg_step(twin, probs, 0.1))

    def test_visits_agree_with_simulation(self) -> None:
        mdp = random_mdp(3, 2, discount=0.7, seed=3)
        policy = TabularSoftmax.from_probs(random_probs(3, 2))
        batch = mdp.sample(policy, 20_000, 30, torch.Generator().manual_seed(0))
        weights = 0.3 * 0.7 ** torch.arange(30.0, dtype=torch.float64)
        pairs = torch.nn.functional.one_hot(batch.observations * 2 + batch.actions, 6).double()
        visits = torch.einsum("t,ntk->nk", weights, pairs)
        # Five standard errors; what the horizon cuts off, 0.7^30 = 2e-5, is far below.
        error = 5 * visits.std(dim=0) / math.sqrt(20_000)
        expected = mdp.occupancy(mdp.log_policy(policy).exp()).flatten()
        assert ((visits.mean(dim=0) - expected).abs() < error).all()
        assert error.max() < 0.01
        returns = batch.rewards @ weights / 0.3
        assert abs(returns.mean().item() - mdp.evaluate(policy)["return"]) < 5 * returns.std().item() / math.sqrt(
            20_000
        )


class TestGradientAndFisher:
    @quick
    @given(instances)
    def test_logit_gradient_agrees_with_finite_differences(self, instance: dict[str, Any]) -> None:
        mdp = random_mdp(**instance)
        logits = random_probs(mdp.num_states, mdp.num_actions, 5).log().flatten()
        gradient = mdp.logit_gradient(logits.reshape(mdp.rewards.shape).softmax(dim=1)).flatten()
        step = 1e-5
        for i, shift in enumerate(step * torch.eye(len(logits), dtype=torch.float64)):
            high, low = (
                mdp.expected_return((logits + sign * shift).reshape(mdp.rewards.shape).softmax(dim=1)).item()
                for sign in (1, -1)
            )
            # Rounding: 1e-16 · J / step, J up to 100 with γ = 0.99, and the solver's factor 1/(1−γ) again.
            assert (high - low) / (2 * step) == pytest.approx(gradient[i].item(), abs=1e-7)

    def test_autograd_on_the_return_agrees(self) -> None:
        mdp, policy = random_mdp(4, 3, discount=0.9, seed=0), TabularSoftmax.from_probs(random_probs(4, 3))
        mdp.expected_return(mdp.log_policy(policy).exp()).backward()
        torch.testing.assert_close(policy.table.weight.grad, mdp.logit_gradient(random_probs(4, 3)))

    def test_fisher_is_that_of_a_table_weighted_by_visits(self) -> None:
        mdp, policy = random_mdp(4, 3, discount=0.9, seed=1), TabularSoftmax.from_probs(random_probs(4, 3))
        probs = random_probs(4, 3)
        expected = exact_fisher(policy, torch.arange(4), mdp.visitation(probs))
        torch.testing.assert_close(mdp.logit_fisher(probs), expected)

    def test_fisher_is_the_hessian_of_kl_at_the_same_visits(self) -> None:
        mdp, probs = random_mdp(3, 3, discount=0.9, seed=2), random_probs(3, 3)
        visits = mdp.visitation(probs)

        def kl(logits: Tensor) -> Tensor:
            return visits @ (probs * (probs.log() - logits.reshape(3, 3).log_softmax(dim=1))).sum(dim=1)

        torch.testing.assert_close(mdp.logit_fisher(probs), jacrev(jacrev(kl))(probs.log().flatten()))

    @quick
    @given(instances, st.sampled_from([0.01, 1.0]))
    def test_npg_step_is_the_pseudo_inverse_on_the_gradient(self, instance: dict[str, Any], step_size: float) -> None:
        mdp = random_mdp(**instance)
        probs = random_probs(mdp.num_states, mdp.num_actions)
        gradient = mdp.logit_gradient(probs).flatten()
        direction = torch.linalg.pinv(mdp.logit_fisher(probs), hermitian=True, rtol=1e-12) @ gradient
        expected = (probs.log() + step_size * direction.reshape(probs.shape)).softmax(dim=1)
        torch.testing.assert_close(npg_step(mdp, probs, step_size), expected, rtol=0, atol=1e-7)

    def test_npg_step_in_the_other_notation(self) -> None:
        mdp, probs = random_mdp(4, 3, discount=0.9, seed=0), random_probs(4, 3)
        weights = probs * (0.3 * mdp.action_values(probs)).exp()
        torch.testing.assert_close(npg_step(mdp, probs, 0.1 * 0.3), weights / weights.sum(dim=1, keepdim=True))

    def test_npg_never_falls_and_leaves_zeros_alone(self) -> None:
        mdp, probs = random_mdp(4, 3, discount=0.9, seed=3), double([0.5, 0.5, 0.0]).expand(4, 3)
        for _ in range(20):
            after = npg_step(mdp, probs, 0.05)
            assert (mdp.values(after) >= mdp.values(probs) - 1e-12).all()  # in every state, not on average only
            probs = after
        assert (probs[:, 2] == 0).all()


class TestOptimum:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("discount", [0.5, 0.95])
    def test_no_deterministic_policy_does_better_in_any_state(self, seed: int, discount: float) -> None:
        mdp = random_mdp(4, 3, discount=discount, seed=seed)
        every = torch.stack([mdp.values(probs) for probs in every_deterministic_policy(mdp)])  # (81, S)
        best = mdp.value_iteration()
        torch.testing.assert_close(best.values, every.amax(dim=0), rtol=0, atol=1e-11)
        assert torch.equal(best.probs, every_deterministic_policy(mdp)[every.sum(dim=1).argmax()])

    @quick
    @given(instances, st.floats(-5, 5))
    def test_fixed_point_with_rewards_of_either_sign(self, instance: dict[str, Any], shift: float) -> None:
        mdp = random_mdp(**instance)
        best = mdp.value_iteration(rewards=mdp.rewards + shift)
        torch.testing.assert_close(best.values, best.action_values.amax(dim=1), rtol=0, atol=1e-10)
        # A constant added to all rewards adds itself / (1−γ) to all values.
        torch.testing.assert_close(
            best.values, mdp.value_iteration().values + shift / (1 - mdp.discount), rtol=0, atol=1e-9
        )

    @quick
    @given(instances, st.sampled_from([0.01, 0.3, 2.0]))
    def test_soft_fixed_point_and_its_policy(self, instance: dict[str, Any], temperature: float) -> None:
        mdp = random_mdp(**instance)
        soft = mdp.soft_value_iteration(temperature)
        torch.testing.assert_close(
            soft.values, temperature * (soft.action_values / temperature).logsumexp(dim=1), rtol=0, atol=1e-9
        )
        torch.testing.assert_close(soft.action_values, mdp.bellman(soft.values))
        # V − Q = −τ log π, and V is the value of π for rewards r − τ log π.
        log_probs = (soft.action_values - soft.values[:, None]) / temperature
        torch.testing.assert_close(soft.probs, log_probs.exp(), rtol=0, atol=1e-7)
        torch.testing.assert_close(
            soft.values, mdp.values(soft.probs, mdp.rewards - temperature * log_probs), rtol=0, atol=1e-8
        )

    def test_no_other_policy_has_a_higher_regularised_value(self) -> None:
        mdp = random_mdp(4, 3, discount=0.9, seed=0)
        best = mdp.soft_value_iteration(0.2)
        for seed in range(20):
            probs = (best.probs.log() + 0.5 * torch.randn(4, 3, dtype=torch.float64)).softmax(dim=1)
            assert (mdp.values(probs, mdp.rewards - 0.2 * probs.log()) < best.values).all(), seed

    def test_soft_tends_to_hard_as_the_temperature_falls(self) -> None:
        mdp = random_mdp(5, 3, discount=0.9, seed=0)
        best = mdp.value_iteration()
        for temperature in (1.0, 0.1, 1e-2, 1e-4, 1e-8):
            soft = mdp.soft_value_iteration(temperature)
            gap = soft.values - best.values
            assert gap.min() > -1e-11
            assert gap.max() <= temperature * math.log(3) / 0.1 + 1e-11  # an entropy ≤ log A a step
        torch.testing.assert_close(soft.probs, best.probs)

    def test_tolerance_is_kept(self) -> None:
        """Seen in the soft values of a coarse run: the last exact evaluation is of second order in the error."""
        mdp = random_mdp(5, 3, discount=0.95, seed=0)
        fine = mdp.soft_value_iteration(0.1).values
        for tolerance in (1e-2, 1e-4):
            error = (mdp.soft_value_iteration(0.1, tolerance=tolerance).values - fine).abs().max()
            assert error < tolerance


class TestTask:
    def test_sample_and_evaluate(self) -> None:
        mdp, policy = stay_or_go(), TabularSoftmax(2, 2)
        batch = mdp.sample(policy, 5, 7, torch.Generator().manual_seed(0))
        assert batch.actions.shape == batch.rewards.shape == (5, 7)
        assert torch.equal(batch.groups, torch.zeros(5, dtype=torch.int64))  # all start in state 0
        # The states are those the actions lead to, the rewards those of the table.
        moved = (batch.observations[:, :-1] + batch.actions[:, :-1]) % 2
        assert torch.equal(batch.observations[:, 1:], moved)
        assert torch.equal(batch.rewards, ((batch.observations == 1) & (batch.actions == 0)).double())
        torch.testing.assert_close(batch.log_probs, policy.log_prob(batch).double())
        result = mdp.evaluate(policy)
        assert result["optimum"] == pytest.approx(9)
        assert result["gap"] == result["optimum"] - result["return"] > 1

    def test_same_generator_same_paths_and_the_horizon_of_a_discount(self) -> None:
        mdp, policy = random_mdp(3, 2, discount=0.9, seed=0), TabularSoftmax(3, 2)
        first, second = (mdp.sample(policy, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first.actions, second.actions)
        length = first.actions.shape[1]
        assert 0.9**length <= 1e-3 < 0.9 ** (length - 1)
        assert random_mdp(3, 2, discount=0.0, seed=0).sample(policy, 4).actions.shape == (4, 1)

    def test_random_instances(self) -> None:
        first, second, third = (random_mdp(3, 2, discount=0.9, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.transitions, second.transitions)
        assert not torch.equal(first.transitions, third.transitions)
        assert not torch.equal(first.rewards, third.rewards)
        sharp = random_mdp(30, 2, discount=0.9, seed=0, concentration=1e-3).transitions.amax(dim=2).mean()
        flat = random_mdp(30, 2, discount=0.9, seed=0, concentration=1e3).transitions.amax(dim=2).mean()
        assert flat < 0.05 < 0.9 < sharp

    def test_single_precision_comes_in_and_double_comes_out(self) -> None:
        mdp = MDP(torch.full((3, 2, 3), 1 / 3), torch.rand(3, 2), discount=0.9)
        probs = torch.full((3, 2), 0.5)
        assert mdp.values(probs).dtype == torch.float64
        assert npg_step(mdp, probs, 0.1).dtype == mdp.occupancy(probs).dtype == torch.float64
        torch.testing.assert_close(mdp.uniform(), probs.double())


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_rows_are_named(self) -> None:
        good = random_mdp(3, 2, discount=0.9, seed=0)
        transitions = good.transitions.clone()
        transitions[2, 1, 0] += 0.5
        with pytest.raises(ValueError, match=r"transitions: .* got sum 1.5 and smallest .* at state 2, action 1"):
            MDP(transitions, good.rewards, discount=0.9)
        transitions = good.transitions.clone()
        transitions[1, 0] = double(-0.25, 0.75, 0.5)
        with pytest.raises(ValueError, match=r"transitions: .* got sum 1 and smallest -0.25 at state 1, action 0"):
            MDP(transitions, good.rewards, discount=0.9)
        with pytest.raises(ValueError, match=r"probs: .* got sum 0.9 and smallest 0.2 at state 1$"):
            good.values(double([0.5, 0.5], [0.2, 0.7], [0.0, 1.0]))
        with pytest.raises(ValueError, match=r"probs: .* got sum nan and smallest nan at state 0$"):
            good.visitation(torch.full((3, 2), math.nan))
        with pytest.raises(ValueError, match=r"initial_probs: expected .* with sum 1, got sum 3 and smallest 1$"):
            MDP(good.transitions, good.rewards, torch.ones(3), discount=0.9)

    def test_shapes_and_numbers(self) -> None:
        good = random_mdp(3, 2, discount=0.9, seed=0)
        with pytest.raises(ValueError, match=r"transitions: expected shape \(S A S\), got \(3, 2\)"):
            MDP(good.rewards, good.rewards, discount=0.9)
        with pytest.raises(ValueError, match=r"transitions: expected shape \(S A S\), got \(3, 2, 4\)"):
            MDP(torch.ones(3, 2, 4) / 4, good.rewards, discount=0.9)
        with pytest.raises(ValueError, match=r"rewards: expected shape \(S=3 A=2\), got \(2, 3\)"):
            MDP(good.transitions, good.rewards.T, discount=0.9)
        with pytest.raises(ValueError, match=r"rewards: expected finite numbers, got inf at index \(0, 0\)"):
            MDP(good.transitions, good.rewards / 0, discount=0.9)
        with pytest.raises(TypeError, match="rewards: expected a floating-point tensor, got"):
            MDP(good.transitions, good.rewards.long(), discount=0.9)
        with pytest.raises(ValueError, match=r"probs: expected shape \(S=3 A=2\), got \(2, 2\)"):
            good.values(torch.full((2, 2), 0.5))
        with pytest.raises(ValueError, match=r"rewards: expected shape \(S=3 A=2\), got \(3,\)"):
            good.values(good.uniform(), torch.zeros(3))
        with pytest.raises(ValueError, match=r"rewards: expected shape \(S=3 A=2\), got \(3, 3\)"):
            good.value_iteration(rewards=torch.zeros(3, 3))
        with pytest.raises(ValueError, match=r"values: expected shape \(S=3\), got \(2,\)"):
            good.bellman(torch.zeros(2))
        with pytest.raises(ValueError, match=r"policy.logits\(states\): expected shape \(S=3 A=2\), got \(3, 5\)"):
            good.evaluate(TabularSoftmax(3, 5))

    def test_numbers_out_of_range(self) -> None:
        good = random_mdp(3, 2, discount=0.9, seed=0)
        for discount in (1, 1.5):
            with pytest.raises(ValueError, match=f"discount: expected a number < 1, got {discount}"):
                MDP(good.transitions, good.rewards, discount=discount)
        with pytest.raises(ValueError, match=r"discount: expected a finite number >= 0, got -0.1"):
            MDP(good.transitions, good.rewards, discount=-0.1)
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
            good.soft_value_iteration(0.0)
        with pytest.raises(ValueError, match="tolerance: expected a finite number > 0, got 0"):
            good.value_iteration(0)
        with pytest.raises(ValueError, match="num_sequences: expected a finite number >= 1, got 0"):
            good.sample(TabularSoftmax(3, 2), 0)
        with pytest.raises(ValueError, match="horizon: expected a finite number >= 1, got 0"):
            good.sample(TabularSoftmax(3, 2), 1, 0)
        with pytest.raises(ValueError, match="concentration: expected a finite number > 0, got 0"):
            random_mdp(3, 2, discount=0.9, seed=0, concentration=0)

    def test_a_chain_in_two_pieces_has_no_one_stationary_law(self) -> None:
        with pytest.raises(ValueError, match="probs: expected a chain with one stationary law"):
            stay_or_go().stationary(double([1.0, 0.0], [1.0, 0.0]))

    def test_a_policy_over_features_is_refused(self) -> None:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            stay_or_go().evaluate(MLP(4, 2))
