"""Fitted values: exact where the true value lies in their span, least squares else; truncation is bootstrapped."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from isopo_mini.objectives import episode_advantages, fitted_values
from isopo_mini.policies import MLP
from isopo_mini.tasks import CartPole, Episodes


def make_episodes(
    truncated: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0, longest: int = 12, size: int = 3
) -> Episodes:
    """Random observations and rewards, and random lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(truncated), longest)
    lengths = torch.randint(2, longest + 1, shape[:1], generator=generator)
    return Episodes(
        observations=torch.randn(*shape, size, generator=generator, dtype=dtype),
        actions=torch.zeros(shape, dtype=torch.int64),
        mask=torch.arange(longest) < lengths[:, None],
        rewards=torch.randn(shape, generator=generator, dtype=dtype),
        log_probs=torch.zeros(shape, dtype=dtype),
        truncated=truncated,
        final_observations=torch.randn(len(truncated), size, generator=generator, dtype=dtype),
    )


def half_truncated(episodes: int = 40) -> Tensor:
    return torch.arange(episodes) % 2 == 0


def basis(observation: Tensor) -> Tensor:
    """φ of one observation, product by product."""
    o = observation.tolist()
    products = [o[i] * o[j] for i in range(len(o)) for j in range(i, len(o))]
    return torch.tensor([1.0, *o, *products], dtype=torch.float64)


def contraction(truncated: Tensor, factor: float) -> Episodes:
    """o_{t+1} = factor · o_t in every component, reward 2 + o₁ − 3 o₁o₂: V lies in the span of the features."""
    episodes = make_episodes(truncated, size=2)
    powers = factor ** torch.arange(13, dtype=torch.float64)
    path = episodes.observations[:, :1] * powers[:, None]  # (S, 13, 2)
    observations = path[:, :12]
    rewards = 2 + observations[..., 0] - 3 * observations[..., 0] * observations[..., 1]
    last = path[torch.arange(len(truncated)), episodes.lengths()]
    return replace(episodes, observations=observations, rewards=rewards, final_observations=last)


def value_of_contraction(observations: Tensor, factor: float, discount: float) -> Tensor:
    """Σ_k γᵏ r(factorᵏ o), three geometric series."""
    linear = observations[..., 0] / (1 - discount * factor)
    product = observations[..., 0] * observations[..., 1] / (1 - discount * factor**2)
    return 2 / (1 - discount) + linear - 3 * product


# The ridge of 1e-10 is what is left of the error; scaled features are of size 1.
EXACT = {"ridge": 1e-10}


