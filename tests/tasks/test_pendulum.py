"""Pendulum: every episode replayed in Gymnasium's own environment; starts, padding, seeds, bad input."""

import math

import gymnasium
import numpy as np
import pytest
import torch

from isopo_mini.objectives.values import episode_advantages
from isopo_mini.policies import GaussianPolicy
from isopo_mini.tasks import Pendulum
from isopo_mini.tasks.pendulum import advance, observe


def make_policy(dtype: torch.dtype = torch.float64, seed: int = 0) -> GaussianPolicy:
    torch.manual_seed(seed)
    return GaussianPolicy(3, 1, hidden=(8,), log_std=0.7).to(dtype)  # σ = 2: many torques are clipped


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_episode_is_what_gymnasiums_environment_does_with_the_same_torques() -> None:
    episodes = Pendulum().sample(make_policy(), 5, seeded())
    assert (episodes.actions.abs() > 2).any()
    environment = gymnasium.make("Pendulum-v1")
    for s in range(len(episodes)):
        environment.reset(seed=0)
        cosine, sine, speed = episodes.observations[s, 0].tolist()
        environment.unwrapped.state = np.array([math.atan2(sine, cosine), speed])
        for t in range(200):
            observation, reward, terminated, truncated, _ = environment.step(episodes.actions[s, t].numpy())
            after = episodes.observations[s, t + 1] if t < 199 else episodes.final_observations[s]
            # Gymnasium's observations are single precision.
            np.testing.assert_allclose(after.numpy(), observation, atol=1e-6)
            assert episodes.rewards[s, t].item() == pytest.approx(float(reward), abs=1e-7)
            assert not terminated
            assert truncated == (t == 199)
    environment.close()


def test_the_whole_state_follows_gymnasiums_to_rounding() -> None:
    environment = gymnasium.make("Pendulum-v1")
    environment.reset(seed=1)
    angle, speed = (torch.tensor([value], dtype=torch.float64) for value in environment.unwrapped.state)
    torques = torch.rand(200, generator=seeded(), dtype=torch.float64) * 6 - 3
    for torque in torques:
        angle, speed, _ = advance(angle, speed, torque[None])
        environment.step(np.array([torque.item()]))
        state = environment.unwrapped.state
        assert angle.item() == pytest.approx(state[0], abs=1e-7)
        assert speed.item() == pytest.approx(state[1], abs=1e-7)
    environment.close()


def test_starts_cover_the_circle_and_are_not_shared() -> None:
    first = Pendulum(1).sample(make_policy(), 4000, seeded()).observations[:, 0]
    torch.testing.assert_close(first[:, :2].square().sum(dim=1), torch.ones(4000, dtype=torch.float64))
    angles, speeds = torch.atan2(first[:, 1], first[:, 0]), first[:, 2]
    assert abs(angles.mean()) < 0.1  # five standard errors of π/√3/√4000 would be .14
    assert angles.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    assert speeds.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.03)
    assert speeds.abs().max() <= 1


def test_samples_repeat_with_the_generator_alone_and_log_probs_are_the_policys() -> None:
    policy, task = make_policy(), Pendulum(30)
    one, torch_state = task.sample(policy, 3, seeded()), torch.get_rng_state()
    two = task.sample(policy, 3, seeded())
    assert torch.equal(torch_state, torch.get_rng_state())
    torch.testing.assert_close(one.actions, two.actions, rtol=0, atol=0)
    torch.testing.assert_close(one.log_probs, policy.log_prob(one).detach())


def test_rewards_are_scaled_and_the_return_is_not() -> None:
    policy = make_policy()
    plain, tenth = Pendulum(20), Pendulum(20, reward_scale=0.1)
    torch.testing.assert_close(
        tenth.sample(policy, 3, seeded()).rewards * 10, plain.sample(policy, 3, seeded()).rewards
    )
    assert tenth.evaluate(policy)["return"] == pytest.approx(plain.evaluate(policy)["return"])
    assert plain.evaluate(policy)["log_std"] == pytest.approx(0.7)


def test_episodes_have_advantages_and_can_be_cut() -> None:
    episodes = Pendulum(20).sample(make_policy(), 6, seeded())
    assert episode_advantages(discount=0.9, trace_decay=0.9)(episodes).shape == (6, 20)
    steps = episodes.as_steps()
    assert steps.actions.shape == (120, 1, 1)
    torch.testing.assert_close(steps.actions.reshape(6, 20, 1), episodes.actions)


def test_observations_are_on_the_circle() -> None:
    angle = torch.tensor([0.0, math.pi / 2])
    torch.testing.assert_close(observe(angle, torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 0, 1], [0, 1, 2]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "max_steps: expected a finite number >= 1, got 0"),
        ({"evaluation_episodes": 0}, "evaluation_episodes: expected a finite number >= 1, got 0"),
        ({"reward_scale": 0.0}, "reward_scale: expected"),
    ],
)
def test_bad_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pendulum(**arguments)  # type: ignore[arg-type]


def test_bad_policies_and_counts() -> None:
    with pytest.raises(ValueError, match="num_sequences: expected a finite number >= 1, got 0"):
        Pendulum().sample(make_policy(), 0)
    with pytest.raises(ValueError, match=r"observations: expected shape \(d=2\)"):
        Pendulum().sample(GaussianPolicy(2, 1), 3)
    with pytest.raises(ValueError, match=r"policy.sample_actions\(observations\): expected shape \(S=3 1\), got"):
        Pendulum().sample(GaussianPolicy(3, 2), 3)
