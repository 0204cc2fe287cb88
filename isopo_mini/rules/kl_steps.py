"""Steps of a given length in nats: the trust region in one pass, without a line search.

A step size η means something else for every method, optimizer, layer and task. What the step does to the policy is one
number, KL(before ‖ after) ≈ ½ dᵀF d, and it grows as η². So η can be chosen for every step such that it is δ.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.geometry import fisher
from isopo_mini.rules.protocol import UpdateRule


@dataclass
class KLTargeted:
    """Any rule whose optimizer steps, with every step scaled to ½ dᵀF d = δ over the batch it is made from.

    d is what the optimizer would do with a learning rate of one: of SGD the gradient, of AdamW its rescaled one. F is
    exact over the actions and a mean over the batch's real positions, as the KL that `loop.train` reports. It costs
    one forward-mode pass for each of the optimizer's steps, which is not counted as a backward pass: compare seconds.

    A rule that makes several steps a batch has each of them scaled, with F of the policy at that step.

    Args:
        rule: whose direction it is.
        kl: δ > 0, in nats a position.

    Raises:
        ValueError: δ is not positive. In `step`: the optimizer's learning rates are not all the same.
        TypeError: in `step`: the rule sets the parameters itself, as TRPO does.

    Source: the length of the step of Schulman et al., *Trust region policy optimization*, arXiv 1502.05477, appendix C.
    """

    rule: UpdateRule
    kl: float

    def __post_init__(self) -> None:
        checks.require_positive("kl", self.kl)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch as the rule does. The metric `step_size` is η, the mean over the optimizer's steps."""
        scaled = _ScaledSteps(optimizer, policy, batch, self.kl)
        metrics = self.rule.step(policy, batch, scaled)
        if not scaled.step_sizes:
            raise TypeError(f"rule: expected one that lets the optimizer step, got {type(self.rule).__name__}")
        return metrics | {"step_size": sum(scaled.step_sizes) / len(scaled.step_sizes)}


class _ScaledSteps(torch.optim.Optimizer):
    """What a rule is given in place of the optimizer, with the same parameter groups: its steps, scaled."""

    def __init__(self, optimizer: torch.optim.Optimizer, policy: Any, batch: Batch, kl: float) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.batch = batch
        self.kl = kl
        self.step_sizes: list[float] = []
        super().__init__(optimizer.param_groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step in the optimizer's direction, as far as δ allows. A step that changes nothing is left as it is."""
        trainable = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        direction = self._direction(trainable)
        size = self._step_size(direction)
        pieces = direction.split([parameter.numel() for parameter in trainable])
        for parameter, piece in zip(trainable, pieces, strict=True):
            parameter.add_(piece.view_as(parameter), alpha=size)
        self.step_sizes.append(size)

    def _direction(self, trainable: list[Tensor]) -> Tensor:
        """What the optimizer would add to the parameters with a learning rate of one. They stay where they are."""
        before = [parameter.clone() for parameter in trainable]
        with _learning_rate_of_one(self.optimizer):
            try:
                # From 0, where the step keeps all its digits: nothing that an optimizer does here depends on the place.
                for parameter in trainable:
                    parameter.zero_()
                self.optimizer.step()
                return torch.cat([parameter.flatten() for parameter in trainable])
            finally:
                for parameter, start in zip(trainable, before, strict=True):
                    parameter.copy_(start)

    def _step_size(self, direction: Tensor) -> float:
        """η with ½ η² dᵀF d = δ; 0 where d does not move the policy."""
        observations, mask = self.batch.observations, self.batch.mask
        positions = int(mask.sum())
        squared = fisher.squared_length(self.policy, observations, direction, mask=mask).item()
        squared *= len(self.batch) / positions  # from a mean over sequences, of sums, to one over positions
        return math.sqrt(2 * self.kl / squared) if squared > 0 else 0.0


@contextmanager
def _learning_rate_of_one(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """All learning rates are 1 inside."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if len(set(rates)) > 1:
        raise ValueError(f"optimizer: expected one learning rate, since the step is scaled as a whole, got {rates}")
    try:
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
