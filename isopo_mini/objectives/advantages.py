"""Advantages: how much better a sequence did than others, or an action than was to be expected in its state."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks, precision


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
        `(S,)`, with mean zero over each group, in at least single precision.

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
    # Measured in units of each group's largest deviation, so that no square overflows or vanishes.
    units = torch.zeros_like(members).scatter_reduce(0, index, deviations.abs(), "amax")
    units = torch.where(units > 0, units, 1.0)
    squares = torch.zeros_like(members).index_add(0, index, (deviations / units[index]).square())
    # A group of one has no spread: its deviation is 0, so any finite divisor gives 0.
    std = units * (squares / (members - 1).clamp(min=1)).sqrt()
    return deviations / (std[index] + eps)


def leave_one_out(rewards: Float[Tensor, "S"], groups: Int[Tensor, "S"]) -> Float[Tensor, "S"]:
    """Rewards minus the mean of the *other* rewards of their group (RLOO): A_s = n/(n − 1) · (R_s − mean(R)).

    The baseline does not depend on the sequence's own action, so the policy gradient stays unbiased.
    A group of one has no others; its advantage is 0.

    Args:
        rewards: one a sequence, `(S,)`.
        groups: the group of each sequence, any integers, in any order, int64 `(S,)`.

    Returns:
        `(S,)`, in at least single precision.

    Raises:
        ValueError: shapes disagree, nothing was given, or a reward is not finite.

    Source: Ahmadian et al., Back to Basics (RLOO), arXiv 2402.14740.
    """
    deviations, members, index = _deviations(rewards, groups)
    return deviations * (members / (members - 1).clamp(min=1))[index]


def discounted_returns(
    rewards: Float[Tensor, "S T"],
    mask: Bool[Tensor, "S T"],
    discount: float,
    bootstrap: Float[Tensor, "S"] | None = None,
) -> Float[Tensor, "S T"]:
    """What was still to come at every time step: G_t = r_t + γ G_{t+1}, and γ · bootstrap after the last.

    An episode that *terminated* is over: nothing comes after it, its bootstrap is 0. One that was *truncated*, by a
    limit on time, would have gone on: its bootstrap is the value of the state it was cut off in.

    Args:
        rewards: one a time step, `(S, T)`. Padding may hold anything.
        mask: True where a step is real, `(S, T)`.
        discount: γ, between 0 and 1.
        bootstrap: value of the state after the last real step, `(S,)`; zeros when None.

    Returns:
        `(S, T)`, 0 at padding, in at least single precision: 500 rewards of 1 make 256 in bfloat16.

    Raises:
        ValueError: shapes disagree, a number that counts is not finite, or `discount` is not in [0, 1].

    Example:
        >>> import torch
        >>> rewards, mask = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
        >>> discounted_returns(rewards, mask, 0.5)
        tensor([[1.7500, 1.5000, 1.0000]])
        >>> discounted_returns(rewards, mask, 0.5, torch.tensor([4.0]))
        tensor([[2.2500, 2.5000, 3.0000]])

    Source: Sutton and Barto, Reinforcement Learning (2018), section 3.3.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, discount, 1.0, bootstrap)


def gae(
    rewards: Float[Tensor, "S T"],
    values: Float[Tensor, "S T"],
    mask: Bool[Tensor, "S T"],
    discount: float,
    trace_decay: float,
    bootstrap: Float[Tensor, "S"] | None = None,
) -> Float[Tensor, "S T"]:
    """Generalised advantage estimation: A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    λ = 0 is the error of one step, δ_t: little variance, and the bias of V. λ = 1 is G_t − V(s_t): all the variance, no
    bias of V. After the last real step V(s_{t+1}) is `bootstrap`; see `discounted_returns` for what that is.

    Args:
        rewards: one a time step, `(S, T)`. Padding may hold anything, here and in `values`.
        values: V(s_t) of the state in which action t was taken, `(S, T)`.
        mask: True where a step is real, `(S, T)`.
        discount: γ, between 0 and 1.
        trace_decay: λ, between 0 and 1.
        bootstrap: V of the state after the last real step, 0 where the episode terminated, `(S,)`; zeros when None.

    Returns:
        `(S, T)`, 0 at padding, in at least single precision.

    Raises:
        ValueError: shapes disagree, a number that counts is not finite, or a factor is not in [0, 1].

    Source: Schulman et al., *High-dimensional continuous control using generalized advantage estimation*,
    arXiv 1506.02438, equation 16.
    """
    sizes = checks.require_shape("rewards", rewards, "S T")
    checks.require_not_empty("rewards", rewards)
    checks.require_shape("values", values, "S T", sizes)
    checks.require_shape("mask", mask, "S T", sizes)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
    if bootstrap is None:
        bootstrap = torch.zeros_like(rewards[:, 0])
    checks.require_shape("bootstrap", bootstrap, "S", sizes)
    for factor_name, factor in (("discount", discount), ("trace_decay", trace_decay)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{factor_name}: expected a number in [0, 1], got {factor}")
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    for name, tensor in (("rewards", rewards), ("values", values), ("bootstrap", bootstrap)):
        checks.require_floating(name, tensor)
        checks.require_finite(name, tensor)
    dtype = precision.common_dtype((rewards, values, bootstrap))
    rewards, values, bootstrap = rewards.to(dtype), values.to(dtype), bootstrap.to(dtype)
    # Backwards in time. A padded step passes on what came after it, whatever the mask looks like.
    advantages = torch.zeros_like(rewards)
    next_value, running = bootstrap, torch.zeros_like(bootstrap)
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        error = rewards[:, t] + discount * next_value - values[:, t]  # δ_t
        running = torch.where(real, error + discount * trace_decay * running, running)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = running
    return advantages.masked_fill(~mask, 0.0)


def _deviations(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R_s − mean of the group; members of each of the G groups `(G,)`; the group of each s, 0..G−1 `(S,)`."""
    sizes = checks.require_shape("rewards", rewards, "S")
    checks.require_floating("rewards", rewards)
    checks.require_not_empty("rewards", rewards)
    checks.require_finite("rewards", rewards)
    checks.require_shape("groups", groups, "S", sizes)
    checks.require_integer("groups", groups)
    checks.require_same_device("groups", groups, "rewards", rewards)
    rewards = precision.at_least_float32(rewards)
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    members = counts.to(rewards.dtype)
    # Measured from the group's smallest reward, equal rewards are exact zeros. Measured from 0 they would
    # leave a rounding error, which the division by eps then makes a thousand times larger.
    smallest = torch.full_like(members, torch.inf).scatter_reduce(0, index, rewards, "amin")
    above = rewards - smallest[index]
    means = torch.zeros_like(members).index_add(0, index, above) / members
    return above - means[index], members, index
