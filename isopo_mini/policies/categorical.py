"""What every policy over a finite set of actions can do, given its logits.

π(a|o) = softmax(logits(o))_a. A policy defines `logits`; sampling and log-probabilities follow.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.precision import at_least_float32


def categorical_kl(log_probs: Float[Tensor, "*B A"], other_log_probs: Float[Tensor, "*B A"]) -> Float[Tensor, "*B"]:
    """KL(π ‖ π') = Σ_a π(a) log(π(a)/π'(a)), where either may forbid actions. Differentiable in both.

    0 log 0 = 0: an action that π never takes adds nothing, forbidden by π' or not, and gets no gradient.

    Args:
        log_probs: log π, `(..., A)`; −inf forbids an action.
        other_log_probs: log π', `(..., A)`.

    Returns:
        `(...)`, in at least single precision; infinite where π' forbids an action that π takes.

    Raises:
        ValueError: the shapes differ.
    """
    if other_log_probs.shape != log_probs.shape:
        raise ValueError(
            f"other_log_probs: expected shape {tuple(log_probs.shape)}, got {tuple(other_log_probs.shape)}"
        )
    log_probs, other_log_probs = at_least_float32(log_probs), at_least_float32(other_log_probs)
    difference = torch.where(log_probs > -torch.inf, log_probs - other_log_probs, 0.0)
    # Where the difference is infinite so is the term, also where the probability is too small to be written.
    terms = torch.where(difference == torch.inf, torch.inf, log_probs.exp() * difference)
    return terms.sum(dim=-1)


@torch.no_grad()
def kl_divergence(
    logits_before: Float[Tensor, "*B A"], logits_after: Float[Tensor, "*B A"], mask: Bool[Tensor, "*B"] | None = None
) -> Float[Tensor, ""]:
    """KL(before ‖ after) = mean over real positions of Σ_a π(a) log(π(a)/π'(a)), exact over the actions.

    Args:
        logits_before: of the policy π before the step, `(..., A)`; −inf forbids an action.
        logits_after: of the policy π' after it, `(..., A)`, at the same observations.
        mask: True where a position counts, `(...)`; all of them when None.

    Returns:
        A scalar, float64, ≥ 0 up to rounding; infinite when π' forbids an action that π takes.

    Raises:
        ValueError: shapes differ, or no position counts.
    """
    if logits_after.shape != logits_before.shape:
        raise ValueError(f"logits_after: expected shape {tuple(logits_before.shape)}, got {tuple(logits_after.shape)}")
    before, after = logits_before.double().log_softmax(-1), logits_after.double().log_softmax(-1)
    return _mean(categorical_kl(before, after), mask)


@torch.no_grad()
def entropy(logits: Float[Tensor, "*B A"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, ""]:
    """H = −Σ_a π(a) log π(a) in nats, mean over real positions: log A when uniform, 0 when certain.

    Args:
        logits: `(..., A)`; −inf forbids an action.
        mask: True where a position counts, `(...)`; all of them when None.

    Returns:
        A scalar, float64.

    Raises:
        ValueError: shapes differ, or no position counts.
    """
    return _mean(torch.special.entr(logits.double().softmax(-1)).sum(dim=-1), mask)


def action_log_probs(
    logits: Float[Tensor, "*B A"], actions: Int[Tensor, "*B"], mask: Bool[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """log softmax(logits) at the actions, `(...)`, in at least single precision; 0 where the mask is False."""
    # Padding may hold any action, even an impossible one such as -1.
    actions = actions.masked_fill(~mask, 0)
    log_probs = at_least_float32(logits).log_softmax(dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return log_probs.masked_fill(~mask, 0.0)


class CategoricalPolicy(nn.Module):
    """A policy over A actions. Subclasses define `logits(observations)`, of shape `(..., A)`.

    Calling the policy is calling `logits`, so it works wherever an `nn.Module` does.
    """

    def logits(self, observations: Tensor) -> Float[Tensor, "... A"]:
        """Unnormalised log-probabilities of the A actions at every observation, `(..., A)`."""
        raise NotImplementedError(f"{type(self).__name__} does not define logits(observations)")

    def forward(self, observations: Tensor) -> Float[Tensor, "... A"]:
        """The logits: see `logits`."""
        return self.logits(observations)

    def log_prob(self, batch: Batch) -> Float[Tensor, "S T"]:
        """log π(a_st | o_st) of the batch's actions, differentiable; 0 where `batch.mask` is False.

        Args:
            batch: S sequences of T positions. What padding holds is never looked at.

        Returns:
            `(S, T)`, in at least single precision. Its sum over t is the log-probability of a sequence, whose gradient
            is the score g_s.

        Raises:
            ValueError: the policy's logits do not have the batch's shape `(S, T)` in front.
        """
        logits = self.logits(batch.observations)  # (S, T, A)
        sizes = checks.require_shape("batch.mask", batch.mask, "S T")
        checks.require_shape("logits(batch.observations)", logits, "S T A", sizes)
        return action_log_probs(logits, batch.actions, batch.mask)

    @torch.no_grad()
    def sample_actions(
        self, observations: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "..."], Float[Tensor, "..."]]:
        """Draw one action at every observation.

        Args:
            observations: whatever `logits` takes, with leading axes `(...)`.
            generator: source of randomness, on the policy's device; torch's global one when None.

        Returns:
            The actions, int64 `(...)`, and their log-probabilities `(...)`, without gradient, in at least single
            precision: in half, `torch.multinomial` can draw an action of probability 0.
        """
        log_probs = at_least_float32(self.logits(observations)).log_softmax(dim=-1)
        flat = log_probs.reshape(-1, log_probs.shape[-1]).exp()
        actions = torch.multinomial(flat, 1, generator=generator).reshape(log_probs.shape[:-1])
        return actions, log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the values (...) where the mask is True."""
    if mask is not None:
        if mask.shape != values.shape:
            raise ValueError(f"mask: expected shape {tuple(values.shape)}, got {tuple(mask.shape)}")
        values = values[mask]
    if values.numel() == 0:
        raise ValueError("mask: expected at least one position that counts, got none")
    return values.mean()
