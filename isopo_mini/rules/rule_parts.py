"""What update rules are made of: advantages that need no value function, the unit that gets one, and the step itself.

A *unit* is what one advantage and one coefficient belong to, and what a rule takes the mean over:

- `"sequence"`: a row of the batch, whatever its length;
- `"step"`: a real time step alone, for policies that see all they need in its observation (`Batch.as_steps`);
- `"token"`: a real token with the tokens before it, for policies that read them (`Batch.as_tokens`).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.objectives.advantages import group_advantages, leave_one_out
from isopo_mini.rules.repeatable import log_prob

UNITS = ("sequence", "step", "token")
Advantages = Callable[[Batch], Tensor]


def batch_advantages(batch: Batch) -> Float[Tensor, "S"]:
    """A_s = R_s − mean of the other rewards of the batch. Rewards given by time step are summed first."""
    returns = batch.total_rewards()
    return leave_one_out(returns, torch.zeros(len(batch), dtype=torch.int64, device=returns.device))


def centred_advantages(batch: Batch) -> Float[Tensor, "S"]:
    """A_s = R_s − mean of its group (of the batch, where there are no groups)."""
    return group_advantages(batch.total_rewards(), _groups(batch), scale="none")


def standardised_advantages(batch: Batch) -> Float[Tensor, "S"]:
    """A_s = (R_s − mean)/(std + 1e-4) of its group (of the batch, where there are no groups): those of GRPO."""
    return group_advantages(batch.total_rewards(), _groups(batch), scale="std")


def with_entropy(function: Advantages, bonus: float) -> Advantages:
    """Advantages with a bonus for actions that were improbable: A_s − β(log π(y_s) − mean of it over the batch).

    E[−log π(y) ∇log π(y)] = ∇H, the gradient of the entropy, so REINFORCE with them climbs J + βH: a bonus that is an
    advantage like any other, and which a Gram matrix transforms with them. Where there is one advantage a position, it
    gets the surprise of that position's action alone. log π is that of the batch, so of the policy that sampled it: in
    the second epoch on a batch that is the old one.

    Args:
        function: computes A, `(S,)` or `(S, T)`.
        bonus: β ≥ 0, in rewards a nat.

    Source: the entropy term of Williams & Peng (1991), *Function optimization using connectionist reinforcement
    learning algorithms*.
    """
    checks.require_at_least("entropy", bonus, 0.0)

    def advantages(batch: Batch) -> Tensor:
        plain = advantages_of(function, batch, by_position=True)
        log_probs = batch.log_probs.masked_fill(~batch.mask, 0.0)
        if plain.ndim == 2:
            mean = log_probs.sum() / batch.mask.sum()
        else:
            log_probs = log_probs.sum(dim=1)
            mean = log_probs.mean()
        return plain - bonus * (log_probs - mean).to(plain.dtype)

    return advantages


def advantages_of(
    function: Advantages, batch: Batch, *, by_position: bool = False
) -> Float[Tensor, "S"] | Float[Tensor, "S T"]:
    """What `function` says of the batch, detached and checked: a wrong shape here would broadcast silently later.

    Args:
        function: computes the advantages.
        batch: S sequences of T positions.
        by_position: whether it may also give one a position, `(S, T)`; padding may then hold anything.

    Returns:
        `(S,)`, or `(S, T)` with zeros at padding.

    Raises:
        TypeError: it gave no floating-point tensor.
        ValueError: it gave another shape, or a number that is not finite.
    """
    advantages = function(batch)
    sizes = {"S": len(batch), "T": batch.mask.shape[1]}
    one_a_position = by_position and isinstance(advantages, Tensor) and advantages.ndim == 2
    checks.require_shape("advantages(batch)", advantages, "S T" if one_a_position else "S", sizes)
    checks.require_floating("advantages(batch)", advantages)
    if one_a_position:
        advantages = advantages.masked_fill(~batch.mask, 0.0)
    checks.require_finite("advantages(batch)", advantages)
    return advantages.detach()


def at_positions(advantages: Float[Tensor, "S"] | Float[Tensor, "S T"], batch: Batch) -> Float[Tensor, "S T"]:
    """The advantages of all positions: those of a sequence go to each of its actions. Zero at padding."""
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(batch.mask.shape)
    return advantages.masked_fill(~batch.mask, 0.0)


def cut(function: Advantages, batch: Batch, unit: str) -> tuple[Batch, Float[Tensor, "N"]]:
    """The batch with one row a unit, and the advantage of each.

    The advantages are computed of the whole batch, before it is cut. For the unit "sequence" they are `(S,)`; for the
    others `function` may give one a sequence, which all its units get, or one a position `(S, T)`.
    """
    if unit == "sequence":
        return batch, advantages_of(function, batch)
    advantages = at_positions(advantages_of(function, batch, by_position=True), batch)[batch.mask]
    return (batch.as_steps() if unit == "step" else batch.as_tokens()), advantages


def weigh(
    function: Advantages, batch: Batch, unit: str, *, by_position: bool = False
) -> tuple[Batch, Float[Tensor, "S T"], int]:
    """The batch, what the log-probability of each action weighs in the mean over units, and the number of units.

    For rules that only need Σ w log π: a token then keeps its place among the others of its sequence, where `cut`
    would repeat that sequence for each of them. Steps are cut apart, which leaves no padding to be computed.
    """
    if unit == "step":
        batch, advantages = cut(function, batch, unit)
    else:
        advantages = advantages_of(function, batch, by_position=by_position or unit == "token")
    units = int(batch.mask.sum()) if unit == "token" else len(batch)
    return batch, at_positions(advantages, batch) / units, units


def spread_order(batch: Batch) -> Int[Tensor, "S"]:
    """An order of the sequences in which the groups take turns: the first of each group, then the second of each, …

    Consecutive microbatches then hold a few sequences of many groups, instead of a few whole groups.
    """
    groups = _groups(batch)
    members_before = (groups[:, None] == groups[None, :]).tril(-1).sum(dim=1)
    return members_before.argsort(stable=True)


def clear_gradients(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Forget what was left in `.grad`: of all that the optimizer holds, and of every parameter of the policy.

    A rule reads the gradient of the whole policy, so what is left in a parameter that the optimizer does not hold would
    be taken for a part of it.
    """
    optimizer.zero_grad()
    policy.zero_grad()


