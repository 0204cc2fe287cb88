"""Acrobot: two links hang from a bar; a motor between them has to swing the lower end up. Many at a time.

The equations of motion are those of Gymnasium's Acrobot-v1, written for a batch: that environment has no vectorised
form, and 128 separate ones take six times as long, policy not counted. A test steps both side by side.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.tasks.cartpole import Episodes, by_episode
from isopo_mini.tasks.episodic import EpisodicTask

NUM_FEATURES = 6  # cos θ₁, sin θ₁, cos θ₂, sin θ₂, θ̇₁, θ̇₂; both angles are 0 where the links hang
NUM_ACTIONS = 3  # a torque of −1, 0 or 1
# Both links have the same length, mass, moment of inertia about their middle, and a centre of mass there.
LENGTH, MASS, INERTIA, CENTRE, GRAVITY, TIME_STEP = 1.0, 1.0, 1.0, 0.5, 9.8, 0.2
MAX_SPEEDS = (4 * math.pi, 9 * math.pi)
HEIGHT = 1.0  # of the lower end above the bar, at which the episode is over
START = 0.1  # angles and speeds of a start are within ± this


def observe(states: Float[Tensor, "S 4"]) -> Float[Tensor, "S 6"]:
    """What the policy sees of the states (θ₁, θ₂, θ̇₁, θ̇₂): (cos θ₁, sin θ₁, cos θ₂, sin θ₂, θ̇₁, θ̇₂)."""
    first, second, *speeds = states.unbind(dim=-1)
    return torch.stack([first.cos(), first.sin(), second.cos(), second.sin(), *speeds], dim=-1)


def is_high(states: Float[Tensor, "S 4"]) -> Bool[Tensor, "S"]:
    """Is the lower end more than a link's length above the bar?"""
    first, second = states[:, 0], states[:, 1]
    return -first.cos() - (first + second).cos() > HEIGHT


def advance(states: Float[Tensor, "S 4"], torque: Float[Tensor, "S"]) -> Float[Tensor, "S 4"]:
    """The states (θ₁, θ₂, θ̇₁, θ̇₂) after one time step of .2 s: one step of the classical Runge–Kutta method.

    Then the angles are wrapped to ±π and the speeds clipped to ±4π and ±9π.

    Args:
        states: in radians, and radians a second.
        torque: on the joint between the links, constant over the step.
    """
    half = TIME_STEP / 2
    first = _velocity(states, torque)
    second = _velocity(states + half * first, torque)
    third = _velocity(states + half * second, torque)
    fourth = _velocity(states + TIME_STEP * third, torque)
    after = states + TIME_STEP / 6 * (first + 2 * second + 2 * third + fourth)
    angles = (after[:, :2] + math.pi) % (2 * math.pi) - math.pi
    most = after.new_tensor(MAX_SPEEDS)
    return torch.cat([angles, after[:, 2:].clamp(-most, most)], dim=1)


def _velocity(states: Float[Tensor, "S 4"], torque: Float[Tensor, "S"]) -> Float[Tensor, "S 4"]:
    """d/dt (θ₁, θ₂, θ̇₁, θ̇₂), from the two equations of motion, solved for the accelerations.

    Source: Sutton and Barto, *Reinforcement Learning*, first edition, section 11.3, with φ₂ and the torque as in
    Gymnasium's default.
    """
    first, second, speed, second_speed = states.unbind(dim=1)
    coupling = MASS * LENGTH * CENTRE * second.cos()
    d1 = MASS * (2 * CENTRE**2 + LENGTH**2) + 2 * coupling + 2 * INERTIA
    d2 = MASS * CENTRE**2 + coupling + INERTIA
    swing = MASS * LENGTH * CENTRE * second.sin()
    phi2 = MASS * CENTRE * GRAVITY * (first + second).sin()
    phi1 = -swing * second_speed * (second_speed + 2 * speed) + MASS * (CENTRE + LENGTH) * GRAVITY * first.sin() + phi2
    numerator = torque + d2 / d1 * phi1 - swing * speed.square() - phi2
    second_acceleration = numerator / (MASS * CENTRE**2 + INERTIA - d2.square() / d1)
    return torch.stack([speed, second_speed, -(d2 * second_acceleration + phi1) / d1, second_acceleration], dim=1)


