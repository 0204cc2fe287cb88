"""Fixed points of Bellman operators, and what they are returned as. `MDP.value_iteration` is how to get one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks


@dataclass(frozen=True, eq=False)
class Optimum:
    """What value iteration ends with.

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
    """V = operator(V), as often as a contraction by γ needs to come within `tolerance`.

    Args:
        operator: V to the V one step earlier, `(S,)` to `(S,)`.
        values: where to begin: zero, `(S,)`.
        bound: of what one step adds, so that V is at most `bound / (1 − γ)` everywhere.
        discount: γ.
        tolerance: largest error in any state; positive.
    """
    checks.require_positive("tolerance", tolerance)
    error = bound / (1 - discount)  # of zero
    while error > tolerance:
        before, values = values, operator(values)
        if torch.equal(before, values):
            break
        error *= discount
    return values