def accumulate(policy: torch.nn.Module, batch: Batch, weights: Float[Tensor, "S T"], size: int | None = None) -> None:
    """Add the gradient of −Σ w log π to `.grad`, in microbatches of at most `size` sequences."""
    start = 0
    for part in batch.microbatches(size):
        (-(weights[start : start + len(part)] * log_prob(policy, part)).sum()).backward()
        start += len(part)


def flat_gradient(policy: torch.nn.Module) -> Float[Tensor, "P"]:
    """The `.grad` of every trainable parameter end to end, in `policy.parameters()` order; zeros where there is none.

    This is the order of the columns of `geometry.fisher.score_matrix`. An update rule leaves in `.grad` what an
    optimizer subtracts, so the direction in which the policy moves is minus this.

    Raises:
        ValueError: no parameter is trainable.
    """
    trainable = [value for value in policy.parameters() if value.requires_grad]
    if not trainable:
        raise ValueError("policy: expected at least one trainable parameter, got none")
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten() for p in trainable])


def assign_gradient(policy: torch.nn.Module, gradient: Float[Tensor, "P"]) -> None:
    """Write a flat vector into `.grad`, in `policy.parameters()` order; the inverse of `flat_gradient`.

    Raises:
        ValueError: the length is not the number of trainable parameters.
    """
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in trainable]
    checks.require_shape("gradient", gradient, "P", {"P": sum(sizes)})
    for parameter, part in zip(trainable, gradient.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype).clone()


def finish(policy: torch.nn.Module, optimizer: torch.optim.Optimizer, backward_passes: float = 1.0) -> dict[str, float]:
    """Let the optimizer step, and report what every rule reports."""
    norm = flat_gradient(policy).norm().item()
    optimizer.step()
    return {"backward_passes": float(backward_passes), "gradient_norm": norm}


def _groups(batch: Batch) -> Tensor:
    """The group of every sequence; all in one where there are none."""
    return (
        torch.zeros(len(batch), dtype=torch.int64, device=batch.mask.device) if batch.groups is None else batch.groups
    )
