"""CartPole: every sampled episode replayed by hand in a single environment; ends told apart; no episode preferred."""

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from isopo_mini import Batch
from isopo_mini.policies import MLP, LinearSoftmax
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.tasks import CartPole, Episodes


class Coin(CategoricalPolicy):
    """Pushes right with a fixed probability, has no parameters, and counts the observations it was shown."""

    def __init__(self, right: float = 0.5) -> None:
        super().__init__()
        self.right = right
        self.seen = 0

    def logits(self, observations: Tensor) -> Tensor:
        self.seen += observations[..., 0].numel()
        log_probs = torch.tensor([1 - self.right, self.right], dtype=observations.dtype).log()
        return log_probs.expand(*observations.shape[:-1], 2)


def balancing(strength: float = 10.0) -> LinearSoftmax:
    """Push where the pole falls: holds it for hundreds of steps, the longer the more certain it is."""
    policy = LinearSoftmax(4, 2)
    push = strength * torch.tensor([0.1, 0.3, 5.0, 1.0])
    policy.linear.weight.data = torch.stack([-push, push])
    return policy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replay(episodes: Episodes, episode: int, max_steps: int) -> tuple[np.ndarray, np.ndarray, float, bool, bool]:
    """The same start and actions in Gymnasium's single environment: observations, last one, return, how it ended."""
    environment = gymnasium.make("CartPole-v1", max_episode_steps=max_steps)
    environment.reset(seed=0)
    environment.unwrapped.state = episodes.observations[episode, 0].double().numpy().copy()
    seen, total, terminated, truncated = [], 0.0, False, False
    current = episodes.observations[episode, 0].numpy()
    for action in episodes.actions[episode, episodes.mask[episode]].tolist():
        assert not terminated, "the episode went on after its end"
        assert not truncated, "the episode went on after its time"
        seen.append(current)
        current, reward, terminated, truncated, _ = environment.step(action)
        total += float(reward)
    environment.close()
    return np.stack(seen), current, total, terminated, truncated


@pytest.mark.parametrize(
    ("policy", "max_steps"), [(Coin(), 500), (Coin(), 15), (balancing(), 60), (balancing(0.5), 60)]
)
def test_every_episode_is_what_a_single_environment_does_with_the_same_actions(
    policy: CategoricalPolicy, max_steps: int
) -> None:
    episodes = CartPole(max_steps).sample(policy, 12, seeded())
    for s in range(len(episodes)):
        seen, last, total, terminated, truncated = replay(episodes, s, max_steps)
        assert terminated or truncated, "the episode stopped before its end"
        assert episodes.truncated[s] == (truncated and not terminated)
        assert episodes.rewards[s].sum() == total == episodes.lengths()[s]
        # The replay starts from the float32 rounding of the float64 start; 60 unstable steps amplify it.
        np.testing.assert_allclose(episodes.observations[s, episodes.mask[s]].numpy(), seen, atol=1e-4)
        np.testing.assert_allclose(episodes.final_observations[s].numpy(), last, atol=1e-4)


def test_both_ends_occur_above_and_a_terminated_end_is_outside_the_limits() -> None:
    episodes = CartPole(15).sample(Coin(), 64, seeded())
    fallen = (episodes.final_observations[:, 2].abs() > 12 * 2 * math.pi / 360) | (
        episodes.final_observations[:, 0].abs() > 2.4
    )
    assert 5 < episodes.truncated.sum() < 59
    assert torch.equal(fallen, ~episodes.truncated)
    assert (episodes.lengths()[episodes.truncated] == 15).all()


def test_falling_in_the_very_last_step_is_termination() -> None:
    """Always pushing right drops the pole after 8 to 10 steps, whatever the limit."""
    free = CartPole().sample(Coin(1.0), 40, seeded()).lengths()
    limit = int(free.mode().values)
    episodes = CartPole(limit).sample(Coin(1.0), 40, seeded())
    assert torch.equal(episodes.truncated, free > limit)
    assert ((free == limit) & ~episodes.truncated).sum() > 10


def test_no_bias_towards_short_episodes() -> None:
    """Mean and spread of the lengths agree with single environments, played one after another to their ends."""
    environment = gymnasium.make("CartPole-v1")
    generator = np.random.default_rng(0)
    alone = []
    for seed in range(300):
        environment.reset(seed=seed)
        length, done = 0, False
        while not done:
            _, _, terminated, truncated, _ = environment.step(int(generator.integers(2)))
            length, done = length + 1, terminated or truncated
        alone.append(length)
    environment.close()
    together = CartPole().sample(Coin(), 3000, seeded()).lengths().double()
    error = math.sqrt(np.var(alone) / len(alone) + together.var().item() / len(together))
    assert abs(together.mean().item() - np.mean(alone)) < 4 * error
    assert together.std().item() == pytest.approx(np.std(alone), rel=0.2)  # an exponential tail: about 4 sigma
    # The wrong way, 1500 environments that start anew and whatever 1500 episodes end first, can be told apart.
    ends = together.reshape(1500, 2).cumsum(dim=1).flatten()
    assert together[ends.argsort()[:1500]].mean().item() < np.mean(alone) - 4 * error


def test_the_policy_sees_running_episodes_only() -> None:
    policy = Coin()
    episodes = CartPole().sample(policy, 50, seeded())
    assert policy.seen == episodes.mask.sum() + 1  # one more to look at its shape