class Acrobot(EpisodicTask):
    """Swing the lower end of two links above the bar: reward −1 a step, 0 for the one that gets there.

    Args:
        max_steps: the time limit; 500 is Acrobot-v1.
        evaluation_episodes: how many episodes `evaluate` plays.
        reward_scale: what rewards in a batch are multiplied by, for the sake of value functions and step sizes;
            `evaluate` reports the plain return.

    Raises:
        ValueError: a count is below 1, or the scale is not above 0.

    Example:
        >>> import torch
        >>> from isopo_mini.policies import MLP
        >>> episodes = Acrobot(50).sample(MLP(6, 3), 4, torch.Generator().manual_seed(0))
        >>> episodes.observations.shape, bool(episodes.truncated.all())
        (torch.Size([4, 50, 6]), True)

    Source: Sutton (1996), Generalization in reinforcement learning; Towers et al., Gymnasium, arXiv 2407.17032.
    """

    def __init__(self, max_steps: int = 500, *, evaluation_episodes: int = 128, reward_scale: float = 1.0) -> None:
        super().__init__(max_steps, evaluation_episodes=evaluation_episodes, reward_scale=reward_scale)

    @torch.no_grad()
    def sample(
        self, policy: CategoricalPolicy, num_sequences: int, generator: torch.Generator | None = None
    ) -> Episodes:
        """Play `num_sequences` episodes side by side, each from a fresh start near rest to its own end.

        Args:
            policy: who acts. Observations come in the dtype and on the device of its parameters.
            num_sequences: S.
            generator: source of all randomness, on the policy's device; torch's global one when None.

        Returns:
            Observations `(S, T, 6)`, rewards `(S, T)` and the rest of `Episodes`; T is the longest episode. Padding
            is zero everywhere.

        Raises:
            ValueError: `num_sequences` is below 1, or the policy does not map 6 features to 3 actions.
        """
        checks.require_at_least("num_sequences", num_sequences, 1)
        like = next(policy.parameters(), torch.empty(0))
        uniform = torch.rand(num_sequences, 4, generator=generator, dtype=like.dtype, device=like.device)
        states = (2 * uniform - 1) * START
        logits = policy.logits(observe(states[:1]))
        checks.require_shape("policy.logits(observations)", logits, f"S {NUM_ACTIONS}", {"S": 1})

        running = torch.arange(num_sequences, device=like.device)  # only they ask the policy
        lengths = torch.zeros_like(running)
        truncated = torch.ones(num_sequences, dtype=torch.bool, device=like.device)
        final = torch.zeros_like(states)
        taken: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # a step: what was seen, done, earned, and log π
        while len(running):
            seen = observe(states)
            actions, log_probs = policy.sample_actions(seen, generator=generator)
            states = advance(states, torque_of(actions).to(states.dtype))
            high = is_high(states)
            taken.append((seen, actions, high.to(states.dtype) - 1.0, log_probs))
            lengths[running] += 1
            ended = high | (len(taken) == self.max_steps)
            # Getting there in the very last step is getting there: there is nothing left to bootstrap.
            truncated[running[high]] = False
            final[running[ended]] = states[ended]
            running, states = running[~ended], states[~ended]

        mask = torch.arange(len(taken), device=like.device) < lengths[:, None]
        observations, actions, rewards, log_probs = (
            by_episode(list(steps), mask) for steps in zip(*taken, strict=True)
        )
        return Episodes(
            observations=observations,
            actions=actions,
            mask=mask,
            rewards=rewards * self.reward_scale,
            log_probs=log_probs,
            truncated=truncated,
            final_observations=observe(final),
        )


def torque_of(actions: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """−1, 0 or 1 for action 0, 1 or 2."""
    return actions - 1
