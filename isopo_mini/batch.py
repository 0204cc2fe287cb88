"""`Batch`: the one record that flows from tasks to update rules.

A *sequence* (index s of S) is the unit that gets one advantage: a bandit pull (T = 1), a trajectory, a
response of a language model, or, after `Batch.as_steps`, a single time step. Sequences of different
length are padded at the end to T positions; `mask` says which positions are real actions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isopo_mini import checks


@dataclass(frozen=True, eq=False)
class Batch:
    """S sequences of up to T actions, as they were sampled.

    Args:
        observations: what the policy saw, `(S, T, ...)`: state indices, features, or the tokens read so far.
        actions: the sampled actions, int64 `(S, T)`; or, where they are vectors of real numbers, floating `(S, T, d)`.
        mask: True where the action is real and counts, bool `(S, T)`. Prompts and padding are False.
        rewards: one a sequence `(S,)`, or one a time step `(S, T)`.
        log_probs: log π(action | observation) when it was sampled, `(S, T)`. This is the π_old of PPO.
        groups: which prompt each sequence answers, int64 `(S,)`; None when there are no groups.

    Raises:
        TypeError: a tensor has the wrong dtype, or is no tensor.
        ValueError: shapes or devices disagree, the batch is empty, a sequence has no action, or a number that
            counts (where `mask` is True) is not finite.

    Example:
        >>> import torch
        >>> batch = Batch(
        ...     observations=torch.zeros(3, 1, dtype=torch.int64),
        ...     actions=torch.tensor([[0], [1], [1]]),
        ...     mask=torch.ones(3, 1, dtype=torch.bool),
        ...     rewards=torch.tensor([0.0, 1.0, 1.0]),
        ...     log_probs=torch.full((3, 1), 0.5).log(),
        ... )
        >>> len(batch)
        3
    """

    observations: Tensor
    actions: Int[Tensor, "S T"] | Float[Tensor, "S T d"]
    mask: Bool[Tensor, "S T"]
    rewards: Float[Tensor, "S"] | Float[Tensor, "S T"]
    log_probs: Float[Tensor, "S T"]
    groups: Int[Tensor, "S"] | None = None

    def __post_init__(self) -> None:
        continuous = isinstance(self.actions, Tensor) and self.actions.is_floating_point() and self.actions.ndim == 3
        sizes = checks.require_shape("actions", self.actions, "S T d" if continuous else "S T")
        checks.require_not_empty("actions", self.actions)
        if not continuous:
            checks.require_integer("actions", self.actions)
        checks.require_shape("mask", self.mask, "S T", sizes)
        if self.mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {self.mask.dtype}")
        checks.require_shape("log_probs", self.log_probs, "S T", sizes)
        checks.require_floating("log_probs", self.log_probs)
        if not isinstance(self.rewards, Tensor):
            raise TypeError(f"rewards: expected a tensor of shape (S) or (S T), got {type(self.rewards).__name__}")
        checks.require_shape("rewards", self.rewards, "S" if self.rewards.ndim == 1 else "S T", sizes)
        checks.require_floating("rewards", self.rewards)
        if not isinstance(self.observations, Tensor):
            raise TypeError(f"observations: expected a tensor, got {type(self.observations).__name__}")
        if tuple(self.observations.shape[:2]) != tuple(self.actions.shape[:2]):
            raise ValueError(
                f"observations: expected shape (S={sizes['S']} T={sizes['T']} ...), "
                f"got {tuple(self.observations.shape)}"
            )
        if self.groups is not None:
            checks.require_shape("groups", self.groups, "S", sizes)
            checks.require_integer("groups", self.groups)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                checks.require_same_device(field.name, value, "actions", self.actions)
        without_action = ~self.mask.any(dim=1)
        if without_action.any():
            raise ValueError(
                f"mask: expected at least one True a sequence, got none in sequence {int(without_action.nonzero()[0])}"
            )
        real = self.rewards if self.rewards.ndim == 1 else self.rewards.masked_fill(~self.mask, 0.0)
        checks.require_finite("rewards", real)
        checks.require_finite("log_probs", self.log_probs.masked_fill(~self.mask, 0.0))
        if continuous:
            checks.require_finite("actions", self.actions.masked_fill(~self.mask.unsqueeze(-1), 0.0))
        if self.observations.is_floating_point():
            checks.require_finite("observations", self.observations)

    def __len__(self) -> int:
        """The number of sequences S."""
        return self.actions.shape[0]

    def select(self, sequences: Tensor) -> "Batch":
        """The batch of the given sequences: int64 indices, or a bool `(S,)`."""
        return self._map(lambda value: value[sequences])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return self._map(lambda value: value.to(device))

    def microbatches(self, size: int | None) -> Iterator["Batch"]:
        """Consecutive microbatches of at most `size` sequences; the whole batch when `size` is None."""
        if size is not None and size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        if size is None or size >= len(self):
            yield self
            return
        for start in range(0, len(self), size):
            yield self.select(torch.arange(start, min(start + size, len(self)), device=self.actions.device))

    def total_rewards(self) -> Float[Tensor, "S"]:
        """The return of every sequence: its reward, or the sum of its real rewards over time."""
        return self.rewards if self.rewards.ndim == 1 else self.rewards.masked_fill(~self.mask, 0.0).sum(dim=1)

    def as_steps(self) -> "Batch":
        """Every real time step as a sequence of its own, `(N, 1)`. Rewards must then be one a time step.

        Only for policies whose observation holds all they need (states, features). A token's context is the
        tokens before it, so a batch of tokens cannot be cut this way.
        """
        if self.rewards.ndim == 1:
            raise ValueError(
                "rewards: expected one a time step (S T) to cut a batch into steps, got one a sequence (S)"
            )
        keep = self.mask
        groups = None if self.groups is None else self.groups[:, None].expand_as(keep)[keep]
        return Batch(
            observations=self.observations[keep].unsqueeze(1),
            actions=self.actions[keep].unsqueeze(1),
            mask=torch.ones_like(self.mask[keep]).unsqueeze(1),
            rewards=self.rewards[keep],
            log_probs=self.log_probs[keep].unsqueeze(1),
            groups=groups,
        )

    def as_tokens(self) -> "Batch":
        """Every real token as a sequence of its own that keeps its context: `(N, T)`, with one True a row.

        For policies that read the tokens before an action, where `as_steps` would cut the context away. Rewards stay
        as they are: those of a sequence go to each of its tokens, those of a time step to that token's row.
        """
        sequences, positions = self.mask.nonzero(as_tuple=True)
        mask = torch.zeros_like(self.mask[sequences])
        mask[torch.arange(len(sequences), device=mask.device), positions] = True
        rewards = self.rewards[sequences] if self.rewards.ndim == 1 else self.rewards[self.mask]
        return replace(self._plain().select(sequences), mask=mask, rewards=rewards)

    def _plain(self) -> "Batch":
        """The fields of `Batch`, without those of a subclass."""
        return Batch(self.observations, self.actions, self.mask, self.rewards, self.log_probs, self.groups)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to every tensor, those of a subclass too."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})