def test_padding_is_zero_and_shapes_are_those_of_the_longest_episode() -> None:
    episodes = CartPole().sample(MLP(4, 2), 20, seeded())
    longest = int(episodes.lengths().max())
    assert episodes.observations.shape == (20, longest, 4)
    assert episodes.final_observations.shape == (20, 4)
    padding = ~episodes.mask
    for values in (episodes.observations, episodes.actions, episodes.rewards, episodes.log_probs):
        assert values.is_contiguous()
        assert not values[padding].any()
    assert torch.equal(episodes.rewards, episodes.mask.float())
    assert episodes.groups is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_are_those_of_the_policy_in_its_own_precision(dtype: torch.dtype) -> None:
    policy = MLP(4, 2).to(dtype)
    episodes = CartPole().sample(policy, 20, seeded())
    assert episodes.observations.dtype == episodes.rewards.dtype == episodes.final_observations.dtype == dtype
    # Rows are gathered, so sums run in another order: rounding only.
    torch.testing.assert_close(episodes.log_probs, policy.log_prob(episodes).detach(), rtol=1e-5, atol=1e-6)


def test_actions_follow_the_policy() -> None:
    episodes = CartPole().sample(Coin(0.3), 2000, seeded())
    count = episodes.mask.sum().item()
    frequency = episodes.actions.sum().item() / count
    assert abs(frequency - 0.3) < 5 * math.sqrt(0.3 * 0.7 / count)  # five sigma
    first = episodes.actions[:, 0].double().mean().item()
    assert abs(first - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)


def test_starts_are_uniform_and_not_shared() -> None:
    starts = CartPole(1).sample(Coin(), 2000, seeded()).observations[:, 0]
    assert starts.abs().max() <= 0.05
    assert len(starts.unique(dim=0)) == 2000
    # Uniform on ±0.05: variance 0.05²/3, whose estimate has a relative error of about √(0.8/2000) = 2%.
    torch.testing.assert_close(starts.var(dim=0), torch.full((4,), 0.05**2 / 3), rtol=0.1, atol=0)


def test_samples_repeat_with_the_generator_alone() -> None:
    task, policy = CartPole(), MLP(4, 2)
    first = task.sample(policy, 16, seeded(3))
    torch.manual_seed(99)  # the global generator is not used
    np.random.seed(99)  # noqa: NPY002
    second, other = task.sample(policy, 16, seeded(3)), task.sample(policy, 16, seeded(4))
    assert torch.equal(first.observations, second.observations)
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.final_observations, second.final_observations)
    assert not torch.equal(first.observations[:, 0], other.observations[:, 0])
    generator = seeded(3)
    task.sample(policy, 16, generator)
    assert not torch.equal(task.sample(policy, 16, generator).observations[:, 0], first.observations[:, 0])


def test_evaluation_is_the_mean_length_and_repeats_without_touching_the_global_generator() -> None:
    task, policy = CartPole(100), balancing()
    state = torch.get_rng_state()
    result = task.evaluate(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert result == task.evaluate(policy) == {"return": pytest.approx(100, abs=5)}
    assert task.evaluate(Coin())["return"] == pytest.approx(22.2, abs=3)  # 256 episodes, σ ≈ 12: four sigma


def test_episodes_can_be_cut() -> None:
    episodes = CartPole(30).sample(Coin(), 10, seeded())
    order = torch.tensor([7, 2])
    part = episodes.select(order)
    assert isinstance(part, Episodes)
    assert torch.equal(part.truncated, episodes.truncated[order])
    assert torch.equal(part.final_observations, episodes.final_observations[order])
    assert [len(piece) for piece in episodes.microbatches(4)] == [4, 4, 2]
    steps = episodes.as_steps()
    assert type(steps) is Batch
    assert len(steps) == episodes.mask.sum()
    assert torch.equal(episodes.total_rewards(), episodes.lengths().float())


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_counts(self) -> None:
        with pytest.raises(ValueError, match="max_steps: expected a finite number >= 1, got 0"):
            CartPole(0)
        with pytest.raises(ValueError, match="evaluation_episodes: expected a finite number >= 1, got 0"):
            CartPole(evaluation_episodes=0)
        with pytest.raises(ValueError, match="num_sequences: expected a finite number >= 1, got 0"):
            CartPole().sample(Coin(), 0)

    def test_a_policy_of_another_size(self) -> None:
        with pytest.raises(ValueError, match=r"observations: expected shape \(d=3\), got \(1, 4\)"):
            CartPole().sample(MLP(3, 2), 2)
        with pytest.raises(ValueError, match=r"policy.logits\(observations\): expected shape \(S=1 2\), got \(1, 3\)"):
            CartPole().sample(MLP(4, 3), 2)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"truncated": torch.zeros(4, dtype=torch.bool)}, ValueError, r"truncated: .*\(S=3\), got \(4,\)"),
            ({"truncated": torch.zeros(3)}, TypeError, "truncated: expected a bool tensor, got torch.float32"),
            (
                {"final_observations": torch.zeros(3, 5)},
                ValueError,
                r"final_observations: expected shape \(3, 4\), got \(3, 5\)",
            ),
            (
                {"final_observations": torch.full((3, 4), math.nan)},
                ValueError,
                r"final_observations: expected finite numbers, got nan at index \(0, 0\)",
            ),
            ({"final_observations": torch.zeros(3, 4).long()}, TypeError, "final_observations: expected a floating"),
            ({"rewards": torch.ones(3)}, ValueError, r"rewards: expected shape \(S=3 T=2\), got \(3,\)"),
            (
                {"mask": torch.tensor([[True, True], [False, True], [True, False]])},
                ValueError,
                "mask: expected episodes from position 0 on without a gap, got another in sequence 1",
            ),
        ],
    )
    def test_episodes(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        good = CartPole(2).sample(Coin(), 3, seeded())
        with pytest.raises(error, match=message):
            replace(good, **changes)
