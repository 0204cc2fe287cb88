"""Rules that stay near the policy the batch came from: several clipped steps, or one step inside a trust region."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isopo_mini import checks
from isopo_mini.batch import Batch
from isopo_mini.geometry import fisher, natural_gradient
from isopo_mini.objectives.losses import LOSSES, Loss
from isopo_mini.policies.categorical import kl_divergence
from isopo_mini.rules.repeatable import log_prob
from isopo_mini.rules.rule_parts import (
    UNITS,
    Advantages,
    accumulate,
    advantages_of,
    assign_gradient,
    at_positions,
    batch_advantages,
    centred_advantages,
    clear_gradients,
    finish,
    flat_gradient,
    standardised_advantages,
    weigh,
)

# Methods whose definition includes their advantages.
_DEFINED_ADVANTAGES: dict[str, Advantages] = {
    "grpo": standardised_advantages,
    "dapo": standardised_advantages,
    "gspo": standardised_advantages,
    "cispo": standardised_advantages,
    "dr_grpo": centred_advantages,
}


class ClippedSurrogate:
    """Several optimizer steps a batch on a loss of the π_old family; log π_old is `batch.log_probs`.

    With one epoch and one minibatch the ratio is 1, and every loss has the gradient of REINFORCE with its advantages
    and its aggregate. The metrics `ratio_mean`, `clip_fraction` and `kl_old` are means over the optimizer steps, each
    measured before its step; `gradient_norm` is that of the last step.

    Args:
        loss: a name of `objectives.losses.LOSSES`, or a function with their signature.
        epochs: how often the batch is used.
        minibatches: parts the batch is dealt into at random in every epoch, each for one optimizer step.
        advantages: computes A, `(S,)` or `(S, T)`, of the whole batch before it is dealt. None for those that the
            method defines (GRPO's for grpo, dapo, gspo and cispo, Dr. GRPO's for dr_grpo), else `batch_advantages`.
        aggregate: how tokens become one number; None for the loss's own.
        clip_low: ε_l; None for the loss's own.
        clip_high: ε_h; None for the loss's own.
        unit: `"sequence"`: minibatches of whole sequences. `"step"`: the batch is cut into its time steps first.
            `"token"`: minibatches of whole sequences, and the mean over their tokens where no `aggregate` is given.
        seed: of the dealing.
        **options: of the loss, for example `dialect="trl"` of cispo.

    Raises:
        ValueError: a name is unknown, a count is below 1, or the loss does not take an option. In `step`: the policy's
            log-probabilities are random; see `repeatable`.
        FloatingPointError: in `step`: a log-probability is not finite, after the batch's earlier optimizer steps.
    """

    def __init__(
        self,
        loss: str | Callable[..., Loss] = "ppo",
        epochs: int = 1,
        minibatches: int = 1,
        advantages: Advantages | None = None,
        *,
        aggregate: str | None = None,
        clip_low: float | None = None,
        clip_high: float | None = None,
        unit: str = "sequence",
        seed: int = 0,
        **options: Any,
    ) -> None:
        checks.require_at_least("epochs", epochs, 1)
        checks.require_at_least("minibatches", minibatches, 1)
        checks.require_choice("unit", unit, UNITS)
        if isinstance(loss, str):
            checks.require_choice("loss", loss, tuple(LOSSES))
            advantages = advantages or _DEFINED_ADVANTAGES.get(loss)
            loss = LOSSES[loss]
        self.loss = loss
        self.epochs = epochs
        self.minibatches = minibatches
        self.advantages = advantages or batch_advantages
        self.unit = unit
        given = {"aggregate": aggregate, "clip_low": clip_low, "clip_high": clip_high}
        self.options = options | {name: value for name, value in given.items() if value is not None}
        parameters = inspect.signature(loss).parameters.values()
        taken = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            for name in self.options:
                checks.require_choice(f"option of {getattr(loss, '__name__', 'the loss')}", name, taken)
        if unit == "token" and "aggregate" in taken:
            self.options.setdefault("aggregate", "token-mean")
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch `epochs` times; see the class."""
        advantages = advantages_of(self.advantages, batch, by_position=True)
        if self.unit == "step":
            advantages = at_positions(advantages, batch)[batch.mask]
            batch = batch.as_steps()
        checks.require_at_least("number of units in the batch", len(batch), self.minibatches)
        reports: list[dict[str, float]] = []
        for _ in range(self.epochs):
            for part, of_part in self._deal(batch, advantages):
                log_probs = log_prob(policy, part)
                if not torch.isfinite(log_probs).all():
                    raise FloatingPointError(
                        f"log_probs: expected finite numbers, got inf or nan after {len(reports)} optimizer steps on "
                        "this batch; try a smaller step size"
                    )
                loss, metrics = self.loss(log_probs, part.log_probs, of_part, part.mask, **self.options)
                clear_gradients(policy, optimizer)
                loss.backward()
                reports.append(metrics)
                common = finish(policy, optimizer, self.epochs)
        return common | {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}

    def _deal(self, batch: Batch, advantages: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """The minibatches of one epoch, of nearly equal sizes."""
        if self.minibatches == 1:
            yield batch, advantages
            return
        order = torch.randperm(len(batch), generator=self._generator).to(advantages.device)
        for index in order.tensor_split(self.minibatches):
            yield batch.select(index), advantages[index]


@dataclass
class TrustRegion:
    """TRPO: the natural gradient, as long as the KL allows, then shorter until the step is seen to be good.

    x = (F + λI)⁻¹g by conjugate gradients;  step √(2δ / xᵀFx) · x, for which ½dᵀFd = δ;  shortened until
    KL(before ‖ after) ≤ δ and the surrogate Σ A (r − 1) has grown. When no trial passes, the policy stays as it is.

    The rule sets the parameters itself. The optimizer is not asked to step, and its learning rate has no meaning here.
    In `.grad` it leaves minus the step it took, so `gradient_norm` is the length of that step.

    Args:
        max_kl: δ > 0, in nats a unit.
        damping: λ, in the units of F (per unit).
        max_iterations: of the conjugate gradients.
        tolerance: of the conjugate gradients, relative residual.
        trials: lengths that the line search tries at most.
        shrink: factor from one length to the next, between 0 and 1.
        advantages: computes A, `(S,)` or `(S, T)`, of the whole batch.
        unit: `"sequence"`, `"step"` or `"token"`: what g, F and the KL are means over. Those of a sequence are sums
            over its actions.

    Raises:
        ValueError: an option is out of range. In `step`: the policy's log-probabilities are random; see `repeatable`.

    Source: Schulman et al., *Trust region policy optimization*, arXiv 1502.05477, section 6 and appendix C. There the
    averages are over state-action pairs, which is the unit "step" here.
    """

    max_kl: float = 0.01
    damping: float = 0.1
    max_iterations: int = 10
    tolerance: float = 1e-6
    trials: int = 10
    shrink: float = 0.8
    advantages: Advantages = batch_advantages
    unit: str = "sequence"

    def __post_init__(self) -> None:
        checks.require_positive("max_kl", self.max_kl)
        checks.require_at_least("damping", self.damping, 0.0)
        checks.require_at_least("trials", self.trials, 1)
        checks.require_choice("unit", self.unit, UNITS)
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink: expected a number between 0 and 1, got {self.shrink}")

    def step(self, policy: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Use the batch once; see the class.

        Beside the common metrics: `cg_iterations`; `step_fraction`, the length taken over the longest tried (0 when
        none passed); `kl_step`, exact, in nats a unit; and `surrogate_gain`.
        """
        batch, weights, units = weigh(self.advantages, batch, self.unit, by_position=True)
        per_unit = len(batch) / units  # `fisher` takes the mean over rows

        def product(vector: Tensor) -> Tensor:
            return per_unit * fisher.fisher_vector_product(policy, batch.observations, vector, mask=batch.mask)

        clear_gradients(policy, optimizer)
        accumulate(policy, batch, weights)
        direction, convergence = natural_gradient.solve_cg(
            product, -flat_gradient(policy), self.damping, self.max_iterations, self.tolerance
        )
        curvature = direction.dot(product(direction)).item()  # xᵀFx
        # Zero advantages give x = 0 and no step.
        longest = math.sqrt(2 * self.max_kl / curvature) * direction if curvature > 0 else torch.zeros_like(direction)
        fraction, kl, gain = self._search(policy, batch, weights, units, longest)
        assign_gradient(policy, -fraction * longest)
        return {
            "backward_passes": 2.0 + convergence.iterations,  # one for g, one a product with F
            "gradient_norm": flat_gradient(policy).norm().item(),
            "cg_iterations": float(convergence.iterations),
            "step_fraction": fraction,
            "kl_step": kl,
            "surrogate_gain": gain,
        }

    @torch.no_grad()
    def _search(
        self, policy: Any, batch: Batch, weights: Tensor, units: int, longest: Tensor
    ) -> tuple[float, float, float]:
        """Move the policy by the first fraction of the step that passes; that fraction, its KL and its gain."""
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        before = [parameter.clone() for parameter in trainable]
        moves = [
            move.view_as(parameter)
            for parameter, move in zip(trainable, longest.split([p.numel() for p in trainable]), strict=True)
        ]
        logits, log_probs = policy.logits(batch.observations), policy.log_prob(batch)
        fraction = 1.0
        for _ in range(self.trials if longest.any() else 0):
            for parameter, start, move in zip(trainable, before, moves, strict=True):
                parameter.copy_(start + fraction * move)
            mean_kl = kl_divergence(logits, policy.logits(batch.observations), batch.mask)
            kl = mean_kl.item() * int(batch.mask.sum()) / units
            ratios = (policy.log_prob(batch).double() - log_probs.double()).exp()
            gain = (weights * (ratios - 1)).sum().item()
            if kl <= self.max_kl and gain > 0:  # neither holds of a number that is not one
                return fraction, kl, gain
            fraction *= self.shrink
        for parameter, start in zip(trainable, before, strict=True):
            parameter.copy_(start)
        return 0.0, 0.0, 0.0