class TestValues:
    @pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
    def test_a_value_in_the_span_is_found_exactly_although_every_episode_was_cut(self, discount: float) -> None:
        episodes = contraction(torch.ones(40, dtype=torch.bool), 0.8)
        values, bootstrap = fitted_values(episodes, discount, **EXACT)
        expected = value_of_contraction(episodes.observations, 0.8, discount).masked_fill(~episodes.mask, 0.0)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            bootstrap, value_of_contraction(episodes.final_observations, 0.8, discount), rtol=1e-6, atol=1e-6
        )

    def test_taking_truncation_for_termination_is_wrong(self) -> None:
        episodes = contraction(torch.ones(40, dtype=torch.bool), 0.8)
        values, _ = fitted_values(replace(episodes, truncated=torch.zeros(40, dtype=torch.bool)), 0.9, **EXACT)
        true = value_of_contraction(episodes.observations, 0.8, 0.9)
        # Of a value near 20, rewards that were seen over at most 12 steps miss a good part.
        assert (true - values)[episodes.mask].mean() > 5

    def test_without_truncation_it_is_ridge_regression(self) -> None:
        discount, ridge = 0.95, 0.1
        episodes = make_episodes(torch.zeros(30, dtype=torch.bool))
        rows, targets = [], []
        for s, length in enumerate(episodes.lengths().tolist()):
            for t in range(length):
                rows.append(basis(episodes.observations[s, t]))
                targets.append(sum(discount ** (k - t) * episodes.rewards[s, k].item() for k in range(t, length)))
        design, target = torch.stack(rows), torch.tensor(targets, dtype=torch.float64)
        scaled = design / design.square().mean(dim=0).sqrt()
        # Ridge regression as least squares with further rows √(N·ridge)·I, and targets 0 for them.
        penalty = math.sqrt(len(rows) * ridge) * torch.eye(design.shape[1], dtype=torch.float64)
        weights = torch.linalg.lstsq(
            torch.cat([scaled, penalty]), torch.cat([target, torch.zeros(len(penalty), dtype=torch.float64)])[:, None]
        ).solution[:, 0]
        values, bootstrap = fitted_values(episodes, discount, ridge=ridge)
        torch.testing.assert_close(values[episodes.mask], scaled @ weights, rtol=1e-9, atol=1e-9)
        assert not bootstrap.any()

    def test_with_both_ends_the_residual_is_orthogonal_to_the_features(self) -> None:
        """The condition that defines w, term by term: Σ_t φ(o_t) (G_t + γ^(T−t) V(o_T) − V(o_t)) = 0."""
        discount = 0.95
        episodes = make_episodes(half_truncated())
        values, bootstrap = fitted_values(episodes, discount, ridge=1e-12)
        assert torch.equal(bootstrap == 0, ~episodes.truncated)
        total = torch.zeros(10, dtype=torch.float64)
        for s, length in enumerate(episodes.lengths().tolist()):
            to_come = bootstrap[s].item()
            for t in reversed(range(length)):
                to_come = episodes.rewards[s, t].item() + discount * to_come
                total += basis(episodes.observations[s, t]) * (to_come - values[s, t].item())
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-6)

    def test_units_order_and_padding_do_not_matter(self) -> None:
        episodes = make_episodes(half_truncated())
        values, bootstrap = fitted_values(episodes, 0.9)
        units = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
        other = replace(
            episodes,
            observations=episodes.observations * units,
            final_observations=episodes.final_observations * units,
        )
        for changed in (
            other,
            replace(episodes, observations=episodes.observations.masked_fill(~episodes.mask[..., None], 777.0)),
            replace(episodes, rewards=episodes.rewards.masked_fill(~episodes.mask, torch.nan)),
        ):
            # Rounding of a system whose condition number is about 10, in float64.
            torch.testing.assert_close(fitted_values(changed, 0.9), (values, bootstrap), rtol=1e-9, atol=1e-9)
        order = torch.randperm(40)
        torch.testing.assert_close(fitted_values(episodes.select(order), 0.9), (values[order], bootstrap[order]))

    def test_degenerate_batches(self) -> None:
        """One step alone, and a component that is always 0: fewer equations than features, and still numbers."""
        episodes = make_episodes(torch.tensor([False]))
        one = replace(episodes, mask=torch.arange(12)[None] < 1, observations=torch.zeros_like(episodes.observations))
        values, bootstrap = fitted_values(one, 0.9)
        assert values[0, 0].item() == pytest.approx(one.rewards[0, 0].item(), rel=1e-4)
        assert bootstrap.tolist() == [0.0]

    def test_the_undiscounted_value_of_episodes_that_end(self) -> None:
        episodes = make_episodes(half_truncated())
        values, _ = fitted_values(episodes, 1.0)
        assert torch.isfinite(values).all()
        with pytest.raises(ValueError, match="discount: expected less than 1 where every episode was truncated, got 1"):
            fitted_values(replace(episodes, truncated=torch.ones(40, dtype=torch.bool)), 1.0)

    def test_they_explain_most_of_what_a_cartpole_policy_gets(self) -> None:
        episodes = CartPole().sample(MLP(4, 2), 200, torch.Generator().manual_seed(0))
        values, _ = fitted_values(episodes, 0.99)
        assert values.dtype == torch.float32
        error = episode_advantages(0.99, 1.0, standardise=False)(episodes)[episodes.mask]  # G − V
        explained = 1 - error.var() / (error + values[episodes.mask]).var()
        assert explained > 0.3  # 0.44 when measured; the noise of an untrained policy is the rest


