"""Unbiased samples of action values by walks that end at random: what regressions on Q can be made of without Q."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.tasks.mdp import MDP
from isopo_mini.tasks.mdp_evaluation import laws


class SampledValues(NamedTuple):
    """N pairs and what followed each of them."""

    states: Int[Tensor, "N"]
    actions: Int[Tensor, "N"]
    returns: Float[Tensor, "N"]  # E[return | state, action] = Q(state, action)
    steps: int  # how many transitions all walks have taken together


@torch.no_grad()
def sample_action_values(
    mdp: MDP, probs: Float[Tensor, "S A"], num_samples: int, generator: torch.Generator | None = None
) -> SampledValues:
    """Walk to a pair (s, a), then on from it, each time until a coin with chance 1 − γ ends the walk.

    The first state is drawn from μ and the first action uniformly, so that the pair is (s, a) with probability
    (1−γ) Σ_t γ^t P(s_t = s, a_t = a), in which every action of every state that μ can draw has a share. Rewards of the
    second walk are added without a discount: the coin is the discount, and the sum is unbiased.

    Args:
        mdp: the process.
        probs: π(a|s), `(S, A)`.
        num_samples: N; each costs about 2γ/(1−γ) transitions.
        generator: source of randomness on the device of the process; torch's global one when None.

    Returns:
        See `SampledValues`.

    Raises:
        ValueError: `num_samples` is below 1, or `probs` is no policy of this process.

    Source: the sampler of Agarwal et al., *On the theory of policy gradient methods*, arXiv 1908.00261, algorithm 1
    (from memory), with a uniform first action.
    """
    checks.require_at_least("num_samples", num_samples, 1)
    checks.require_shape("probs", probs, "S A", {"S": mdp.num_states, "A": mdp.num_actions})
    policy_rows = _cumulative(laws("probs", probs, ("state",)))
    transition_rows = _cumulative(mdp.transitions.flatten(0, 1))
    steps = 0

    def rand(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64, device=mdp.transitions.device)

    def move(states: Tensor, actions: Tensor, walking: Tensor) -> Tensor:
        """One step of those whose coin says so; the others stay, and are no longer among the walking."""
        nonlocal steps
        walking = walking[rand(len(walking)) < mdp.discount]
        steps += len(walking)
        rows = states[walking] * mdp.num_actions + actions[walking]
        states[walking] = _draw(transition_rows, rows, rand(len(walking)))
        actions[walking] = _draw(policy_rows, states[walking], rand(len(walking)))
        return walking

    first = _cumulative(mdp.initial_probs[None])
    everyone = torch.arange(num_samples, device=mdp.transitions.device)
    states = _draw(first, torch.zeros_like(everyone), rand(num_samples))
    actions = (rand(num_samples) * mdp.num_actions).long()
    walking = everyone
    while len(walking):
        walking = move(states, actions, walking)
    now, chosen, returns = states.clone(), actions.clone(), mdp.rewards.new_zeros(num_samples)
    walking = everyone
    while len(walking):
        returns[walking] += mdp.rewards[now[walking], chosen[walking]]
        walking = move(now, chosen, walking)
    return SampledValues(states, actions, returns, steps)


def _cumulative(rows: Float[Tensor, "R n"]) -> Float[Tensor, "R n"]:
    """Cumulative probabilities of each row, plus the row's number: increasing from row to row."""
    sums = rows.cumsum(dim=1)
    return sums / sums[:, -1:] + torch.arange(len(rows), device=rows.device)[:, None]


def _draw(cumulative: Float[Tensor, "R n"], rows: Int[Tensor, "N"], uniform: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
    """One column for each of `rows`, with that row's probabilities."""
    width = cumulative.shape[1]
    found = torch.searchsorted(cumulative.flatten(), rows + uniform, right=True) - rows * width
    return found.clamp(0, width - 1)
