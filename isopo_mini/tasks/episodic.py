"""What the tasks of whole episodes have in common: their settings, and how a policy is evaluated."""

from typing import Any

import torch

from isopo_mini import checks
from isopo_mini.batch import Batch


class EpisodicTask:
    """A task whose `sample` plays whole episodes side by side.

    Args:
        max_steps: the time limit.
        evaluation_episodes: how many episodes `evaluate` plays.
        reward_scale: what rewards in a batch are multiplied by; `evaluate` reports the plain return.

    Raises:
        ValueError: a count is below 1, or the scale is not above 0.
    """

    def __init__(self, max_steps: int, *, evaluation_episodes: int, reward_scale: float = 1.0) -> None:
        checks.require_at_least("max_steps", max_steps, 1)
        checks.require_at_least("evaluation_episodes", evaluation_episodes, 1)
        checks.require_positive("reward_scale", reward_scale)
        self.max_steps = max_steps
        self.evaluation_episodes = evaluation_episodes
        self.reward_scale = reward_scale

    def sample(self, policy: Any, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        """Play `num_sequences` episodes; each task says how."""
        raise NotImplementedError(f"{type(self).__name__} does not define sample(policy, num_sequences, generator)")

    def evaluate(self, policy: Any) -> dict[str, float]:
        """Mean return over episodes with sampled actions, always the same seed, as "return"."""
        device = next(policy.parameters(), torch.empty(0)).device
        generator = torch.Generator(device).manual_seed(0)
        episodes = self.sample(policy, self.evaluation_episodes, generator)
        return {"return": episodes.total_rewards().mean().item() / self.reward_scale}
