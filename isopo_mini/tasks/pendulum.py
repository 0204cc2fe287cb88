"""Pendulum: swing it up and hold it there, with a torque that is too weak to lift it at once. Many at a time.

The equations of motion are those of Gymnasium's Pendulum-v1, written for a batch: that environment has no vectorised
form, and a loop over separate ones takes fifty times as long. A test steps both side by side.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.policies.gaussian import GaussianPolicy
from isopo_mini.tasks.cartpole import Episodes
from isopo_mini.tasks.episodic import EpisodicTask

NUM_FEATURES = 3  # cos θ, sin θ, θ̇ of an angle θ that is 0 upright
NUM_ACTIONS = 1  # a torque
GRAVITY, MASS, LENGTH, TIME_STEP = 10.0, 1.0, 1.0, 0.05
MAX_SPEED, MAX_TORQUE = 8.0, 2.0


def observe(angle: Float[Tensor, "S"], speed: Float[Tensor, "S"]) -> Float[Tensor, "S 3"]:
    """What the policy sees: (cos θ, sin θ, θ̇)."""
    return torch.stack([angle.cos(), angle.sin(), speed], dim=-1)


def advance(
    angle: Float[Tensor, "S"], speed: Float[Tensor, "S"], torque: Float[Tensor, "S"]
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S"], Float[Tensor, "S"]]:
    """One time step of .05 s: the angles and speeds after it, and the rewards for what was before it.

    θ̈ = 3g/(2l) sin θ + 3/(ml²) u, and r = −(θ² + .1 θ̇² + .001 u²) with θ between −π and π and u the torque, clipped to
    ±2. The speed moves first and is clipped to ±8; the angle then moves with the new speed.

    Args:
        angle: θ in radians, any number of turns, `(S,)`.
        speed: θ̇ in radians a second, `(S,)`.
        torque: u before it is clipped, `(S,)`.
    """
    torque = torque.clamp(-MAX_TORQUE, MAX_TORQUE)
    wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
    reward = -(wrapped.square() + 0.1 * speed.square() + 0.001 * torque.square())
    acceleration = 3 * GRAVITY / (2 * LENGTH) * angle.sin() + 3.0 / (MASS * LENGTH**2) * torque
    speed = (speed + acceleration * TIME_STEP).clamp(-MAX_SPEED, MAX_SPEED)
    return angle + speed * TIME_STEP, speed, reward


class Pendulum(EpisodicTask):
    """Swing a pendulum up and hold it: reward −(θ² + .1 θ̇² + .001 u²) a step, for `max_steps` steps.

    No episode terminates; every one is cut by the time limit.

    Args:
        max_steps: the time limit; 200 is Pendulum-v1.
        evaluation_episodes: how many episodes `evaluate` plays.
        reward_scale: what rewards in a batch are multiplied by, for the sake of value functions and step sizes;
            `evaluate` reports the plain return.

    Raises:
        ValueError: a count is below 1, or the scale is not above 0.

    Example:
        >>> import torch
        >>> from isopo_mini.policies import GaussianPolicy
        >>> episodes = Pendulum().sample(GaussianPolicy(3, 1), 4, torch.Generator().manual_seed(0))
        >>> episodes.actions.shape, bool(episodes.truncated.all())
        (torch.Size([4, 200, 1]), True)

    Source: Towers et al., Gymnasium, arXiv 2407.17032.
    """

    def __init__(self, max_steps: int = 200, *, evaluation_episodes: int = 64, reward_scale: float = 1.0) -> None:
        super().__init__(max_steps, evaluation_episodes=evaluation_episodes, reward_scale=reward_scale)

    @torch.no_grad()
    def sample(self, policy: GaussianPolicy, num_sequences: int, generator: torch.Generator | None = None) -> Episodes:
        """Play `num_sequences` episodes side by side, from angles in ±π and speeds in ±1.

        Args:
            policy: who acts. Observations come in the dtype and on the device of its parameters.
            num_sequences: S.
            generator: source of all randomness, on the policy's device; torch's global one when None.

        Returns:
            Observations `(S, T, 3)`, actions `(S, T, 1)`, rewards `(S, T)` and the rest of `Episodes`, T being the time
            limit. Actions are those that were drawn, before the environment clips them.

        Raises:
            ValueError: `num_sequences` is below 1, or the policy does not map 3 features to 1 torque.
        """
        checks.require_at_least("num_sequences", num_sequences, 1)
        like = next(policy.parameters(), torch.empty(0))
        uniform = torch.rand(2, num_sequences, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1
        angle, speed = uniform[0] * math.pi, uniform[1]
        observations: list[Tensor] = []
        taken: list[tuple[Tensor, Tensor, Tensor]] = []  # action, its reward and its log-probability, one a step
        for _ in range(self.max_steps):
            observations.append(observe(angle, speed))
            action, log_prob = policy.sample_actions(observations[-1], generator=generator)
            checks.require_shape(
                "policy.sample_actions(observations)", action, f"S {NUM_ACTIONS}", {"S": num_sequences}
            )
            angle, speed, reward = advance(angle, speed, action.squeeze(-1).to(like.dtype))
            taken.append((action, reward, log_prob))
        actions, rewards, log_probs = (torch.stack(steps, dim=1) for steps in zip(*taken, strict=True))
        return Episodes(
            observations=torch.stack(observations, dim=1),
            actions=actions,
            mask=torch.ones_like(rewards, dtype=torch.bool),
            rewards=rewards * self.reward_scale,
            log_probs=log_probs,
            truncated=torch.ones(num_sequences, dtype=torch.bool, device=like.device),
            final_observations=observe(angle, speed),
        )

    def evaluate(self, policy: GaussianPolicy) -> dict[str, float]:
        """Mean return over episodes with sampled actions, always the same seed, as "return"; with mean log σ."""
        return super().evaluate(policy) | {"log_std": policy.log_std.mean().item()}
