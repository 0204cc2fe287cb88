"""The linear program of a Markov decision process: maximise over occupancies, with constraints and their prices.

What a policy does is its discounted visits x(s, a) = Σ_t γ^t P(s_t = s, a_t = a). They are exactly the non-negative
solutions of Σ_a x(s', a) = μ(s') + γ Σ_sa P(s'|s, a) x(s, a), and J = Σ r x is linear in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.tasks.mdp import MDP

Constraint = tuple[Tensor, float]


@dataclass(frozen=True, eq=False)
class Solution:
    """What `solve_linear_program` found.

    Args:
        value: the largest J, `()`.
        occupancy: d_s π(a|s), `(S, A)`, as `MDP.occupancy`: it sums to 1.
        probs: the optimal policy, `(S, A)`; uniform in states that it never visits.
        multipliers: λ ≥ 0, one a constraint, `(m,)`: by how much J falls where the bound rises by one.
    """

    value: Float[Tensor, ""]
    occupancy: Float[Tensor, "S A"]
    probs: Float[Tensor, "S A"]
    multipliers: Float[Tensor, "m"]


def solve_linear_program(mdp: MDP, constraints: Sequence[Constraint] = ()) -> Solution:
    """The best policy for J among those with J_g ≥ b for every constraint (g, b), by `scipy.optimize.linprog`.

    Args:
        mdp: the process.
        constraints: pairs of rewards g, `(S, A)`, and the least value b of J_g = E Σ_t γ^t g(s_t, a_t).

    Returns:
        Value, occupancy, policy and multipliers. With constraints the policy may have to be random.

    Raises:
        ValueError: a constraint cannot be met: which one, and the best value that J_g can reach (while the
            constraints before it hold).

    Example:
        >>> import torch
        >>> stay = torch.ones(1, 2, 1)  # one state: a bandit, J = r/(1 − γ)
        >>> mdp = MDP(stay, torch.tensor([[1.0, 0.0]]), discount=0.5)
        >>> half = solve_linear_program(mdp, [(torch.tensor([[0.0, 1.0]]), 1.0)])
        >>> half.value.item(), half.probs, half.multipliers
        (1.0, tensor([[0.5000, 0.5000]], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    sizes = {"S": mdp.num_states, "A": mdp.num_actions}
    for index, (rewards, _) in enumerate(constraints):
        checks.require_shape(f"constraints[{index}]", rewards, "S A", sizes)
        checks.require_finite(f"constraints[{index}]", rewards)
    result = _solve(mdp, mdp.rewards, constraints)
    if result.status == 2:  # infeasible
        raise ValueError(_which_fails(mdp, constraints))
    if result.status != 0:
        raise ValueError(f"constraints: the linear program was not solved: {result.message}")
    visits = torch.from_numpy(result.x).clamp(min=0).reshape(mdp.num_states, mdp.num_actions)
    total = visits.sum(dim=1, keepdim=True)
    return Solution(
        value=(visits * mdp.rewards.cpu()).sum(),
        occupancy=(1 - mdp.discount) * visits,
        probs=torch.where(total > 0, visits / total, 1 / mdp.num_actions),
        multipliers=torch.from_numpy(-result.ineqlin.marginals).clamp(min=0),
    )


def _solve(mdp: MDP, rewards: Tensor, constraints: Sequence[Constraint]) -> scipy.optimize.OptimizeResult:
    """max Σ r x over x ≥ 0 with the flow equations and Σ g x ≥ b."""
    states, pairs = mdp.num_states, mdp.num_states * mdp.num_actions
    flow = np.repeat(np.eye(states), mdp.num_actions, axis=1)  # Σ_a x(s', a)
    flow -= mdp.discount * mdp.transitions.cpu().numpy().reshape(pairs, states).T
    return scipy.optimize.linprog(
        -rewards.double().cpu().numpy().ravel(),
        A_ub=np.array([-g.double().cpu().numpy().ravel() for g, _ in constraints]).reshape(-1, pairs),
        b_ub=np.array([-float(b) for _, b in constraints]),
        A_eq=flow,
        b_eq=mdp.initial_probs.cpu().numpy(),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )


def _which_fails(mdp: MDP, constraints: Sequence[Constraint]) -> str:
    """The first constraint that those before it leave no room for, in words."""
    for index, (rewards, bound) in enumerate(constraints):
        best = -_solve(mdp, rewards, constraints[:index]).fun
        if best < bound:
            condition = " while those before it hold" if index else ""
            return (
                f"constraints[{index}]: expected a bound that a policy can reach, "
                f"got {bound:g} where the best value is {best:g}{condition}"
            )
    return "constraints: no policy meets them all, to the solver's tolerance"
