"""What a given policy earns and visits in a finite process, by linear systems: the part of `MDP` without a choice."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.policies.softmax import softmax_fisher


def laws(name: str, probs: Tensor, axes: tuple[str, ...] = ()) -> Tensor:
    """Probabilities along the last axis, in float64, divided by their sum; see `MDP`.

    Args:
        name: of the argument, for errors.
        probs: `(…, n)`; each row sums to 1 within 1e-5.
        axes: names of the axes before the last, for errors; none for a single row.

    Returns:
        The same rows, 0 where rounding made them negative. Rows of sum 1 are left as they are: dividing again would
        only move their last digits. The derivative takes the sum for a constant.

    Raises:
        ValueError: a row is none of probabilities.
    """
    checks.require_probabilities(name, probs.detach().double(), axes)
    rows = probs.double().clamp(min=0)
    total = rows.detach().sum(dim=-1, keepdim=True)
    is_one = (total - 1).abs() <= 4 * torch.finfo(torch.float64).eps
    return rows / torch.where(is_one, 1.0, total)


class Evaluation:
    """Methods of `MDP` that take a policy as it is. Each needs one linear system at most."""

    transitions: Tensor  # P, (S, A, S)
    rewards: Tensor  # r, (S, A)
    initial_probs: Tensor  # μ, (S,)
    discount: float  # γ
    num_states: int
    num_actions: int

    def log_policy(self, policy: CategoricalPolicy) -> Float[Tensor, "S A"]:
        """log π(a|s) for every state and action, differentiable, `(S, A)`."""
        logits = policy.logits(torch.arange(self.num_states, device=self.transitions.device))
        sizes = {"S": self.num_states, "A": self.num_actions}
        checks.require_shape("policy.logits(states)", logits, "S A", sizes)
        return logits.double().log_softmax(dim=-1)

    def uniform(self) -> Float[Tensor, "S A"]:
        """The uniform policy, `(S, A)`."""
        return torch.full_like(self.rewards, 1 / self.num_actions)

    def _own(self, rewards: Tensor | None) -> Tensor:
        """The process's own rewards, or others of its size, in float64."""
        if rewards is None:
            return self.rewards
        checks.require_shape("rewards", rewards, "S A", {"S": self.num_states, "A": self.num_actions})
        checks.require_floating("rewards", rewards)
        checks.require_finite("rewards", rewards)
        return rewards.double()

    def _checked(self, probs: Tensor) -> Tensor:
        """A policy of this process's size, in float64, each row with sum 1."""
        checks.require_shape("probs", probs, "S A", {"S": self.num_states, "A": self.num_actions})
        checks.require_floating("probs", probs)
        return laws("probs", probs, ("state",))

    def policy_transitions(self, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S S"]:
        """P_π(s'|s) = Σ_a π(a|s) P(s'|s, a), `(S, S)`."""
        return torch.einsum("sa,sat->st", self._checked(probs), self.transitions)

    def policy_rewards(
        self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None
    ) -> Float[Tensor, "S"]:
        """r_π(s) = Σ_a π(a|s) r(s, a), `(S,)`."""
        return (self._checked(probs) * self._own(rewards)).sum(dim=1)

    def _resolvent(self, probs: Tensor) -> Tensor:
        """I − γP_π."""
        identity = torch.eye(self.num_states, dtype=torch.float64, device=self.transitions.device)
        return identity - self.discount * self.policy_transitions(probs)

    def values(self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None) -> Float[Tensor, "S"]:
        """V = (I − γP_π)⁻¹ r_π, `(S,)`."""
        rewards = self.policy_rewards(probs, rewards)
        mean = rewards.mean()
        plain, rest = torch.linalg.solve(self._resolvent(probs), torch.stack([rewards, rewards - mean], dim=1)).T
        # Where every step pays c, V is c/(1−γ) whatever rounding does to rows that sum to 1. The plain solve does not
        # know that, but its derivative is the one for rows of any sum.
        return plain + (mean / (1 - self.discount) + rest - plain).detach()

    def bellman(self, values: Float[Tensor, "S"], rewards: Float[Tensor, "S A"] | None = None) -> Float[Tensor, "S A"]:
        """r(s, a) + γ Σ_s' P(s'|s, a) V(s'), `(S, A)`: what an action is worth when V is what follows."""
        checks.require_shape("values", values, "S", {"S": self.num_states})
        checks.require_floating("values", values)
        return self._own(rewards) + self.discount * (self.transitions @ values.double())

    def action_values(
        self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None
    ) -> Float[Tensor, "S A"]:
        """Q(s, a) = r(s, a) + γ Σ_s' P(s'|s, a) V(s'), `(S, A)`."""
        return self.bellman(self.values(probs, rewards), rewards)

    def advantages(
        self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None
    ) -> Float[Tensor, "S A"]:
        """A(s, a) = Q(s, a) − V(s), `(S, A)`, with V(s) = Σ_b π(b|s) Q(s, b)."""
        action_values, probs = self.action_values(probs, rewards), self._checked(probs)
        # Measured from the most probable action. Where it takes nearly all the probability its own advantage is as
        # small as the others are rare, and Q − V would leave of it no more than the rounding error of V.
        likeliest = probs.detach().argmax(dim=1, keepdim=True)
        relative = action_values - action_values.gather(1, likeliest)
        return relative - (probs * relative).sum(dim=1, keepdim=True)

    def expected_return(
        self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None
    ) -> Float[Tensor, ""]:
        """J = μᵀV, the discounted return from the first state on."""
        return self.initial_probs @ self.values(probs, rewards)

    def visitation(self, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S"]:
        """d_s = (1−γ) Σ_t γ^t P(s_t = s), that is d = (1−γ)(I − γP_πᵀ)⁻¹ μ, `(S,)`; it sums to 1."""
        visits = torch.linalg.solve(self._resolvent(probs).T, self.initial_probs)
        return visits / visits.detach().sum()  # 1/(1−γ), up to the rounding of the solve

    def occupancy(self, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
        """d_s π(a|s), `(S, A)`; it sums to 1, and J is its inner product with r, divided by 1 − γ."""
        return self.visitation(probs)[:, None] * self._checked(probs)

    def stationary(self, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S"]:
        """The law x = P_πᵀ x that the chain keeps, `(S,)`. No discount.

        Raises:
            ValueError: there are several, since the states fall into classes that never meet.
        """
        transitions = self.policy_transitions(probs)
        # x (I − P + 11ᵀ) = 1ᵀ for x = xP with sum 1; the matrix is singular exactly when x is not unique.
        matrix = torch.eye(self.num_states, dtype=torch.float64, device=transitions.device) - transitions + 1
        smallest = torch.linalg.svdvals(matrix.detach())[-1].item()
        if smallest < 1e-13 * self.num_states:
            raise ValueError("probs: expected a chain with one stationary law, got one with classes that never meet")
        return torch.linalg.solve(matrix.T, torch.ones_like(self.initial_probs))

    def average_reward(
        self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None
    ) -> Float[Tensor, ""]:
        """Σ_s x_s r_π(s), the reward a step in the long run, with x the stationary law. No discount."""
        return self.stationary(probs) @ self.policy_rewards(probs, rewards)

    def logit_gradient(
        self, probs: Float[Tensor, "S A"], rewards: Float[Tensor, "S A"] | None = None
    ) -> Float[Tensor, "S A"]:
        """∂J/∂θ_sa = d_s π(a|s) A(s, a) / (1−γ), the gradient in the policy's logits, `(S, A)`."""
        return self.occupancy(probs) * self.advantages(probs, rewards) / (1 - self.discount)

    def logit_fisher(self, probs: Float[Tensor, "S A"]) -> Float[Tensor, "SA SA"]:
        """Fisher matrix in the logits: one block d_s (diag π_s − π_s π_sᵀ) a state, `(S·A, S·A)`.

        Rows run as `TabularSoftmax` flattens its table: state by state. It is singular, since adding a constant to
        the logits of a state does not change the policy.
        """
        blocks = softmax_fisher(self._checked(probs))  # (S, A, A)
        return torch.block_diag(*(self.visitation(probs)[:, None, None] * blocks))


def evaluate_many(
    transitions: Float[Tensor, "... S A S"],
    probs: Float[Tensor, "... S A"],
    rewards: Float[Tensor, "... m S A"],
    *,
    discount: float,
) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m S A"]]:
    """J and Q of many policies in many processes of one size, at once: for loops of thousands of exact steps.

    What `MDP.expected_return` and `MDP.action_values` give one policy and one reward at a time. Rows of `probs` are
    taken as they are, of any sum, and the first state is drawn uniformly.

    Args:
        transitions: P(s'|s, a).
        probs: π(a|s).
        rewards: m rewards r(s, a) of each process.
        discount: γ, at least 0 and below 1.

    Returns:
        J = mean_s V(s), `(..., m)`, and Q = r + γPV, `(..., m, S, A)`, in float64. Leading axes are broadcast.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree, a number is not finite, or γ is out of range.
    """
    sizes: dict[str, int] = {}
    arguments = (
        ("transitions", transitions, "... S A S"),
        ("probs", probs, "... S A"),
        ("rewards", rewards, "... m S A"),
    )
    for name, tensor, shape in arguments:
        sizes = checks.require_shape(name, tensor, shape, sizes)
        checks.require_floating(name, tensor)
        checks.require_same_device(name, tensor, "transitions", transitions)
    checks.require_at_least("discount", discount, 0)
    if discount >= 1:
        raise ValueError(f"discount: expected a number < 1, got {discount}")
    leading = transitions.shape[:-3], probs.shape[:-2], rewards.shape[:-3]
    try:
        torch.broadcast_shapes(*leading)
    except RuntimeError as error:
        named = ", ".join(str(tuple(axes)) for axes in leading)
        raise ValueError(f"transitions, probs, rewards: expected leading axes that broadcast, got {named}") from error
    transitions, probs, rewards = transitions.double(), probs.double(), rewards.double()
    policy_transitions = (probs[..., None, :] @ transitions)[..., 0, :]  # P_π, (..., S, S)
    policy_rewards = (probs[..., None, :, :] * rewards).sum(dim=-1).mT  # r_π, (..., S, m)
    identity = torch.eye(sizes["S"], dtype=torch.float64, device=probs.device)
    values = torch.linalg.solve(identity - discount * policy_transitions, policy_rewards)  # (..., S, m)
    following = (transitions @ values[..., None, :, :]).movedim(-1, -3)  # PV, (..., m, S, A)
    action_values = rewards + discount * following
    if not math.isfinite(action_values.detach().sum().item()):  # one look a call; which argument it was, only then
        for name, tensor, _ in arguments:
            checks.require_finite(name, tensor)
    return values.mean(dim=-2), action_values
