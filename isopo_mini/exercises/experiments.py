"""The exercises of the chapters on experiments."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from isopo_mini.exercises.exercise import Exercise, normal

# -- Chapter 9: the cosine of a step in logits -------------------------------------------------------------------------


def _with_the_fisher_matrix(u: Tensor, pi: Tensor, r: Tensor, d: Tensor) -> float:
    """The cosine in the metric of F, with F, its pseudo-inverse and the gradient written out."""
    gradient = (d * pi * (r - (pi * r).sum(-1, keepdim=True))).flatten()
    blocks = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    fisher = torch.block_diag(*(d[:, :, None] * blocks))
    natural = torch.linalg.pinv(fisher, hermitian=True) @ gradient
    step = u.flatten()
    return (step @ gradient / ((step @ fisher @ step) * (natural @ gradient)).sqrt()).item()


def _contexts() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    draw = normal(0)
    pi, r = draw(6, 4).softmax(-1), draw(6, 4)
    d = draw(6, 1).softmax(0)
    return [(u, pi, r, d) for u in (draw(6, 4), draw(6, 4), r)]


def _correlation(u: Tensor, r: Tensor, weights: Tensor, mean_weights: Tensor) -> Tensor:
    """The correlation under `weights`, of numbers centred under `mean_weights`."""
    u, r = (v - (mean_weights * v).sum(-1, keepdim=True) for v in (u, r))
    return (weights * u * r).sum() / ((weights * u * u).sum() * (weights * r * r).sum()).sqrt()


COSINE_IN_LOGITS = Exercise(
    _with_the_fisher_matrix,
    _contexts,
    {
        "All contexts count alike: the weights d are missing.": lambda u, pi, r, d: _correlation(u, r, pi, pi),
        "The mean over arms is a plain one. It must be the mean under π.": (
            lambda u, pi, r, d: _correlation(u, r, d * pi, torch.full_like(pi, 1 / pi.shape[-1]))
        ),
        "Nothing is centred: subtract the mean under π in each context.": (
            lambda u, pi, r, d: _correlation(u, r, d * pi, torch.zeros_like(pi))
        ),
        "One mean over all contexts is subtracted. Each context has its own.": (
            lambda u, pi, r, d: _correlation(
                u - (d * pi * u).sum(), r - (d * pi * r).sum(), d * pi, torch.zeros_like(pi)
            )
        ),
        "This is the covariance; its division by two standard deviations is missing.": (
            lambda u, pi, r, d: (d * pi * (u - (pi * u).sum(-1, keepdim=True)) * r).sum()
        ),
    },
)

# -- Chapter 10: what is still to come ---------------------------------------------------------------------------------


def _by_definition(rewards: Tensor, truncated: bool, last_value: float, discount: float) -> Tensor:
    """Σ_k γᵏ r_{t+k}, with the value at the end where there is one: no recursion."""
    T = len(rewards)
    rows = []
    for t in range(T):
        paid = sum(discount ** (k - t) * rewards[k].item() for k in range(t, T))
        rows.append(paid + (discount ** (T - t) * last_value if truncated else 0.0))
    return torch.tensor(rows, dtype=rewards.dtype)


def _episodes() -> list[tuple[Tensor, bool, float, float]]:
    uneven = torch.tensor([1.0, -2.0, 0.5])
    return [(torch.ones(4), True, 7.0, 0.9), (torch.ones(4), False, 7.0, 0.9), (uneven, True, 3.0, 0.5)]


def _backwards(rewards: Tensor, after: float, discount: float) -> Tensor:
    G = torch.zeros_like(rewards)
    for t in reversed(range(len(rewards))):
        after = rewards[t].item() + discount * after
        G[t] = after
    return G


TO_COME = Exercise(
    _by_definition,
    _episodes,
    {
        "The value of the last state is added although the episode is over. Only a truncated one would have gone on.": (
            lambda rewards, truncated, value, discount: _backwards(rewards, value, discount)
        ),
        "A truncated episode would have gone on: its return has the value of the last state too.": (
            lambda rewards, truncated, value, discount: _backwards(rewards, 0.0, discount)
        ),
        "The two ends are exchanged: the value belongs to an episode that was truncated.": (
            lambda rewards, truncated, value, discount: _backwards(rewards, 0.0 if truncated else value, discount)
        ),
        "The value of the last state is one step later than the last reward: it is discounted once more.": (
            lambda rewards, truncated, value, discount: _backwards(
                rewards, (value if truncated else 0.0) / discount, discount
            )
        ),
        "This sums what came before. G_t is about what is still to come.": (
            lambda rewards, truncated, value, discount: _backwards(rewards.flip(0), 0.0, discount).flip(0)
        ),
    },
)

# -- Chapter 11: log-probabilities of responses ------------------------------------------------------------------------


def _by_torch_distributions(logits: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    log_probs = Categorical(logits=logits).log_prob(actions)
    return torch.stack([row[kept].sum() for row, kept in zip(log_probs, mask, strict=True)])


def _responses() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw, whole, cases = normal(0), torch.Generator().manual_seed(0), []
    for S, T, V in ((4, 6, 5), (3, 3, 4)):
        actions = torch.randint(V, (S, T), generator=whole)
        mask = torch.arange(T) >= torch.randint(1, T, (S, 1), generator=whole)
        cases.append((draw(S, T, V), actions, mask))
    return cases


def _picked(log_probs: Tensor, actions: Tensor) -> Tensor:
    return log_probs.gather(-1, actions[..., None])[..., 0]


RESPONSE_LOG_PROBS = Exercise(
    _by_torch_distributions,
    _responses,
    {
        "The prompt counts too: the mask is missing.": (
            lambda logits, actions, mask: _picked(logits.log_softmax(-1), actions).sum(1)
        ),
        "The logits are shifted by one position. Here position t of the logits already belongs to actions[s, t].": (
            lambda logits, actions, mask: (_picked(logits[:, :-1].log_softmax(-1), actions[:, 1:]) * mask[:, 1:]).sum(1)
        ),
        "This is the mean over the response. Its log-probability is the sum.": (
            lambda logits, actions, mask: (_picked(logits.log_softmax(-1), actions) * mask).sum(1) / mask.sum(1)
        ),
        "These are sums of logits: the log-softmax is missing.": (
            lambda logits, actions, mask: (_picked(logits, actions) * mask).sum(1)
        ),
        "The softmax runs over positions. It must run over the vocabulary, the last axis.": (
            lambda logits, actions, mask: (_picked(logits.log_softmax(1), actions) * mask).sum(1)
        ),
        "These are the losses: the sign is missing.": (
            lambda logits, actions, mask: -(_picked(logits.log_softmax(-1), actions) * mask).sum(1)
        ),
    },
)

# -- Chapter 12: the step size that is chosen --------------------------------------------------------------------------

Tried = Mapping[float, Sequence[float]]


def _first_of_equals(tried: Tried) -> float:
    means = {size: np.nan_to_num(tried[size]).mean() for size in sorted(tried)}
    return max(means, key=means.__getitem__)


def _searches() -> list[tuple[Tried]]:
    nan = float("nan")
    return [
        ({0.1: [0.3, 0.4], 0.01: [0.5, 0.4]},),
        ({0.1: [0.9, nan], 0.01: [0.5, 0.5]},),
        ({0.2: [0.25, 0.5], 0.1: [0.5, 0.25], 0.4: [0.25, 0.25]},),
        ({0.3: [0.75, 0.0, nan], 0.03: [0.375, 0.5, 0.375]},),
        ({0.1: [0.5, 0.5], 0.3: [0.25, 0.75], 0.01: [0.25, 0.25]},),
    ]


def _best(tried: Tried, score: Callable[[Sequence[float]], float], larger: bool = False) -> float:
    return max(sorted(tried, reverse=larger), key=lambda size: score(tried[size]))


def _filled(scores: Sequence[float]) -> float:
    return float(np.nan_to_num(scores).mean())


CHOSEN = Exercise(
    _first_of_equals,
    _searches,
    {
        "Runs that diverged are left out of the mean. They count as 0.": lambda tried: _best(tried, np.nanmean),
        "Of two equal means the larger step size is taken. The smaller one is safer.": (
            lambda tried: _best(tried, _filled, larger=True)
        ),
        "Of two equal means the one that stands first is taken. The order must not matter.": (
            lambda tried: max(tried, key=lambda size: _filled(tried[size]))
        ),
        "The best single run decides. It must be the mean over seeds.": (
            lambda tried: _best(tried, lambda scores: max(score for score in scores if not math.isnan(score)))
        ),
        "This is the worst step size.": lambda tried: _best(tried, lambda scores: -_filled(scores)),
        "This is the best mean; asked is the step size that has it.": (
            lambda tried: max(_filled(scores) for scores in tried.values())
        ),
    },
)

EXERCISES = {
    "cosine_in_logits": COSINE_IN_LOGITS,
    "to_come": TO_COME,
    "response_log_probs": RESPONSE_LOG_PROBS,
    "chosen": CHOSEN,
}
