"""The π_old family: surrogate losses that let one batch be used for several steps.

All share one signature and return `(loss, metrics)`; the loss is minimised. r = π/π_old is the ratio of a token and A
its advantage. Where published codes differ, both dialects are here by name. While r = 1 the gradient of each of them
is that of `reinforce` with the same `aggregate`; from the second step on they differ in what they clip.

The metrics are means over real tokens:

- `ratio_mean`: r, 1 on average as long as the actions are π_old's;
- `clip_fraction`: share of tokens that the loss treats otherwise than without its clip;
- `kl_old`: KL(π_old ‖ π) as `kl.estimate` has it with "k3".

A token that is clipped has gradient 0, exactly, however far its ratio has run away. A token that is not, because its
advantage asks for it to be pulled back, has the gradient rA: where that does not fit, the loss is an error.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isopo_mini import checks, precision
from isopo_mini.objectives.aggregation import aggregate_tokens
from isopo_mini.objectives.bookkeeping import metrics, prepared
from isopo_mini.objectives.ratios import finite_exp, outside, pessimistic, require_clips, require_finite_ratio

Tokens = Float[Tensor, "S T"]
Mask = Bool[Tensor, "S T"]
Advantages = Float[Tensor, "S"] | Float[Tensor, "S T"]
Loss = tuple[Float[Tensor, ""], dict[str, float]]


def reinforce(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    aggregate: str = "sequence-sum",
    max_length: int | None = None,
) -> Loss:
    """−A log π. The old policy is measured against, never used.

    Args:
        log_probs: log π of the sampled actions, differentiable, `(S, T)`. In all arguments padding may hold anything.
        old_log_probs: log π_old of the same actions, from the time of sampling, `(S, T)`.
        advantages: A, one a sequence `(S,)` or one a token `(S, T)`.
        mask: True where a token counts, `(S, T)`.
        aggregate: how tokens become one number, see `aggregation.aggregate_tokens`.
        max_length: of the aggregate `"constant"`.

    Returns:
        The loss, in at least single precision, and the metrics of the module.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree, a number that counts is not finite, a sequence has no token, an option is bad, or
            the loss or the ratio of a token that is not clipped is too large for its dtype.

    Source: R. J. Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement
    learning*, Machine Learning 8 (1992).
    """
    log_probs, old_log_probs, advantages = prepared(log_probs, old_log_probs, advantages, mask)
    loss = _aggregated(-advantages * log_probs, mask, aggregate, max_length)
    return loss, metrics(log_probs, old_log_probs, mask, torch.zeros_like(mask))


def ppo(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: str = "token-mean",
    max_length: int | None = None,
    dual_clip: float | None = None,
) -> Loss:
    """−min(rA, clip(r, 1 − ε_l, 1 + ε_h) A). Arguments, returns and errors not listed here: see `reinforce`.

    The minimum takes the gradient away where r has left the range on the side that A favours, and only there: a token
    on the wrong side is still pulled back.

    Args:
        clip_low: ε_l ≥ 0.
        clip_high: ε_h ≥ 0.
        dual_clip: c > 1. For A < 0 the loss is then at most −cA, however large r: verl does so with 3. Off when None.

    Source: Schulman et al., *Proximal policy optimization algorithms*, arXiv 1707.06347, equation 7 (one ε). The dual
    clip: Ye et al., *Mastering complex control in MOBA games with deep reinforcement learning*, arXiv 1912.09729.
    """
    options = clip_low, clip_high, aggregate, max_length, dual_clip
    return _token_clip(log_probs, old_log_probs, advantages, mask, *options)


def grpo(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: str = "sequence-mean",
    max_length: int | None = None,
) -> Loss:
    """`ppo`, averaged over each sequence first. Its advantages are `group_advantages(…, scale="std")`.

    The paper and trl's "grpo" average over each sequence; verl's default is `aggregate="token-mean"`. The paper adds
    β · KL to a reference policy, which is left to the caller: see `kl.estimate` with "k3".

    Source: Shao et al., *DeepSeekMath*, arXiv 2402.03300, equation 3.
    """
    return _token_clip(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, aggregate, max_length)


def dr_grpo(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: str = "constant",
    max_length: int | None = None,
) -> Loss:
    """`ppo`, divided by a length that is the same for all. Its advantages are `group_advantages(…, scale="none")`.

    Two biases of `grpo` are gone: long answers no longer weigh less a token, and prompts whose answers are nearly all
    right or all wrong no longer weigh more.

    Source: Liu et al., *Understanding R1-Zero-like training: a critical perspective*, arXiv 2503.20783.
    """
    return _token_clip(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, aggregate, max_length)


def dapo(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    aggregate: str = "token-mean",
    max_length: int | None = None,
) -> Loss:
    """`ppo` with more room upwards. Its advantages are GRPO's; its rules of sampling are no part of the loss.

    Source: Yu et al., *DAPO: an open-source LLM reinforcement learning system at scale*, arXiv 2503.14476.
    """
    return _token_clip(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, aggregate, max_length)


def gspo(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregate: str = "sequence-mean",
    max_length: int | None = None,
) -> Loss:
    """−min(sA, clip(s, 1 − ε_l, 1 + ε_h) A) with one ratio a sequence, s = exp(mean_t log r).

    Written token by token with s_t = sg[s]·π_t/sg[π_t], which has the value s. For one advantage a sequence value and
    gradient are those of the formula above; it also takes one a token (GSPO-token in the paper; verl's code).

    Source: Zheng et al., *Group sequence policy optimization*, arXiv 2507.18071.
    """
    log_probs, old_log_probs, advantages = prepared(log_probs, old_log_probs, advantages, mask)
    mean_log_ratio = (log_probs - old_log_probs).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)  # (S, 1)
    ratio = finite_exp(mean_log_ratio).detach() * (log_probs - log_probs.detach()).exp()
    objective, clipped = pessimistic(ratio, advantages, clip_low, clip_high)
    require_finite_ratio(mean_log_ratio.expand_as(mask), clipped, advantages)
    loss = _aggregated(-objective, mask, aggregate, max_length)
    return loss, metrics(log_probs, old_log_probs, mask, clipped)


def cispo(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    aggregate: str = "token-mean",
    max_length: int | None = None,
    dialect: str = "verl",
) -> Loss:
    """−sg[clamp(r)] A log π: the weight is clipped, so no token loses its gradient. Its advantages are GRPO's.

    Args:
        clip_low: ε_l of `"verl"`; not used by `"trl"`.
        clip_high: of `"verl"` ε_h, a distance from 1, 0.2 when None; of `"trl"` ε_max, the largest weight itself, 5.0
            when None as recommended there.
        dialect: `"verl"`: clamp(r, 1 − ε_l, 1 + ε_h). `"trl"`: clamp(r, max=ε_max), the upper side only.

    Source: MiniMax, *MiniMax-M1: scaling test-time compute efficiently with lightning attention*, arXiv 2506.13585.
    """
    checks.require_choice("dialect", dialect, ("verl", "trl"))
    if clip_high is None:
        clip_high = 0.2 if dialect == "verl" else 5.0
    require_clips(clip_low, clip_high)
    log_probs, old_log_probs, advantages = prepared(log_probs, old_log_probs, advantages, mask)
    ratio = (log_probs - old_log_probs).exp().detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) if dialect == "verl" else ratio.clamp(max=clip_high)
    loss = _aggregated(-weight * advantages * log_probs, mask, aggregate, max_length)
    return loss, metrics(log_probs, old_log_probs, mask, weight != ratio)


def copg(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: str = "token-mean",
    max_length: int | None = None,
) -> Loss:
    """−min(log π · A, [log π_old + log clip(r, 1 − ε_l, 1 + ε_h)] A): PPO's clip, but a token weighs A and not rA.

    Source: Markowitz and Staley, *Clipped-objective policy gradients for pessimistic policy optimization*,
    arXiv 2311.05846.
    """
    require_clips(clip_low, clip_high)
    log_probs, old_log_probs, advantages = prepared(log_probs, old_log_probs, advantages, mask)
    log_ratio = log_probs - old_log_probs
    # The logarithm of the clip, without going through r, which underflows where log r does not.
    lowest = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    bound = old_log_probs + log_ratio.clamp(lowest, math.log1p(clip_high))
    loss = _aggregated(-torch.minimum(log_probs * advantages, bound * advantages), mask, aggregate, max_length)
    return loss, metrics(log_probs, old_log_probs, mask, outside(log_ratio.exp(), advantages, clip_low, clip_high))


LOSSES: dict[str, Callable[..., Loss]] = {
    loss.__name__: loss for loss in (reinforce, ppo, grpo, dr_grpo, dapo, gspo, cispo, copg)
}


def _token_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    aggregate: str,
    max_length: int | None,
    dual_clip: float | None = None,
) -> Loss:
    """PPO's clip with one ratio a token, which four methods share."""
    log_probs, old_log_probs, advantages = prepared(log_probs, old_log_probs, advantages, mask)
    log_ratio = log_probs - old_log_probs
    ratio = finite_exp(log_ratio)
    objective, clipped = pessimistic(ratio, advantages, clip_low, clip_high)
    if dual_clip is not None:
        if not dual_clip > 1.0:
            raise ValueError(f"dual_clip: expected a number > 1, got {dual_clip}")
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        clipped = clipped | (objective < floor)
        objective = torch.maximum(objective, floor)
    require_finite_ratio(log_ratio, clipped, advantages)
    loss = _aggregated(-objective, mask, aggregate, max_length)
    return loss, metrics(log_probs, old_log_probs, mask, clipped)


def _aggregated(values: Tensor, mask: Tensor, aggregate: str, max_length: int | None) -> Tensor:
    """The loss, which must fit its dtype."""
    return precision.require_fits("loss", aggregate_tokens(values, mask, aggregate, max_length))
