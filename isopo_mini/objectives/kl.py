"""Estimating KL(π ‖ ref) from sampled actions, position by position."""

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks, precision

# Below this |d|, e^{−d} − 1 + d is summed as a series: as written it would lose digits, and fall below 0.
_SMALL = 0.1


def estimate(
    log_probs: Float[Tensor, "S T"], reference_log_probs: Float[Tensor, "S T"], kind: str = "k3"
) -> Float[Tensor, "S T"]:
    """One sample's estimate of KL(π ‖ ref), for actions that were drawn from π.

    With d = log π − log ref of the sampled action:

    - `"k1"`: d. Unbiased, and often negative.
    - `"k2"`: d²/2. Biased, never negative.
    - `"k3"`: e^{−d} − 1 + d. Unbiased and never negative.

    Estimating the divergence is one thing, differentiating the estimate another, because the actions depend on π too.
    As a loss on fixed samples "k1" has a gradient of mean zero, "k2" that of KL(π ‖ ref), and "k3" that of
    KL(ref ‖ π).

    Args:
        log_probs: log π of the sampled actions, `(S, T)`.
        reference_log_probs: log ref of the same actions, `(S, T)`.
        kind: which estimator.

    Returns:
        `(S, T)`, in nats, differentiable, in at least single precision. "k3" is infinite, without gradient, where
        e^{−d} does not fit. Padding is left to the caller: what goes in there comes out there.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree or `kind` is unknown.

    Example:
        >>> import torch
        >>> estimate(torch.tensor([[0.5]]).log(), torch.tensor([[1.0]]).log(), "k3")
        tensor([[0.3069]])

    Source: J. Schulman, *Approximating KL divergence*, joschu.net/blog/kl-approx.html (2020), whose names these are.
    """
    checks.require_choice("kind", kind, ("k1", "k2", "k3"))
    sizes = checks.require_shape("log_probs", log_probs, "S T")
    checks.require_floating("log_probs", log_probs)
    checks.require_shape("reference_log_probs", reference_log_probs, "S T", sizes)
    checks.require_floating("reference_log_probs", reference_log_probs)
    difference = precision.at_least_float32(log_probs) - precision.at_least_float32(reference_log_probs)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    return _third(difference)


def _third(difference: Tensor) -> Tensor:
    """e^{−d} − 1 + d. Each branch is given only what it can take, since the gradient runs through both."""
    small = difference.abs() < _SMALL
    d = difference.where(small, 0.0)
    series = torch.ones_like(d)
    for factor in range(12, 2, -1):  # d²/2 · (1 − d/3 · (1 − d/4 · (…))), right to 1e-18 at |d| = 0.1
        series = 1.0 - d / factor * series
    limit = precision.largest_exponent(difference.dtype)
    exact = torch.expm1((-difference).clamp(max=limit)) + difference
    exact = exact.masked_fill(-difference > limit, torch.inf)
    return torch.where(small, 0.5 * d.square() * series, exact)
