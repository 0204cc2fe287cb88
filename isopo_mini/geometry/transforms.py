"""Which coefficients a layer's gradients get: the two variants of ISOPO, with the averages they carry along."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.geometry import isopo
from isopo_mini.geometry.layer_gradients import LayerGradients


class MovingAverages:
    """Exponential moving averages of scalars of one layer, over optimizer steps.

    Within a step every microbatch blends the history with its own value, so their order does not matter;
    `end_step` then folds the mean over the microbatches into the history. The first step has no history and uses
    its own values.

    A value that is not finite, of a step that a `GradScaler` or a clipped norm would skip, does not enter the history:
    the step after it is what it would have been without. None of this waits for a GPU. In `history`, NaN stands for a
    name that has had no finite value yet.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.history: dict[str, Tensor] = {}
        self._pending: dict[str, list[Tensor]] = {}

    def blend(self, name: str, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """decay·history + (1 − decay)·value."""
        self._pending.setdefault(name, []).append(value)
        return self._update(name, value)

    def end_step(self) -> None:
        """Fold the values seen since the last call into the history."""
        for name, values in self._pending.items():
            folded = self._update(name, values[0] if len(values) == 1 else _mean_of_finite(torch.stack(values)))
            unchanged = self.history[name].to(folded) if name in self.history else torch.nan
            self.history[name] = torch.where(folded.isfinite(), folded, unchanged)
        self._pending.clear()

    def forget_pending(self) -> None:
        """Drop the values of a step that was abandoned."""
        self._pending.clear()

    def _update(self, name: str, value: Tensor) -> Tensor:
        if name not in self.history:
            return value
        history = self.history[name].to(value)
        return torch.where(history == history, torch.lerp(value, history, self.decay), value)  # NaN is not itself


def _mean_of_finite(values: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """The mean without the numbers that are not finite; NaN if there are no others."""
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).sum() / finite.sum()


@runtime_checkable
class Transform(Protocol):
    """Turns the advantages of a microbatch into one layer's coefficients."""

    def coefficients(
        self, layer: LayerGradients, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """c, with which the layer's gradient becomes Σ_s c_s G_s."""
        ...


@dataclass(frozen=True)
class NTK:
    """c = λ(K + λI)⁻¹A with λ = ρ · (moving average of tr K/S): the damped natural gradient of the layer.

    Args:
        damping: ρ > 0, without units. Large ρ is REINFORCE, small ρ the undamped natural gradient.

    Raises:
        ValueError: ρ is not positive.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        checks.require_positive("damping", self.damping)

    def coefficients(
        self, layer: LayerGradients, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """See the class."""
        gram = layer.gram()
        eigenvalue = averages.blend("eigenvalue", isopo.mean_eigenvalue(gram))
        above_rounding = isopo.is_above_rounding(self.damping, gram)
        solver = isopo.solve_ntk if above_rounding else isopo.solve_ntk_by_eigenvalues
        return solver(gram, advantages, self.damping * eigenvalue)


@dataclass(frozen=True)
class FisherNormalized:
    """c_s = A_s / (nᵖ oᵠ rʷ): the advantages over (powers of) the norms of the layer's gradient.

    n = ‖G_s‖ is the Euclidean norm, o = ‖G_s‖_F the Fisher norm, r = o/n their ratio. The defaults are ISOPO
    as published: o alone.

    Args:
        norm: `"sequence"`: o_s² = (1/S) Σ_s' K_ss'². `"token"`: from sampled tokens and divided by their norms, as in
            the public code. `"token-unscaled"`: the same without that division.
        gradient_power: p.
        overlap_power: q.
        ratio_power: w.
        strength: ρ ≥ 0 of the regulariser, see `isopo.regularized`.
        keep_small: which regulariser.
        tokens: how many tokens are sampled for the token norms.

    Raises:
        ValueError: an unknown norm, a negative strength, or fewer than one token.
    """

    norm: str = "sequence"
    gradient_power: float = 0.0
    overlap_power: float = 1.0
    ratio_power: float = 0.0
    strength: float = 0.0
    keep_small: bool = False
    tokens: int = 250

    def __post_init__(self) -> None:
        checks.require_choice("norm", self.norm, ("sequence", "token", "token-unscaled"))
        checks.require_at_least("strength", self.strength, 0.0)
        checks.require_at_least("tokens", self.tokens, 1)

    def coefficients(
        self, layer: LayerGradients, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> Float[Tensor, "S"]:
        """See the class."""
        overlaps = self._fisher_norms(layer)
        factors = [("overlap", overlaps, self.overlap_power)]
        if self.gradient_power or self.ratio_power:
            norms = layer.norms().to(overlaps.dtype)
            ratios = torch.where(norms == 0, torch.zeros_like(norms), overlaps / norms)
            factors += [("gradient", norms, self.gradient_power), ("ratio", ratios, self.ratio_power)]
        coefficients = advantages
        for name, values, power in factors:
            if power:
                mean_square = averages.blend(name, isopo.mean_of_squares(values))
                values = isopo.regularized(values, self.strength, mean_square, self.keep_small)
                coefficients = isopo.divide(coefficients, values, power)
        return coefficients

    def _fisher_norms(self, layer: LayerGradients) -> Float[Tensor, "S"]:
        if self.norm == "sequence":
            return isopo.root_mean_square(layer.gram())
        overlaps, token_norms = layer.token_overlaps(self.tokens)
        return isopo.token_fisher_norms(overlaps, token_norms if self.norm == "token" else None)
