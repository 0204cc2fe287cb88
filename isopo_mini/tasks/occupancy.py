"""The linear program of a Markov decision process: maximise over occupancies, with constraints and their prices.

What a policy does is its discounted visits x(s, a) = Σ_t γ^t P(s_t = s, a_t = a). They are exactly the non-negative
solutions of Σ_a x(s', a) = μ(s') + γ Σ_sa P(s'|s, a) x(s, a), and J = Σ r x is linear in them.

The solver is content where the equations hold up to 1e-10. It only says which actions are taken and which constraints
bind; what follows from that is computed by linear systems, to float64's rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load themselves when they are used: they take half a second
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
        value: the largest J, `()`: that of `probs`, by `MDP.expected_return`.
        occupancy: d_s π(a|s), `(S, A)`, that of `probs`, by `MDP.occupancy`: it sums to 1.
        probs: the optimal policy, `(S, A)`; uniform in states that it never visits.
        multipliers: λ ≥ 0, one a constraint, `(m,)`: by how much J falls where the bound rises by one. Where a policy
            happens to meet a bound exactly, that price has a jump, and λ is one of the numbers in between.
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
        TypeError: a dtype is wrong.
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
    for index, (rewards, bound) in enumerate(constraints):
        checks.require_shape(f"constraints[{index}]", rewards, "S A", sizes)
        checks.require_floating(f"constraints[{index}]", rewards)
        checks.require_finite(f"constraints[{index}]", rewards)
        checks.require_finite(f"constraints[{index}], its bound", torch.tensor(float(bound), dtype=torch.float64))
    return _optimum(mdp, mdp.rewards, [(rewards.detach().double(), float(bound)) for rewards, bound in constraints])


def _optimum(mdp: MDP, rewards: Tensor, constraints: Sequence[Constraint]) -> Solution:
    """The program for any rewards, with constraints in float64."""
    result = _linprog(mdp, rewards, constraints)
    if result.status == 2:  # infeasible
        raise ValueError(_which_fails(mdp, constraints))
    if result.status != 0:
        raise ValueError(f"constraints: the linear program was not solved: {result.message}")
    visits = torch.from_numpy(result.x).clamp(min=0).reshape(mdp.rewards.shape).to(rewards)
    multipliers = torch.from_numpy(-result.ineqlin.marginals).clamp(min=0).to(rewards)
    slack = torch.from_numpy(result.ineqlin.residual).to(rewards)
    visits, multipliers = _vertex(mdp, rewards, constraints, visits, multipliers, slack)
    total = visits.sum(dim=1, keepdim=True)
    probs = torch.where(total > 0, visits / total, 1 / mdp.num_actions)
    return Solution(mdp.expected_return(probs, rewards), mdp.occupancy(probs), probs, multipliers)


def _linprog(mdp: MDP, rewards: Tensor, constraints: Sequence[Constraint]) -> "scipy.optimize.OptimizeResult":
    """max Σ r d over d = (1−γ)x ≥ 0 with the flow equations and Σ g d ≥ (1−γ)b, in the units of r and b.

    Σ d = 1, so a constant may be taken from r and g. What is left is scaled to 1, for the solver's tolerances are not.
    """
    states, pairs, rest = mdp.num_states, mdp.num_states * mdp.num_actions, 1 - mdp.discount
    own_action = scipy.sparse.kron(scipy.sparse.eye_array(states), np.ones((1, mdp.num_actions)), format="csc")
    flow = own_action - mdp.discount * scipy.sparse.csc_array(mdp.transitions.cpu().numpy().reshape(pairs, states).T)
    objective, _, scale = _standardised(rewards)
    rows = [_standardised(g) for g, _ in constraints]
    result = scipy.optimize.linprog(
        -objective,
        A_ub=np.array([-row for row, _, _ in rows]).reshape(-1, pairs),
        b_ub=np.array([-(rest * b - mean) / size for (_, mean, size), (_, b) in zip(rows, constraints, strict=True)]),
        A_eq=flow,
        b_eq=rest * mdp.initial_probs.cpu().numpy(),
        method="highs",
        # Presolving takes ten times longer than solving where every state can follow every other.
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10, "presolve": False},
    )
    if result.status == 0 and constraints:
        result.ineqlin.marginals *= scale / np.array([size for _, _, size in rows])
    return result


def _standardised(rewards: Tensor) -> tuple[np.ndarray, float, float]:
    """(r − mean)/size as a vector, the mean, and the size, which is the largest entry of what is left."""
    flat = rewards.cpu().numpy().ravel()
    mean = flat.mean()
    size = np.abs(flat - mean).max()
    return (flat - mean) / (size or 1.0), mean, size or 1.0


def _vertex(
    mdp: MDP, rewards: Tensor, constraints: Sequence[Constraint], visits: Tensor, multipliers: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """Visits and multipliers again, from which actions are taken and which constraints bind.

    The columns are the actions taken, and the uniform policy in states never visited. An optimal vertex takes k
    actions more than it visits states, and k constraints bind: with the flow equations, as many as there are columns.
    Their transpose says that V and λ leave nothing to gain in the actions taken.
    """
    taken = visits > 1e-12 * visits.sum()
    unvisited = ~taken.any(dim=1)
    state, action = taken.nonzero(as_tuple=True)
    state = torch.cat([state, unvisited.nonzero()[:, 0]])
    probs = torch.nn.functional.one_hot(action, mdp.num_actions).to(visits)
    probs = torch.cat([probs, torch.full_like(visits[unvisited], 1 / mdp.num_actions)])  # (columns, A)
    extra = len(state) - mdp.num_states  # k
    if extra > len(constraints):
        return visits, multipliers
    bind = slack.argsort()[:extra]
    mean = [(probs * r[state]).sum(dim=1) for r in (rewards, *(constraints[i][0] for i in bind))]
    flow = torch.nn.functional.one_hot(state, mdp.num_states).to(visits)
    flow = flow - mdp.discount * torch.einsum("ca,cas->cs", probs, mdp.transitions[state])  # (columns, S)
    matrix = torch.cat([flow, *(-g[:, None] for g in mean[1:])], dim=1)
    bounds = visits.new_tensor([-constraints[i][1] for i in bind])
    try:
        exact = torch.linalg.solve(matrix.T, torch.cat([mdp.initial_probs, bounds]))
        prices = torch.linalg.solve(matrix, mean[0])[mdp.num_states :]
    except torch.linalg.LinAlgError:  # constraints that say the same
        return visits, multipliers
    rounding = 1e-8 * exact.abs().sum()
    if not (exact > -rounding).all():
        return visits, multipliers
    visits = torch.zeros_like(visits).index_put((state,), probs * exact.clamp(min=0)[:, None], accumulate=True)
    if (multipliers > 0).sum() == extra and (prices >= 0).all():
        multipliers = torch.zeros_like(multipliers).index_put((bind,), prices)
    return visits, multipliers


def _which_fails(mdp: MDP, constraints: Sequence[Constraint]) -> str:
    """The first constraint that those before it leave no room for, in words."""
    for index, (rewards, bound) in enumerate(constraints):
        best = _optimum(mdp, rewards, constraints[:index]).value.item()
        if best < bound:
            condition = " while those before it hold" if index else ""
            return (
                f"constraints[{index}]: expected a bound that a policy can reach, "
                f"got {bound:g} where the best value is {best:g}{condition}"
            )
    return "constraints: no policy meets them all, to the solver's tolerance"
