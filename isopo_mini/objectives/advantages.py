"""Advantages: how much better a sequence did than the others that answered the same prompt."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks


def group_advantages(
    rewards: Float[Tensor, "S"], groups: Int[Tensor, "S"], scale: str = "std", eps: float = 1e-4
) -> Float[Tensor, "S"]:
    """Rewards centred on their group's mean and, with `scale="std"`, divided by its standard deviation.

    A_s = (R_s − mean(R)) / (std(R) + eps)    for "std" (GRPO), with the unbiased std (divisor n − 1);
    A_s = R_s − mean(R)                       for "none" (Dr. GRPO).

    A group of one, and a group whose rewards are all equal, get advantages of exactly 0; never NaN.

    Args:
        rewards: one a sequence, `(S,)`.
        groups: the group of each sequence, any integers, in any order, int64 `(S,)`.
        scale: "std" or "none".
        eps: keeps the division finite. The published code differs: 1e-4 in trl, 1e-6 in verl.

    Returns:
        `(S,)`, with mean zero over each group.

    Raises:
        ValueError: shapes disagree, nothing was given, a reward is not finite, `scale` is unknown, `eps` ≤ 0.

    Example:
        >>> import torch
        >>> group_advantages(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([7, 7, 2]), scale="none")
        tensor([-0.5000,  0.5000,  0.0000])

    Source: Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300; Liu et al. (Dr. GRPO), arXiv 2503.20783.
    """
    checks.require_choice("scale", scale, ("std", "none"))
    checks.require_positive("eps", eps)
    deviations, members, index = _deviations(rewards, groups)
    if scale == "none":
        return deviations
    squares = torch.zeros_like(members).index_add(0, index, deviations.square())
    # A group of one has no spread: its deviation is 0, so any finite divisor gives 0.
    std = (squares / (members - 1).clamp(min=1)).sqrt()
    return deviations / (std[index] + eps)


def leave_one_out(rewards: Float[Tensor, "S"], groups: Int[Tensor, "S"]) -> Float[Tensor, "S"]:
    """Rewards minus the mean of the *other* rewards of their group (RLOO): A_s = n/(n − 1) · (R_s − mean(R)).

    The baseline does not depend on the sequence's own action, so the policy gradient stays unbiased.
    A group of one has no others; its advantage is 0.

    Args:
        rewards: one a sequence, `(S,)`.
        groups: the group of each sequence, any integers, in any order, int64 `(S,)`.

    Returns:
        `(S,)`.

    Raises:
        ValueError: shapes disagree, nothing was given, or a reward is not finite.

    Source: Ahmadian et al., Back to Basics (RLOO), arXiv 2402.14740.
    """
    deviations, members, index = _deviations(rewards, groups)
    return deviations * (members / (members - 1).clamp(min=1))[index]


def _deviations(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R_s − mean of the group; members of each of the G groups `(G,)`; the group of each s, 0..G−1 `(S,)`."""
    sizes = checks.require_shape("rewards", rewards, "S")
    checks.require_floating("rewards", rewards)
    checks.require_not_empty("rewards", rewards)
    checks.require_finite("rewards", rewards)
    checks.require_shape("groups", groups, "S", sizes)
    checks.require_integer("groups", groups)
    checks.require_same_device("groups", groups, "rewards", rewards)
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    members = counts.to(rewards.dtype)
    # Measured from the group's smallest reward, equal rewards are exact zeros. Measured from 0 they would
    # leave a rounding error, which the division by eps then makes a thousand times larger.
    smallest = torch.full_like(members, torch.inf).scatter_reduce(0, index, rewards, "amin")
    above = rewards - smallest[index]
    means = torch.zeros_like(members).index_add(0, index, above) / members
    return above - means[index], members, index
