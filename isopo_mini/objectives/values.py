"""A value function without a second network: least squares on simple features, fitted to each batch anew.

V(o) = wᵀφ(o) is as good a baseline as small control problems need, costs one linear solve, and adds no learning rate
that would have to be tuned along with the policy's.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks, precision
from isopo_mini.batch import Batch
from isopo_mini.objectives.advantages import discounted_returns, gae


def fitted_values(
    batch: Batch, discount: float = 0.99, *, ridge: float = 1e-5
) -> tuple[Float[Tensor, "S T"], Float[Tensor, "S"]]:
    """V(o) = wᵀφ(o) at every step of a batch of episodes, and at the state that follows the last one.

    V is fitted to what was still to come, V(o_t) ≈ G_t + γ^(T−t) V(o_T), with G_t the discounted rewards that were
    seen and the second term only where the episode was truncated at T: a terminated one has nothing after it. V stands
    on both sides, but is linear in w, so one solve still does it:

    Φᵀ(Φ − C) w + N·ridge·w = Φᵀ G, where row t of C is γ^(T−t) φ(o_T), and 0 in terminated episodes.

    The features φ are 1, every component of o and every product of two, each scaled to mean square 1. Time is none of
    them: once truncation is bootstrapped, the state alone says what is to come.

    The values have seen the returns that they are subtracted from. With far more steps than features this bias is
    small beside the noise; with few it is not.

    Args:
        batch: episodes with rewards `(S, T)` and observations `(S, T, d)` that say how they ended, by `truncated`
            `(S,)` and `final_observations` `(S, d)`, as `tasks.cartpole.Episodes` do.
        discount: γ.
        ridge: keeps the system solvable where features are nearly dependent.

    Returns:
        Values `(S, T)`, 0 in padding; and V(o_T) where truncated, 0 where terminated, `(S,)`: the `bootstrap` of
        `objectives.advantages.gae`.

    Raises:
        TypeError: the batch does not say how its episodes ended, or a dtype is wrong.
        ValueError: a shape or number is wrong; or γ = 1 and no episode terminated, so that V would be infinite.

    Source: without bootstrapping, the linear baseline of Duan et al., arXiv 1604.06778; with it, least-squares
    temporal differences at trace decay 1, Boyan (2002), Technical update: least-squares temporal difference learning.
    """
    dtype = precision.common_dtype([batch.rewards])
    values, bootstrap = _fitted(batch, discount, ridge)
    return values.to(dtype), bootstrap.to(dtype)


def _fitted(batch: Batch, discount: float, ridge: float) -> tuple[Float[Tensor, "S T"], Float[Tensor, "S"]]:
    """See `fitted_values`. In double precision: products make the condition number the square of the features'."""
    truncated, final_observations = _endings(batch)
    checks.require_positive("ridge", ridge)
    checks.require_shape("batch.observations", batch.observations, "S T d")
    checks.require_floating("batch.observations", batch.observations)
    rewards = batch.rewards.double()
    seen = discounted_returns(rewards, batch.mask, discount)[batch.mask]  # G, (N,)
    if discount == 1 and truncated.all():
        raise ValueError("discount: expected less than 1 where every episode was truncated, got 1")
    features = _features(batch.observations.double())  # (S, T, F)
    scales = precision.euclidean_norm(features[batch.mask], dim=0, mean=True)
    scales = torch.where(scales > 0, scales, 1.0)  # whatever the unit of an observation is; only zeros have none
    features = features / scales
    last = _features(final_observations.double()) / scales * truncated[:, None]  # (S, F), φ(o_T) or 0
    design = features[batch.mask]  # Φ, (N, F)
    lengths = batch.mask.sum(dim=1, keepdim=True)
    left = lengths - torch.arange(batch.mask.shape[1], device=lengths.device)  # T − t, (S, T)
    factors = (discount ** left.clamp(min=0).double())[..., None]
    continued = (factors * last[:, None])[batch.mask]  # C, (N, F)
    system = design.T @ (design - continued) / len(design)
    system.diagonal().add_(ridge)
    weights = torch.linalg.solve(system, design.T @ seen / len(design))
    return (features @ weights).masked_fill(~batch.mask, 0.0), last @ weights


def episode_advantages(
    discount: float = 0.99, trace_decay: float = 0.95, *, standardise: bool = True, ridge: float = 1e-5
) -> Callable[[Batch], Tensor]:
    """How to turn episodes into an advantage a time step: GAE on fitted values, for rules whose unit is the step.

    A = (GAE − mean) / std over all real steps of the batch, where GAE is as in `objectives.advantages.gae` with the
    values and bootstraps of `fitted_values`.

    Args:
        discount: γ.
        trace_decay: λ of GAE.
        standardise: subtract the mean and divide by the standard deviation (divisor N); else GAE as it is.
        ridge: of `fitted_values`.

    Returns:
        A function from a batch to advantages `(S, T)`, 0 in padding. It raises what `fitted_values` raises.

    Raises:
        ValueError: γ or λ is not in [0, 1], or ridge is not positive.
    """
    for name, factor in (("discount", discount), ("trace_decay", trace_decay)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {factor}")
    checks.require_positive("ridge", ridge)
    # A partial of a function at the top of a module can be sent to another process; a closure cannot.
    return partial(_advantages, discount=discount, trace_decay=trace_decay, standardise=standardise, ridge=ridge)


def _advantages(
    batch: Batch, discount: float, trace_decay: float, standardise: bool, ridge: float
) -> Float[Tensor, "S T"]:
    """See `episode_advantages`."""
    # In double precision to the end: where V fits well, an advantage is a small difference of large numbers.
    values, bootstrap = _fitted(batch, discount, ridge)
    advantages = gae(batch.rewards.double(), values, batch.mask, discount, trace_decay, bootstrap)
    if standardise:
        centred = advantages - advantages[batch.mask].mean()
        std = precision.euclidean_norm(centred[batch.mask], dim=0, mean=True)
        advantages = (centred / (std + 1e-8)).masked_fill(~batch.mask, 0.0)
    return advantages.to(precision.common_dtype([batch.rewards]))


def _features(observations: Float[Tensor, "... d"]) -> Float[Tensor, "... F"]:
    """1, the components of o, and their products: F = 1 + d + d(d + 1)/2."""
    size = observations.shape[-1]
    first, second = torch.triu_indices(size, size, device=observations.device)
    ones = torch.ones_like(observations[..., :1])
    return torch.cat([ones, observations, observations[..., first] * observations[..., second]], dim=-1)


def _endings(batch: Batch) -> tuple[Tensor, Tensor]:
    """How the episodes ended. Asked by name, since objectives do not know the tasks that make such batches."""
    missing = [name for name in ("truncated", "final_observations") if not hasattr(batch, name)]
    if missing:
        raise TypeError(
            "batch: expected episodes that say how they ended, as tasks.cartpole.Episodes do, "
            f"got {type(batch).__name__} without {' and '.join(missing)}"
        )
    return batch.truncated, batch.final_observations  # type: ignore[attr-defined]
