"""Optimal values, two ways: the fixed point of a Bellman operator, and policies improved one after the other.

`MDP.value_iteration`, `MDP.soft_value_iteration` and `MDP.policy_iteration` are how to get them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Optimum:
    """What value iteration and policy iteration end with.

    Args:
        values: V*(s), `(S,)`.
        action_values: Q*(s, a) = r + γPV*, `(S, A)`.
        probs: the optimal policy, `(S, A)`.
    """

    values: Float[Tensor, "S"]
    action_values: Float[Tensor, "S A"]
    probs: Float[Tensor, "S A"]


def fixed_point(
    operator: Callable[[Tensor], Tensor], values: Float[Tensor, "S"], bound: float, discount: float, tolerance: float
) -> Float[Tensor, "S"]:
    """V = operator(V), by V ← operator(V) until what the last step δ added pins the fixed point down.

    The fixed point lies between V + γ/(1−γ) min δ and V + γ/(1−γ) max δ; the middle of the two is returned. Where all
    states gain alike this needs far fewer steps than the error of V itself, which falls by γ a step.

    Args:
        operator: V to the V one step earlier, `(S,)` to `(S,)`: monotone, and c more in every state is γc more.
        values: where to begin: zero, `(S,)`.
        bound: of what one step adds, so that V is at most `bound / (1 − γ)` everywhere.
        discount: γ.
        tolerance: largest error in any state; positive. Where rounding does not let V come as close, it comes as
            close as rounding lets it.

    Reference:
        MacQueen, A modified dynamic programming method for Markovian decision problems, 1966, for the two bounds.
    """
    checks.require_positive("tolerance", tolerance)
    reach = discount / (1 - discount)  # what a gain of 1 a step, in every state, is worth
    error = bound / (1 - discount)  # of zero; never below what the gains say, and an end where rounding keeps them up
    while error > tolerance:
        before, values = values, operator(values)
        low, high = torch.aminmax(values - before)
        spread, rounding = (high - low).item(), 4 * len(values) * EPSILON * values.abs().max().item()
        if reach * spread / 2 <= tolerance or spread <= rounding:
            return values + reach * (low + high) / 2
        error *= discount
    return values


def policy_iteration(
    evaluate: Callable[[Tensor], Tensor], bellman: Callable[[Tensor], Tensor], probs: Float[Tensor, "S A"]
) -> Optimum:
    """Howard's algorithm: evaluate a policy exactly, take a better action wherever there is one, until there is none.

    An action is better when it gains more than rounding can, and a policy when the sum of its values is higher. That
    sum only rises, so no policy comes twice, and equally good actions never take turns.

    Args:
        evaluate: a policy to its values, `(S, A)` to `(S,)`.
        bellman: values to action values, `(S,)` to `(S, A)`.
        probs: where to begin: a deterministic policy, `(S, A)`.

    Returns:
        Values, action values and a deterministic policy. No action is worth more than a state's value, up to rounding.

    Reference:
        Howard, Dynamic Programming and Markov Processes, 1960.
    """
    values = evaluate(probs)
    while True:
        action_values = bellman(values)
        best, action = action_values.max(dim=1, keepdim=True)
        gain = best - (probs * action_values).sum(dim=1, keepdim=True)
        rounding = len(values) * EPSILON * action_values.abs().max()
        better = torch.where(gain > rounding, torch.zeros_like(probs).scatter(1, action, 1.0), probs)
        better_values = evaluate(better)
        if not better_values.sum() > values.sum():
            return Optimum(values, action_values, probs)
        probs, values = better, better_values
