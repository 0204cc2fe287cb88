"""Finite Markov decision processes: J, its gradient, its Fisher matrix and its optimum by linear algebra.

S states, A actions. A start s_0 ~ μ, actions a_t ~ π(·|s_t), rewards r(s_t, a_t), next states
s_{t+1} ~ P(·|s_t, a_t). What a policy earns is J = E Σ_t γ^t r(s_t, a_t). A policy is a table of probabilities
π(a|s), `(S, A)`; `MDP.log_policy` makes one of a `CategoricalPolicy` over state indices. All of it in float64.

The linear program over occupancies, with constraints, is in `isopo_mini.tasks.occupancy`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.categorical import CategoricalPolicy
from isopo_mini.policies.softmax import softmax_fisher
from isopo_mini.tasks.value_iteration import Optimum, fixed_point, policy_iteration


class MDP:
    """A finite Markov decision process with discounted rewards. The policy observes the state's index.

    Everything that takes `probs` is differentiable in them, and takes other `rewards` than the process's own,
    for instance those of a constraint.

    Probabilities that sum to 1 within 1e-5, such as 0.33333 three times or any in float32, are taken as rounded: they
    are kept in float64 and divided by their sum, for what a row lacks is lost at each step, 1/(1−γ) steps long. That
    goes for `transitions`, `initial_probs` and every `probs`. Derivatives in `probs` treat the sum as a constant.

    Args:
        transitions: P(s'|s, a), `(S, A, S)`; each row `transitions[s, a]` sums to 1.
        rewards: r(s, a), `(S, A)`.
        initial_probs: μ, the law of the first state, `(S,)`; uniform when None.
        discount: γ, at least 0 and below 1.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree, a number is not finite, γ is out of range, or probabilities are none: the
            error names the state and action of the row.

    Example:
        >>> import torch
        >>> stay, go = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
        >>> transitions = torch.tensor([[stay[s], go[s]] for s in range(2)])
        >>> mdp = MDP(transitions, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0]), discount=0.5)
        >>> mdp.value_iteration().values  # go to state 1, stay there: 0 + γ(1 + γ + …), and 1 + γ + …
        tensor([1., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        transitions: Float[Tensor, "S A S"],
        rewards: Float[Tensor, "S A"],
        initial_probs: Float[Tensor, "S"] | None = None,
        *,
        discount: float,
    ) -> None:
        sizes = checks.require_shape("transitions", transitions, "S A S")
        checks.require_not_empty("transitions", transitions)
        if initial_probs is None:
            initial_probs = torch.full_like(transitions[:, 0, 0], 1 / sizes["S"])
        for name, tensor, shape in (
            ("transitions", transitions, "S A S"),
            ("rewards", rewards, "S A"),
            ("initial_probs", initial_probs, "S"),
        ):
            checks.require_shape(name, tensor, shape, sizes)
            checks.require_floating(name, tensor)
            checks.require_finite(name, tensor)
            checks.require_same_device(name, tensor, "transitions", transitions)
        checks.require_at_least("discount", discount, 0)
        if discount >= 1:
            raise ValueError(f"discount: expected a number < 1, got {discount}")
        self.transitions = _laws("transitions", transitions, ("state", "action"))
        self.initial_probs = _laws("initial_probs", initial_probs)
        self.rewards, self.discount = rewards.double(), float(discount)
        self.num_states, self.num_actions = sizes["S"], sizes["A"]

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
        return _laws("probs", probs, ("state",))

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

    @torch.no_grad()
    def value_iteration(self, tolerance: float = 1e-12, *, rewards: Float[Tensor, "S A"] | None = None) -> Optimum:
        """V ← max_a (r + γPV) until V is within `tolerance` of V*, then the greedy policy, evaluated exactly.

        Of equally good actions the greedy policy takes the first; rounding may decide which are equal. Near γ = 1 it
        can take 1/(1−γ) times more steps than `policy_iteration` takes solves.
        """
        rewards = self._own(rewards)
        bound = rewards.abs().max().item()

        def backup(values: Tensor) -> Tensor:
            return self.bellman(values, rewards).amax(dim=1)

        values = fixed_point(backup, torch.zeros_like(self.initial_probs), bound, self.discount, tolerance)
        best = self.bellman(values, rewards).argmax(dim=1, keepdim=True)
        probs = torch.zeros_like(self.rewards).scatter(1, best, 1.0)
        values = self.values(probs, rewards)
        return Optimum(values, self.bellman(values, rewards), probs)

    @torch.no_grad()
    def policy_iteration(self, *, rewards: Float[Tensor, "S A"] | None = None) -> Optimum:
        """The same optimum as `value_iteration`, by evaluating a handful of policies: fast at any γ.

        Of equally good actions the policy keeps the one it has; it begins with the highest reward, the first of equals.
        """
        own = self._own(rewards)
        highest = torch.zeros_like(own).scatter(1, own.argmax(dim=1, keepdim=True), 1.0)
        return policy_iteration(
            lambda probs: self.values(probs, own), lambda values: self.bellman(values, own), highest
        )

    @torch.no_grad()
    def soft_value_iteration(
        self, temperature: float, *, rewards: Float[Tensor, "S A"] | None = None, tolerance: float = 1e-12
    ) -> Optimum:
        """The optimum of J + τ Σ_t γ^t entropy: V ← τ log Σ_a exp(Q/τ), Q = r + γPV; the policy softmax(Q/τ).

        Args:
            temperature: τ > 0. As τ → 0 all three tend to those of `value_iteration`.
            rewards: others than the process's own.
            tolerance: how close V comes to its fixed point.

        Returns:
            The entropy-regularised V and Q (entropies of later states included), and the policy.
        """
        checks.require_positive("temperature", temperature)
        rewards = self._own(rewards)
        bound = rewards.abs().max().item() + temperature * math.log(self.num_actions)

        def backup(values: Tensor) -> Tensor:
            return temperature * (self.bellman(values, rewards) / temperature).logsumexp(dim=1)

        values = fixed_point(backup, torch.zeros_like(self.initial_probs), bound, self.discount, tolerance)
        log_probs = (self.bellman(values, rewards) / temperature).log_softmax(dim=1)
        values = self.values(log_probs.exp(), rewards - temperature * log_probs)  # one exact evaluation
        action_values = self.bellman(values, rewards)
        return Optimum(values, action_values, (action_values / temperature).softmax(dim=1))

    @torch.no_grad()
    def sample(
        self,
        policy: CategoricalPolicy,
        num_sequences: int,
        horizon: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Walk `num_sequences` paths of `horizon` steps.

        Args:
            policy: who acts; its observations are state indices.
            num_sequences: N.
            horizon: T; when None the fewest steps with γ^T ≤ 0.001, so that little of J is cut off.
            generator: source of randomness on the device of the process; torch's global one when None.

        Returns:
            Observations (states), actions, mask, log_probs, rewards `(N, T)`, undiscounted; groups `(N,)`, the first
            states.
        """
        checks.require_at_least("num_sequences", num_sequences, 1)
        if horizon is None:
            horizon = 1 if self.discount == 0 else max(1, math.ceil(math.log(1e-3) / math.log(self.discount)))
        checks.require_at_least("horizon", horizon, 1)
        log_policy = self.log_policy(policy)
        probs = log_policy.exp()
        state = torch.multinomial(self.initial_probs, num_sequences, replacement=True, generator=generator)
        states, actions = [], []
        for _ in range(horizon):
            action = torch.multinomial(probs[state], 1, generator=generator)[:, 0]
            states.append(state)
            actions.append(action)
            state = torch.multinomial(self.transitions[state, action], 1, generator=generator)[:, 0]
        visited, taken = torch.stack(states, dim=1), torch.stack(actions, dim=1)  # (N, T)
        return Batch(
            observations=visited,
            actions=taken,
            mask=torch.ones_like(taken, dtype=torch.bool),
            rewards=self.rewards[visited, taken],
            log_probs=log_policy[visited, taken],
            groups=visited[:, 0],
        )

    @torch.no_grad()
    def evaluate(self, policy: CategoricalPolicy) -> dict[str, float]:
        """Exact J as "return", the best possible J as "optimum", and their difference as "gap"."""
        value = self.expected_return(self.log_policy(policy).exp()).item()
        optimum = (self.initial_probs @ self.policy_iteration().values).item()
        return {"return": value, "optimum": optimum, "gap": optimum - value}


def _laws(name: str, probs: Tensor, axes: tuple[str, ...] = ()) -> Tensor:
    """Probabilities along the last axis, in float64, divided by their sum; the derivative leaves the sum out."""
    checks.require_probabilities(name, probs.detach().double(), axes)
    laws = probs.double().clamp(min=0)  # what was below 0 was rounding
    total = laws.detach().sum(dim=-1, keepdim=True)
    exact = (total - 1).abs() <= 4 * torch.finfo(torch.float64).eps  # as it can be: dividing again would move it about
    return laws / torch.where(exact, 1.0, total)


def npg_step(
    mdp: MDP, probs: Float[Tensor, "S A"], step_size: float, *, rewards: Float[Tensor, "S A"] | None = None
) -> Float[Tensor, "S A"]:
    """One natural gradient step θ + η F⁺∇J in the logits: π ∝ π exp(η A/(1−γ)), state by state, `(S, A)`.

    Papers that write π ∝ π exp(η Q) take the same step with another η: pass `step_size=(1 - mdp.discount) * eta`.
    What Q and A differ by is constant in a state, and softmax does not see it.
    """
    advantages = mdp.advantages(probs, rewards)
    return (probs.double().clamp(min=0).log() + step_size * advantages / (1 - mdp.discount)).softmax(dim=1)
