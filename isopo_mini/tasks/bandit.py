"""Bandits: the one task where J, ∇J, F, KL and the optimum are all known in closed form.

A context c is drawn with probability d_c, the policy pulls an arm a ~ π(·|c), and a reward with mean r_ca
comes back. Nothing follows: a sequence is one pull (T = 1), and its group is its context.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.policies.categorical import CategoricalPolicy, categorical_kl
from isopo_mini.policies.softmax import softmax_fisher
from isopo_mini.precision import at_least_float32, common_dtype


class ContextualBandit:
    """C contexts, K arms, and the mean reward r_ca of each arm in each context.

    Everything is computed in at least single precision, whatever the dtype of the policy.

    Args:
        mean_rewards: r_ca, `(C, K)`.
        context_probs: d_c, `(C,)`, non-negative with sum 1 up to the rounding of their dtype, or of four digits; they
            are divided by their sum. Uniform when None.
        noise: what a pull returns: "none" r_ca itself, "gaussian" r_ca + noise_scale · N(0, 1), "bernoulli" 1
            with probability r_ca and else 0.
        noise_scale: standard deviation of the Gaussian noise; not used by the others.
        features: `(C, d)`. When given, the policy observes `features[c]`, else the index c.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree, a number is not finite, probabilities are none, or `noise` is unknown.

    Example:
        >>> import torch
        >>> from isopo_mini.policies import TabularSoftmax
        >>> bandit = ContextualBandit(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> bandit.evaluate(TabularSoftmax(2, 2))
        {'return': 0.75, 'optimum': 1.5, 'gap': 0.75}
    """

    def __init__(
        self,
        mean_rewards: Float[Tensor, "C K"],
        context_probs: Float[Tensor, "C"] | None = None,
        *,
        noise: str = "none",
        noise_scale: float = 1.0,
        features: Float[Tensor, "C d"] | None = None,
    ) -> None:
        sizes = checks.require_shape("mean_rewards", mean_rewards, "C K")
        checks.require_floating("mean_rewards", mean_rewards)
        checks.require_not_empty("mean_rewards", mean_rewards)
        checks.require_finite("mean_rewards", mean_rewards)
        checks.require_choice("noise", noise, ("none", "gaussian", "bernoulli"))
        checks.require_at_least("noise_scale", noise_scale, 0)
        if noise == "bernoulli" and not ((mean_rewards >= 0) & (mean_rewards <= 1)).all():
            low, high = mean_rewards.aminmax()
            raise ValueError(f"mean_rewards: expected Bernoulli means in [0, 1], got {low:g} to {high:g}")
        if context_probs is None:
            context_probs = torch.full_like(mean_rewards[:, 0], 1 / sizes["C"])
        checks.require_shape("context_probs", context_probs, "C", sizes)
        checks.require_floating("context_probs", context_probs)
        checks.require_finite("context_probs", context_probs)
        checks.require_same_device("context_probs", context_probs, "mean_rewards", mean_rewards)
        tolerance = max(1e-4, sizes["C"] * torch.finfo(context_probs.dtype).eps / 2)
        mean_rewards, context_probs = at_least_float32(mean_rewards), at_least_float32(context_probs)
        if (context_probs < 0).any() or abs(context_probs.sum().item() - 1) > tolerance:
            raise ValueError(
                "context_probs: expected non-negative numbers with sum 1, "
                f"got sum {context_probs.sum().item():g} and smallest {context_probs.min().item():g}"
            )
        if features is not None:
            checks.require_shape("features", features, "C d", sizes)
            checks.require_floating("features", features)
            checks.require_finite("features", features)
            checks.require_same_device("features", features, "mean_rewards", mean_rewards)
        self.mean_rewards = mean_rewards
        self.context_probs = context_probs / context_probs.sum()
        self.noise = noise
        self.noise_scale = noise_scale
        self.observations = torch.arange(sizes["C"], device=mean_rewards.device) if features is None else features

    @property
    def optimum(self) -> float:
        """max over policies of J = Σ_c d_c max_a r_ca."""
        return (self.context_probs * self.mean_rewards.amax(dim=1)).sum().item()

    def log_policy(self, policy: CategoricalPolicy) -> Float[Tensor, "C K"]:
        """log π(a|c) for every context and arm, differentiable, `(C, K)`."""
        return self._logits(policy).log_softmax(dim=-1)

    def _logits(self, policy: CategoricalPolicy) -> Float[Tensor, "C K"]:
        """The policy's logits in every context, in at least single precision."""
        logits = policy.logits(self.observations)
        contexts, arms = self.mean_rewards.shape
        checks.require_shape("policy.logits(observations)", logits, "C K", {"C": contexts, "K": arms})
        return at_least_float32(logits)

    def expected_return(self, policy: CategoricalPolicy) -> Float[Tensor, ""]:
        """J = Σ_c d_c Σ_a π(a|c) r_ca, differentiable: `.backward()` gives ∇J of any policy."""
        probs = self.log_policy(policy).exp()
        likeliest, relative = self._relative_rewards(probs)
        return (self.context_probs * (likeliest + (probs * relative).sum(dim=1))).sum()

    @torch.no_grad()
    def advantages(self, policy: CategoricalPolicy) -> Float[Tensor, "C K"]:
        """A_ca = r_ca − V_c with V_c = Σ_b π(b|c) r_cb, `(C, K)`."""
        probs = self.log_policy(policy).exp()
        _, relative = self._relative_rewards(probs)
        return relative - (probs * relative).sum(dim=1, keepdim=True)

    def _relative_rewards(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The mean reward of each context's most probable arm `(C,)`, and all rewards measured from it `(C, K)`.

        Where one arm takes nearly all the probability, its advantage and its part of ∇J are as small as the others
        are rare. Measured from 0 they would be differences of nearly equal numbers, with no digit left.
        """
        likeliest = self.mean_rewards.gather(1, probs.detach().argmax(dim=1, keepdim=True))
        return likeliest[:, 0], self.mean_rewards - likeliest

    @torch.no_grad()
    def logit_gradient(self, policy: CategoricalPolicy) -> Float[Tensor, "C K"]:
        """∂J/∂θ_ca = d_c π(a|c) A_ca, the gradient in the policy's logits, `(C, K)`."""
        return self.context_probs[:, None] * self.log_policy(policy).exp() * self.advantages(policy)

    @torch.no_grad()
    def logit_fisher(self, policy: CategoricalPolicy) -> Float[Tensor, "CK CK"]:
        """Fisher matrix in the logits: one block d_c (diag π_c − π_c π_cᵀ) a context, `(C·K, C·K)`.

        Rows run as `TabularSoftmax` flattens its table: context by context. It is singular, since adding a
        constant to the logits of a context does not change the policy.
        """
        probs = self.log_policy(policy).exp()
        return torch.block_diag(*(self.context_probs[:, None, None] * softmax_fisher(probs)))

    @torch.no_grad()
    def policy_gradient(self, policy: CategoricalPolicy) -> Float[Tensor, "P"]:
        """∇J of any policy by autograd on the exact J; trainable `policy.parameters()`, flattened, `(P,)`."""
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.expected_return(policy), parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def kl(self, policy: CategoricalPolicy, other: CategoricalPolicy) -> Float[Tensor, ""]:
        """KL(policy ‖ other) = Σ_c d_c Σ_a π(a|c) log(π(a|c) / π'(a|c)), differentiable in both.

        An arm that `policy` never pulls adds nothing; it is infinite where `other` never pulls what `policy` does.
        """
        logits, other_logits = self._logits(policy), self._logits(other)
        # In double precision: between two policies that are nearly alike it is a difference of nearly equal numbers.
        kl = categorical_kl(logits.double().log_softmax(dim=-1), other_logits.double().log_softmax(dim=-1))
        return (self.context_probs.double() @ kl).to(common_dtype((logits, other_logits, self.context_probs)))

    @torch.no_grad()
    def every_pull(self, policy: CategoricalPolicy) -> tuple[Tensor, Tensor, Tensor]:
        """All C·K pairs of context and arm: observations, actions, and their probabilities d_c π(a|c).

        A sum over them weighted by the probabilities is an exact expectation, with no sampling noise.
        """
        contexts, arms = self.mean_rewards.shape
        actions = torch.arange(arms, device=self.mean_rewards.device).repeat(contexts)
        probs = self.context_probs[:, None] * self.log_policy(policy).exp()
        return self.observations.repeat_interleave(arms, dim=0), actions, probs.flatten()

    @torch.no_grad()
    def sample(self, policy: CategoricalPolicy, num_sequences: int, generator: torch.Generator | None = None) -> Batch:
        """Pull `num_sequences` arms.

        Args:
            policy: who pulls.
            num_sequences: S.
            generator: source of randomness on the bandit's device; torch's global one when None.

        Returns:
            Observations `(S, 1)` or `(S, 1, d)`; actions, mask, log_probs `(S, 1)`; rewards, groups `(S,)`.
        """
        checks.require_at_least("num_sequences", num_sequences, 1)
        log_policy = self.log_policy(policy)
        contexts = torch.multinomial(self.context_probs, num_sequences, replacement=True, generator=generator)
        actions = torch.multinomial(log_policy.exp()[contexts], 1, generator=generator)  # (S, 1)
        return Batch(
            observations=self.observations[contexts].unsqueeze(1),
            actions=actions,
            mask=torch.ones_like(actions, dtype=torch.bool),
            rewards=self._pull(self.mean_rewards[contexts, actions[:, 0]], generator),
            log_probs=log_policy[contexts].gather(1, actions),
            groups=contexts,
        )

    def _pull(self, means: Tensor, generator: torch.Generator | None) -> Tensor:
        """Rewards with the given means."""
        if self.noise == "bernoulli":
            return torch.bernoulli(means, generator=generator)
        if self.noise == "gaussian":
            draws = torch.randn(means.shape, generator=generator, device=means.device, dtype=means.dtype)
            return means + self.noise_scale * draws
        return means

    @torch.no_grad()
    def evaluate(self, policy: CategoricalPolicy) -> dict[str, float]:
        """Exact J as "return", the best possible J as "optimum", and their difference as "gap"."""
        value = self.expected_return(policy).item()
        return {"return": value, "optimum": self.optimum, "gap": self.optimum - value}


class Bandit(ContextualBandit):
    """A K-armed bandit: one context. The policy is `TabularSoftmax(1, K)` or any other.

    Args:
        mean_rewards: the mean reward of each arm, `(K,)`.
        **options: `noise` and `noise_scale`, as for `ContextualBandit`.

    Example:
        >>> import torch
        >>> Bandit(torch.tensor([0.2, 0.8, 0.5]), noise="bernoulli").optimum
        0.800000011920929
    """

    def __init__(self, mean_rewards: Float[Tensor, "K"], **options: Any) -> None:
        checks.require_shape("mean_rewards", mean_rewards, "K")
        super().__init__(mean_rewards.unsqueeze(0), **options)

    @classmethod
    def two_armed(cls, gap: float = 1.0, **options: Any) -> "Bandit":
        """Arm 0 returns `gap`, arm 1 nothing. With p = π(arm 0), J = gap · p: the escape-time experiment."""
        checks.require_positive("gap", gap)
        return cls(torch.tensor([gap, 0.0]), **options)
