"""Acrobot: every episode replayed in Gymnasium's own environment; energy, starts, padding, seeds, bad input."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isopo_mini.objectives.values import episode_advantages
from isopo_mini.policies import MLP, CategoricalPolicy
from isopo_mini.tasks import Acrobot
from isopo_mini.tasks.acrobot import GRAVITY, advance, is_high, observe


class Pumping(CategoricalPolicy):
    """Pushes with the swing of the second link, most of the time: gets the end up within some 100 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def logits(self, observations: Tensor) -> Tensor:
        return self.strength * observations[..., 5:6].sign() * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_episode_is_what_gymnasiums_environment_does_with_the_same_actions() -> None:
    episodes = Acrobot(120).sample(Pumping(), 6, seeded())
    assert 0 < episodes.truncated.sum() < 6  # some get there and some do not
    environment = gymnasium.make("Acrobot-v1", max_episode_steps=120)
    for s in range(len(episodes)):
        environment.reset(seed=0)
        start = episodes.observations[s, 0]
        angles = torch.atan2(start[[1, 3]], start[[0, 2]])
        environment.unwrapped.state = torch.cat([angles, start[4:]]).numpy()
        length = int(episodes.mask[s].sum())
        for t in range(length):
            observation, reward, terminated, truncated, _ = environment.step(int(episodes.actions[s, t]))
            assert episodes.rewards[s, t].item() == reward
            assert (terminated or truncated) == (t == length - 1)
            after = episodes.final_observations[s] if terminated or truncated else episodes.observations[s, t + 1]
            np.testing.assert_allclose(after.numpy(), observation, atol=1e-6)  # theirs are single precision
        assert truncated == bool(episodes.truncated[s])
    environment.close()


def test_the_state_follows_gymnasiums_to_rounding_at_every_speed() -> None:
    environment = gymnasium.make("Acrobot-v1").unwrapped
    environment.reset(seed=0)
    size = torch.tensor([math.pi, math.pi, 4 * math.pi, 9 * math.pi], dtype=torch.float64)
    states = (2 * torch.rand(200, 4, generator=seeded(), dtype=torch.float64) - 1) * size
    actions = torch.randint(0, 3, (200,), generator=seeded(1))
    after = advance(states, actions - 1.0)
    clipped = 0
    for state, action, ours in zip(states, actions, after, strict=True):
        environment.state = state.numpy()
        environment.step(int(action))
        np.testing.assert_allclose(ours.numpy(), environment.state, atol=1e-9)
        assert bool(is_high(ours[None])) == environment._terminal()
        clipped += int((ours[2:].abs() == size[2:]).any())
    assert clipped > 0


def test_without_a_torque_energy_is_kept() -> None:
    """An independent check of the equations: kinetic and potential energy of two rods, from their positions."""
    state = torch.tensor([[0.4, -0.3, 0.5, -0.7]], dtype=torch.float64)
    torque = torch.zeros(1, dtype=torch.float64)

    def energy(states: Tensor) -> float:
        first, second, speed, second_speed = states[0].tolist()
        both = first + second
        # the centre of the second rod, and its velocity
        velocity = (
            math.cos(first) * speed + 0.5 * math.cos(both) * (speed + second_speed),
            math.sin(first) * speed + 0.5 * math.sin(both) * (speed + second_speed),
        )
        kinetic = 0.5 * (0.25 + 1) * speed**2 + 0.5 * (
            velocity[0] ** 2 + velocity[1] ** 2 + (speed + second_speed) ** 2
        )
        return kinetic - GRAVITY * (0.5 * math.cos(first) + math.cos(first) + 0.5 * math.cos(both))

    # Gymnasium's second equation is the book's, in which the two links exchange energy as they should.
    start = energy(state)
    for _ in range(20):
        state = advance(state, torque)
    assert energy(state) == pytest.approx(start, rel=2e-3)  # steps of .2 s are coarse


def test_starts_are_near_rest_and_not_shared() -> None:
    first = Acrobot(1).sample(MLP(6, 3).double(), 4000, seeded()).observations[:, 0]
    angles = torch.atan2(first[:, [1, 3]], first[:, [0, 2]])
    states = torch.cat([angles, first[:, 4:]], dim=1)
    assert states.abs().max() <= 0.1
    torch.testing.assert_close(
        states.std(dim=0), torch.full((4,), 0.1 / math.sqrt(3), dtype=torch.float64), rtol=0.05, atol=0
    )
    correlations = torch.corrcoef(states.T) - torch.eye(4, dtype=torch.float64)
    assert correlations.abs().max() < 0.08  # five standard errors


def test_samples_repeat_with_the_generator_alone_and_log_probs_are_the_policys() -> None:
    policy, task = Pumping(), Acrobot(90)
    one, torch_state = task.sample(policy, 5, seeded()), torch.get_rng_state()
    two = task.sample(policy, 5, seeded())
    assert torch.equal(torch_state, torch.get_rng_state())
    torch.testing.assert_close(one.actions, two.actions, rtol=0, atol=0)
    torch.testing.assert_close(one.log_probs, policy.log_prob(one).detach())
    assert not one.rewards[~one.mask].any()


def test_rewards_are_scaled_and_the_return_is_not() -> None:
    policy = Pumping()
    plain, tenth = Acrobot(100), Acrobot(100, reward_scale=0.1)
    torch.testing.assert_close(
        tenth.sample(policy, 3, seeded()).rewards * 10, plain.sample(policy, 3, seeded()).rewards
    )
    assert tenth.evaluate(policy)["return"] == pytest.approx(plain.evaluate(policy)["return"])
    assert Acrobot(7).evaluate(MLP(6, 3))["return"] == -7.0  # nobody gets there so soon


def test_getting_there_in_the_last_step_is_no_cut() -> None:
    whole = Acrobot(300).sample(Pumping(), 1, seeded(3))
    length = int(whole.mask.sum())
    assert length < 300
    exactly, short = (Acrobot(most).sample(Pumping(), 1, seeded(3)) for most in (length, length - 1))
    assert not exactly.truncated[0]
    assert exactly.rewards[0, -1] == 0
    assert short.truncated[0]


def test_episodes_have_advantages_and_can_be_cut() -> None:
    episodes = Acrobot(60).sample(Pumping(), 6, seeded())
    assert episode_advantages(discount=0.9, trace_decay=0.9)(episodes).shape == episodes.mask.shape
    assert episodes.as_steps().actions.shape[0] == episodes.mask.sum()


def test_observations_are_of_both_links() -> None:
    states = torch.tensor([[0.0, math.pi / 2, 1.0, 2.0]])
    torch.testing.assert_close(observe(states), torch.tensor([[1.0, 0, 0, 1, 1, 2]]))


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
        Acrobot(**arguments)  # type: ignore[arg-type]


def test_bad_policies_and_counts() -> None:
    with pytest.raises(ValueError, match="num_sequences: expected a finite number >= 1, got 0"):
        Acrobot().sample(MLP(6, 3), 0)
    with pytest.raises(ValueError, match=r"observations: expected"):
        Acrobot().sample(MLP(4, 3), 3)
    with pytest.raises(ValueError, match=r"policy.logits\(observations\): expected shape \(S=1 3\), got"):
        Acrobot().sample(MLP(6, 2), 3)
