"""The ratio r = π/π_old of a token: its exponential, its clip, and where the clip takes the gradient away."""

import torch
from torch import Tensor

from isopo_mini import checks, precision


def finite_exp(log_ratio: Tensor) -> Tensor:
    """exp, stopped where it would overflow: the gradient of a clipped token is 0 times this, and 0 · ∞ is not 0."""
    return log_ratio.clamp(max=precision.largest_exponent(log_ratio.dtype)).exp()


def require_finite_ratio(log_ratio: Tensor, clipped: Tensor, advantages: Tensor) -> None:
    """A ratio that does count, since nothing clips it, must not have been stopped by `finite_exp`."""
    limit = precision.largest_exponent(log_ratio.dtype)
    bad = (log_ratio > limit) & ~clipped & (advantages != 0)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"log_probs: expected log π − log π_old of a token that is not clipped to be at most {limit:.1f}, "
            f"got {log_ratio[index].item():g} at index {index}; take smaller steps, or ppo's dual_clip"
        )


def pessimistic(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """min(rA, clip(r)A), and where the clip took the gradient away."""
    require_clips(clip_low, clip_high)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return objective, outside(ratio, advantages, clip_low, clip_high)


def outside(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Where the ratio has left the range on the side that the advantage favours."""
    return ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))


def require_clips(clip_low: float, clip_high: float) -> None:
    """Clip ranges are numbers ≥ 0."""
    checks.require_at_least("clip_low", clip_low, 0.0)
    checks.require_at_least("clip_high", clip_high, 0.0)
