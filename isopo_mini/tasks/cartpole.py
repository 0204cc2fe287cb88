"""CartPole: whole episodes of Gymnasium's CartPole-v1, many at once.

An episode ends in one of two ways, which learning must not confuse. It is *terminated* when the pole falls or the
cart leaves the track: nothing follows, the value of the last state is 0. It is *truncated* when the time limit cuts
it: the pole still stands and reward would have gone on, so what is missing must be estimated from the last state.
"""

from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.tasks.episodic import EpisodicTask

NUM_FEATURES = 4  # cart position and velocity, pole angle and angular velocity
NUM_ACTIONS = 2  # push left, push right


@dataclass(frozen=True, eq=False, kw_only=True)
class Episodes(Batch):
    """A batch of whole episodes, with a reward a time step, that knows how each of them ended.

    Args:
        truncated: True where the time limit cut the episode, False where it terminated, bool `(S,)`.
        final_observations: what followed the last action, `(S, ...)`. No action was taken there.

    Raises:
        TypeError: as for `Batch`, or `truncated` is not bool.
        ValueError: as for `Batch`; or rewards are not one a step, an episode does not begin at position 0 or has a
            gap, a shape disagrees, a final observation is not finite.
    """

    truncated: Bool[Tensor, "S"]
    final_observations: Float[Tensor, "S ..."]

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dict(zip("ST", self.mask.shape, strict=True))
        checks.require_shape("rewards", self.rewards, "S T", sizes)
        checks.require_shape("truncated", self.truncated, "S", sizes)
        if self.truncated.dtype != torch.bool:
            raise TypeError(f"truncated: expected a bool tensor, got {self.truncated.dtype}")
        checks.require_floating("final_observations", self.final_observations)
        expected = (self.observations.shape[0], *self.observations.shape[2:])
        if tuple(self.final_observations.shape) != expected:
            raise ValueError(
                f"final_observations: expected shape {expected}, got {tuple(self.final_observations.shape)}"
            )
        checks.require_finite("final_observations", self.final_observations)
        broken = ~self.mask[:, 0] | (self.mask[:, 1:] & ~self.mask[:, :-1]).any(dim=1)
        if broken.any():
            raise ValueError(
                "mask: expected episodes from position 0 on without a gap, "
                f"got another in sequence {int(broken.nonzero()[0])}"
            )

    def lengths(self) -> Tensor:
        """The number of actions in every episode, int64 `(S,)`."""
        return self.mask.sum(dim=1)


class CartPole(EpisodicTask):
    """Keep a pole upright on a cart by pushing it left or right: reward 1 a step, at most `max_steps` steps.

    Args:
        max_steps: the time limit; 500 is CartPole-v1, which counts as solved at a mean return of 475.
        evaluation_episodes: how many episodes `evaluate` plays.

    Raises:
        ValueError: a count is below 1.

    Example:
        >>> import torch
        >>> from isopo_mini.policies import MLP
        >>> episodes = CartPole().sample(MLP(4, 2), 8, torch.Generator().manual_seed(0))
        >>> len(episodes), bool(episodes.truncated.any())
        (8, False)

    Source: Barto, Sutton and Anderson (1983), Neuronlike adaptive elements that can solve difficult learning control
    problems; Towers et al., Gymnasium, arXiv 2407.17032.
    """

    def __init__(self, max_steps: int = 500, *, evaluation_episodes: int = 256) -> None:
        super().__init__(max_steps, evaluation_episodes=evaluation_episodes)

    @torch.no_grad()
    def sample(
        self, policy: CategoricalPolicy, num_sequences: int, generator: torch.Generator | None = None
    ) -> Episodes:
        """Play `num_sequences` episodes side by side, each from a fresh start to its own end.

        Exactly one episode is taken of every environment. Collecting instead whatever ends first, until there are
        enough, would prefer short episodes.

        Args:
            policy: who acts. Observations come in the dtype and on the device of its parameters.
            num_sequences: S.
            generator: source of all randomness, on the policy's device; torch's global one when None.

        Returns:
            Observations `(S, T, 4)`, rewards `(S, T)` and the rest of `Episodes`; T is the longest episode. Padding
            is zero everywhere.

        Raises:
            ValueError: `num_sequences` is below 1, or the policy does not map 4 features to 2 actions.
        """
        checks.require_at_least("num_sequences", num_sequences, 1)
        like = next(policy.parameters(), torch.empty(0))
        environments = gymnasium.make_vec(
            "CartPole-v1",
            num_envs=num_sequences,
            vectorization_mode="vector_entry_point",
            max_episode_steps=self.max_steps,
        )
        seed = torch.randint(2**31, (), generator=generator, device=like.device)
        current, _ = environments.reset(seed=int(seed))  # (S, 4), NumPy
        logits = policy.logits(torch.from_numpy(current[:1]).to(like))
        checks.require_shape("policy.logits(observations)", logits, f"S {NUM_ACTIONS}", {"S": 1})

        running = np.arange(num_sequences)  # those whose first episode goes on; only they ask the policy
        lengths = np.zeros(num_sequences, dtype=np.int64)
        truncated = np.zeros(num_sequences, dtype=np.bool_)
        final = np.empty_like(current)
        pushes = np.zeros(num_sequences, dtype=np.int64)
        observations, actions, log_probs = [], [], []  # a tensor a step, one row a running episode
        while len(running):
            observations.append(torch.from_numpy(current[running]).to(like))
            chosen, chosen_log_probs = policy.sample_actions(observations[-1], generator=generator)
            actions.append(chosen)
            log_probs.append(chosen_log_probs)
            pushes[running] = chosen.cpu().numpy()
            # An environment that has ended starts anew, unobserved: what it does then is never looked at.
            current, _, fell, timed_out, _ = environments.step(pushes)
            lengths[running] += 1
            ended = running[(fell | timed_out)[running]]
            # Falling in the very last step is falling: there is nothing left to bootstrap.
            truncated[ended] = ~fell[ended]
            final[ended] = current[ended]
            running = running[~(fell | timed_out)[running]]
        environments.close()

        mask = torch.arange(len(actions)) < torch.from_numpy(lengths)[:, None]
        mask = mask.to(like.device)
        return Episodes(
            observations=by_episode(observations, mask),
            actions=by_episode(actions, mask),
            mask=mask,
            rewards=mask.to(like.dtype),
            log_probs=by_episode(log_probs, mask),
            truncated=torch.from_numpy(truncated).to(like.device),
            final_observations=torch.from_numpy(final).to(like),
        )


def by_episode(steps: list[Tensor], mask: Bool[Tensor, "S T"]) -> Tensor:
    """From one tensor a time step, with a row for each episode that still ran, to `(S, T, ...)`, zero in padding."""
    flat = torch.cat(steps)
    values = flat.new_zeros(*mask.T.shape, *flat.shape[1:])
    values[mask.T] = flat  # row after row of (T, S): step after step, and episodes in their order
    return values.transpose(0, 1).contiguous()