class TestAdvantages:
    def test_they_are_gae_with_these_values_step_by_step(self) -> None:
        discount, trace_decay = 0.9, 0.7
        episodes = make_episodes(half_truncated())
        values, bootstrap = fitted_values(episodes, discount)
        advantages = episode_advantages(discount, trace_decay, standardise=False)(episodes)
        for s, length in enumerate(episodes.lengths().tolist()):
            following = [*values[s, 1:length].tolist(), bootstrap[s].item()]
            errors = [
                episodes.rewards[s, t].item() + discount * following[t] - values[s, t].item() for t in range(length)
            ]
            for t in range(length):
                expected = sum((discount * trace_decay) ** (k - t) * errors[k] for k in range(t, length))
                assert advantages[s, t].item() == pytest.approx(expected, abs=1e-12)
        assert not advantages[~episodes.mask].any()

    def test_standardised_over_real_steps_only(self) -> None:
        episodes = make_episodes(half_truncated())
        advantages = episode_advantages()(episodes)
        assert advantages[episodes.mask].mean().item() == pytest.approx(0, abs=1e-12)
        assert advantages[episodes.mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
        assert not advantages[~episodes.mask].any()
        plain = episode_advantages(standardise=False)(episodes)[episodes.mask]
        correlation = torch.corrcoef(torch.stack([plain, advantages[episodes.mask]]))[0, 1].item()
        assert correlation == pytest.approx(1)

    def test_it_can_be_sent_to_another_process(self) -> None:
        episodes = make_episodes(half_truncated())
        function = episode_advantages(0.9, 0.5)
        assert torch.equal(pickle.loads(pickle.dumps(function))(episodes), function(episodes))


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e12])
def test_the_unit_of_an_observation_does_not_matter(unit: float) -> None:
    episodes = contraction(half_truncated(), 0.8)
    scaled = replace(
        episodes, observations=unit * episodes.observations, final_observations=unit * episodes.final_observations
    )
    expected, given = fitted_values(episodes), fitted_values(scaled)
    # The system's condition is 1e5 at most.
    torch.testing.assert_close(given[0], expected[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(given[1], expected[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("unit", [1e-3, 1e25])
def test_standardised_advantages_do_not_depend_on_the_unit_of_rewards(unit: float) -> None:
    """The squares of 1e25 are beyond single precision."""
    episodes = make_episodes(half_truncated(), dtype=torch.float32)
    expected = episode_advantages()(episodes)
    given = episode_advantages()(replace(episodes, rewards=unit * episodes.rewards))
    # 1e-8 beside the standard deviation is 1e-5 of it at a unit of 1e-3.
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_single_comes_out(dtype: torch.dtype) -> None:
    episodes = make_episodes(half_truncated(), dtype=torch.float32)
    halves = {
        name: getattr(episodes, name).to(dtype)
        for name in ("observations", "rewards", "log_probs", "final_observations")
    }
    double = replace(episodes, **{name: value.double() for name, value in halves.items()})
    values, bootstrap = fitted_values(replace(episodes, **halves))
    assert values.dtype == bootstrap.dtype == torch.float32
    torch.testing.assert_close(values.double(), fitted_values(double)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_episodes_that_do_not_say_how_they_ended(self) -> None:
        steps = make_episodes(half_truncated()).as_steps()
        with pytest.raises(TypeError, match=r"batch: .* got Batch without truncated and final_observations"):
            fitted_values(steps)

    def test_numbers(self) -> None:
        episodes = make_episodes(half_truncated())
        with pytest.raises(ValueError, match="ridge: expected a finite number > 0, got 0"):
            fitted_values(episodes, ridge=0)
        with pytest.raises(ValueError, match=r"discount: expected a number in \[0, 1\], got 1.5"):
            fitted_values(episodes, 1.5)
        with pytest.raises(ValueError, match=r"discount: expected a number in \[0, 1\], got -1"):
            episode_advantages(-1)
        with pytest.raises(ValueError, match=r"trace_decay: expected a number in \[0, 1\], got 2"):
            episode_advantages(0.9, 2)
        with pytest.raises(ValueError, match="ridge: expected a finite number > 0, got -1"):
            episode_advantages(ridge=-1)

    def test_observations(self) -> None:
        episodes = make_episodes(half_truncated())
        with pytest.raises(ValueError, match=r"batch.observations: expected shape \(S T d\), got \(40, 12\)"):
            fitted_values(
                replace(
                    episodes,
                    observations=episodes.observations[..., 0],
                    final_observations=episodes.final_observations[:, 0],
                )
            )
        with pytest.raises(TypeError, match=r"batch.observations: expected a floating-point tensor, got torch.int64"):
            fitted_values(replace(episodes, observations=episodes.observations.long()))
