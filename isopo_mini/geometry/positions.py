"""The positions of a batch of observations: what is asked of them at the door, and what each weighs."""

import torch
from torch import Tensor, nn

from isopo_mini import checks
from isopo_mini.geometry import functional
from isopo_mini.geometry.functional import Parameters
from isopo_mini.precision import common_dtype


def require_observations(observations: Tensor) -> None:
    """A tensor with at least one sample, finite if it holds numbers."""
    if not isinstance(observations, Tensor):
        raise TypeError(f"observations: expected a tensor, got {type(observations).__name__}")
    if observations.ndim == 0 or observations.numel() == 0:
        raise ValueError(f"observations: expected shape (N ...) with N >= 1, got {tuple(observations.shape)}")
    if observations.is_floating_point():
        checks.require_finite("observations", observations)


def checked_mask(mask: Tensor | None, other_name: str, other: Tensor, shape: torch.Size) -> Tensor:
    """The mask, all True when None, after a look at its dtype, shape and device."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=other.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != shape:
        raise ValueError(f"mask: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
    checks.require_same_device("mask", mask, other_name, other)
    return mask


def position_weights(
    policy: nn.Module,
    parameters: Parameters,
    observations: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, int]:
    """w_n m_nt with Σ_n w_n = 1, of shape `(N, *positions)`, and the number of actions A."""
    require_observations(observations)
    with torch.no_grad():
        logits = functional.logits(policy, parameters, observations)  # for its shape, dtype and device
    num_samples = len(observations)
    if logits.ndim < 2 or len(logits) != num_samples:
        raise ValueError(f"policy: expected logits of shape (N={num_samples} ... A), got {tuple(logits.shape)}")
    if weights is None:
        weights = logits.new_ones(num_samples)
    checks.require_shape("weights", weights, "N", {"N": num_samples})
    checks.require_floating("weights", weights)
    checks.require_same_device("weights", weights, "logits", logits)
    checks.require_finite("weights", weights)
    if (weights < 0).any() or not weights.any():
        raise ValueError(f"weights: expected numbers >= 0, not all of them 0, got {weights.tolist()}")
    keep = checked_mask(mask, "logits", logits, logits.shape[:-1])
    weights = weights.to(common_dtype((weights, logits)))
    weights = weights / weights.max()  # first, so that the sum of large weights does not overflow
    shares = (weights / weights.sum()).to(logits.dtype)
    return shares.reshape(-1, *[1] * (logits.ndim - 2)) * keep, logits.shape[-1]
