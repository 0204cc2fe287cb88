"""The natural gradient with a Fisher matrix of one sampled score: (λI + ggᵀ)⁻¹ applied to the policy gradient."""

from dataclasses import dataclass, field
from typing import Any

import torch

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.geometry.natural_gradient import solve_rank_one
from isopo_mini.rules.repeatable import log_prob
from isopo_mini.rules.rule_parts import (
    UNITS,
    Advantages,
    accumulate,
    assign_gradient,
    at_positions,
    batch_advantages,
    clear_gradients,
    cut,
    finish,
    flat_gradient,
)


@dataclass
class RankOneNaturalGradient:
    """(λI + ggᵀ)⁻¹ v: v is the gradient of a whole minibatch, g the score of one of its units, drawn at random.

    The matrix is positive definite, so the step never opposes v, whatever g is: v·(λI + ggᵀ)⁻¹v is at least
    ‖v‖²/(λ + ‖g‖²). Across g the step is v/λ, along g it is v/(λ + ‖g‖²).

    Another rule of the same name applies each unit's matrix to that unit's own gradient, A g/(λ + ‖g‖²), and adds up;
    its step may oppose v. That is `geometry.isopo.normalized_coefficients` with the power 2.

    Args:
        damping: λ > 0.
        minibatches: parts the batch is dealt into at random, each for one optimizer step with a g of its own.
        advantages: computes A from the batch, `(S,)`; for the units "step" and "token" it may be `(S, T)`.
        unit: what has one score, and what v is a mean over: `"sequence"`, `"step"` or `"token"`.
        seed: of the drawing and the dealing.

    Raises:
        ValueError: a damping that is not positive, a count below 1, or more minibatches than units.

    Source: Huo et al., *Rank-1 approximation of inverse Fisher for natural policy gradients in deep reinforcement
    learning*, arXiv 2601.18626. Only the form of the update is from there.
    """

    damping: float = 1.0
    minibatches: int = 1
    advantages: Advantages = batch_advantages
    unit: str = "sequence"
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checks.require_positive("damping", self.damping)
        checks.require_at_least("minibatches", self.minibatches, 1)
        checks.require_choice("unit", self.unit, UNITS)
        self._generator = torch.Generator().manual_seed(self.seed)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once. The score costs the backward pass of one unit, which is not counted."""
        units, advantages = cut(self.advantages, batch, self.unit)
        checks.require_at_least("number of units in the batch", len(units), self.minibatches)
        order = torch.randperm(len(units), generator=self._generator).to(advantages.device)
        for index in order.tensor_split(self.minibatches):
            part = units.select(index)
            score = self._score(policy, part.select(torch.zeros_like(index[:1])), optimizer)
            clear_gradients(policy, optimizer)
            accumulate(policy, part, at_positions(advantages[index] / len(index), part))
            assign_gradient(policy, solve_rank_one(score, flat_gradient(policy), self.damping))
            metrics = finish(policy, optimizer)
        return metrics

    def _score(self, policy: Any, unit: Batch, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """∇ log π of one unit. The units come in a random order, so that the first is one drawn at random."""
        clear_gradients(policy, optimizer)
        log_prob(policy, unit).sum().backward()
        return flat_gradient(policy)
