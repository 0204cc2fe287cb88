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
from isopo_mini.tasks.mdp_evaluation import Evaluation, laws
from isopo_mini.tasks.value_iteration import Optimum, fixed_point, policy_iteration


class MDP(Evaluation):
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
        self.transitions = laws("transitions", transitions, ("state", "action"))
        self.initial_probs = laws("initial_probs", initial_probs)
        self.rewards, self.discount = rewards.double(), float(discount)
        self.num_states, self.num_actions = sizes["S"], sizes["A"]

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


def npg_step(
    mdp: MDP, probs: Float[Tensor, "S A"], step_size: float, *, rewards: Float[Tensor, "S A"] | None = None
) -> Float[Tensor, "S A"]:
    """One natural gradient step θ + η F⁺∇J in the logits: π ∝ π exp(η A/(1−γ)), state by state, `(S, A)`.

    Papers that write π ∝ π exp(η Q) take the same step with another η: pass `step_size=(1 - mdp.discount) * eta`.
    What Q and A differ by is constant in a state, and softmax does not see it.
    """
    advantages = mdp.advantages(probs, rewards)
    return (probs.double().clamp(min=0).log() + step_size * advantages / (1 - mdp.discount)).softmax(dim=1)
