"""The exercises of the chapters on foundations."""

import torch
from torch import Tensor

from isopo_mini.exercises.exercise import Exercise, normal, solve_damped

# -- Chapter 1: REINFORCE's loss of sequences --------------------------------------------------------------------------


def _one_sequence_at_a_time(log_probs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, advantage in enumerate(advantages):
        total = total - advantage * log_probs[s][mask[s]].sum()
    return total / len(advantages)


def _sequences() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw, cases = normal(0), []
    for S, T in ((4, 1), (2, 5), (3, 3)):  # where S = T, a wrong axis raises no error
        mask = torch.arange(T) < torch.arange(S, 0, -1)[:, None].clamp(max=T)
        cases.append((-draw(S, T).abs(), mask, draw(S)))
    return cases


REINFORCE_LOSS = Exercise(
    _one_sequence_at_a_time,
    _sequences,
    {
        "log_probs * advantages pairs time step t with sequence t. Sum over time first.": (
            lambda log_probs, mask, A: -(A * log_probs * mask).sum() / len(A)
        ),
        "The mask is missing: padding counts as if it had been chosen.": (
            lambda log_probs, mask, A: -(A * log_probs.sum(1)).mean()
        ),
        "This is the mean over all tokens. The score (7) of a sequence is a sum, and the mean is over sequences.": (
            lambda log_probs, mask, A: -(A[:, None] * log_probs * mask).sum() / mask.sum()
        ),
        "This is the sum over sequences; (5) is their mean.": (
            lambda log_probs, mask, A: -(A * (log_probs * mask).sum(1)).sum()
        ),
        "The sign: this is the objective, and a loss is minimised.": (
            lambda log_probs, mask, A: (A * (log_probs * mask).sum(1)).mean()
        ),
    },
)

# -- Chapter 2: the Fisher matrix of a table of logits, times a vector -------------------------------------------------


def _curvature_of_kl(theta: Tensor, v: Tensor) -> Tensor:
    """F is the second derivative of the KL divergence at zero distance."""
    pi = theta.softmax(0)
    return torch.autograd.functional.hvp(lambda x: -(pi * x.log_softmax(0)).sum(), theta, v)[1]


FISHER_PRODUCT = Exercise(
    _curvature_of_kl,
    lambda: [tuple(pair) for pair in normal(0)(3, 2, 5)],
    {
        "This is diag(π) v. The other part, π πᵀ v, is not subtracted.": lambda theta, v: theta.softmax(0) * v,
        "The plain mean of v is subtracted. It must be the mean under π.": (
            lambda theta, v: theta.softmax(0) * (v - v.mean())
        ),
        "v less its mean under π is not yet multiplied by π.": lambda theta, v: v - theta.softmax(0) @ v,
        "π πᵀ v is added; it must be subtracted.": (lambda theta, v: theta.softmax(0) * (v + theta.softmax(0) @ v)),
    },
)

# -- Chapter 3: the natural gradient of weighted samples ---------------------------------------------------------------


def _solved_in_parameters(S: Tensor, A: Tensor, weights: Tensor, damping: float) -> Tensor:
    fisher = S.T @ torch.diag(weights) @ S
    return solve_damped(fisher, S.T @ (weights * A), damping)


def _weighted_samples() -> list[tuple[Tensor, Tensor, Tensor, float]]:
    draw, even = normal(0), torch.full((8,), 1 / 8, dtype=torch.float64)
    uneven = torch.linspace(1, 4, 8, dtype=torch.float64)
    return [(draw(8, 20), draw(8), even, 1e-2), (draw(8, 5), draw(8), uneven / uneven.sum(), 1e-1)]


def _solved_in_samples(rows: Tensor, right: Tensor, damping: float) -> Tensor:
    return rows.T @ solve_damped(rows @ rows.T, right, damping)


WEIGHTED_DUAL = Exercise(
    _solved_in_parameters,
    _weighted_samples,
    {
        "The weights stand in the rows where their roots belong: F̂ = RᵀR with rows √w_n times those of S.": (
            lambda S, A, w, damping: _solved_in_samples(w[:, None] * S, w * A, damping)
        ),
        "The rows carry √w, but the right-hand side does not: the gradient is Rᵀ(√w · A).": (
            lambda S, A, w, damping: _solved_in_samples(w.sqrt()[:, None] * S, A, damping)
        ),
        "The right-hand side carries w where √w is left: the gradient is Rᵀ(√w · A).": (
            lambda S, A, w, damping: _solved_in_samples(w.sqrt()[:, None] * S, w * A, damping)
        ),
        "All samples count alike here: the weights have no effect.": (
            lambda S, A, w, damping: _solved_in_samples(S / len(S) ** 0.5, A / len(S) ** 0.5, damping)
        ),
    },
)

# -- Chapter 4: GSPO's objective ---------------------------------------------------------------------------------------


def _gspo_by_loops(log_pi: Tensor, log_old: Tensor, A: Tensor, mask: Tensor, eps: float) -> Tensor:
    objectives = []
    for s, kept in enumerate(mask):
        ratio = (log_pi[s][kept] - log_old[s][kept]).mean().exp().item()
        bounded = min(max(ratio, 1 - eps), 1 + eps)
        objectives.append(min(ratio * A[s].item(), bounded * A[s].item()))
    return torch.tensor(objectives, dtype=torch.float64)


def _padded_sequences() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    draw = normal(0)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    log_old, A = -draw(4, 5).abs() - 1, draw(4)
    log_pi = log_old + 0.3 * draw(4, 5)
    padded = log_pi.masked_fill(~mask, 7.0)  # something that must not count
    return [(log_pi, log_old, A, mask, 0.1), (padded, log_old, -A, mask, 0.05)]


def _pessimistic(ratio: Tensor, A: Tensor, eps: float) -> Tensor:
    return torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1)


GSPO_OBJECTIVE = Exercise(
    _gspo_by_loops,
    _padded_sequences,
    {
        "s is the mean of the tokens' ratios. It must be exp of the mean of their logarithms.": (
            lambda log_pi, log_old, A, mask, eps: _pessimistic(_mean((log_pi - log_old).exp(), mask), A, eps)
        ),
        "s is the ratio of the whole sequences. GSPO takes its T-th root: the mean of the log-ratios, not the sum.": (
            lambda log_pi, log_old, A, mask, eps: _pessimistic(((log_pi - log_old) * mask).sum(1).exp(), A, eps)
        ),
        "Padding counts: take the mean where the mask is True, and divide by its length.": (
            lambda log_pi, log_old, A, mask, eps: _pessimistic((log_pi - log_old).mean(1).exp(), A, eps)
        ),
        "Padding is left out of the sum, but the sum is divided by all T positions.": (
            lambda log_pi, log_old, A, mask, eps: _pessimistic(((log_pi - log_old) * mask).mean(1).exp(), A, eps)
        ),
        "The minimum with the unclipped s A is missing.": (
            lambda log_pi, log_old, A, mask, eps: _mean(log_pi - log_old, mask).exp().clamp(1 - eps, 1 + eps) * A
        ),
        "Here every token has a ratio of its own, as in GRPO. GSPO has one for a sequence.": (
            lambda log_pi, log_old, A, mask, eps: _mean(_pessimistic((log_pi - log_old).exp(), A[:, None], eps), mask)
        ),
    },
)

EXERCISES = {
    "reinforce_loss": REINFORCE_LOSS,
    "fisher_product": FISHER_PRODUCT,
    "weighted_dual": WEIGHTED_DUAL,
    "gspo_objective": GSPO_OBJECTIVE,
}
