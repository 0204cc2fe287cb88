"""Moving averages of a layer's scalars, over optimizer steps."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


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
        self._noted: dict[str, list[Tensor]] = {}

    def blend(self, name: str, value: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """decay·history + (1 − decay)·value, for one value a block where there are several."""
        self._pending.setdefault(name, []).append(value)
        return self._update(name, value)

    def note(self, name: str, value: Float[Tensor, ""]) -> None:
        """Keep a number for `noted`; it has no part in any average."""
        self._noted.setdefault(name, []).append(value)

    def noted(self) -> dict[str, Tensor]:
        """Mean over the microbatches of what was noted since the last `end_step`, by name."""
        return {name: torch.stack(values).mean() for name, values in self._noted.items()}

    def end_step(self) -> None:
        """Fold the values seen since the last call into the history."""
        end_step_of([self])

    def take_means(self) -> dict[str, Float[Tensor, ""]]:
        """The mean over the microbatches of every value of this step, which is forgotten with all that was noted."""
        means = {}
        for name, values in self._pending.items():
            is_one = len(values) == 1 and values[0].ndim == 0
            means[name] = values[0] if is_one else _mean_of_finite(torch.cat([value.reshape(-1) for value in values]))
        self.forget_pending()
        return means

    def forget_pending(self) -> None:
        """Drop the values of a step that was abandoned."""
        self._pending.clear()
        self._noted.clear()

    def _update(self, name: str, value: Tensor) -> Tensor:
        if name not in self.history:
            return value
        return _blended(self.history[name].to(value), value, self.decay)


def end_step_of(averages: Iterable[MovingAverages]) -> None:
    """`end_step` of many, such as all layers of a model, whose numbers go through the same operations together."""
    alike: dict[tuple, list[tuple[MovingAverages, str, Tensor]]] = {}
    for each in averages:
        for name, mean in each.take_means().items():
            alike.setdefault((each.decay, mean.dtype, mean.device), []).append((each, name, mean))
    for (decay, *_), entries in alike.items():
        means = torch.stack([mean for _, _, mean in entries])
        nothing = torch.full_like(means[0], torch.nan)
        history = torch.stack([each.history.get(name, nothing).to(means) for each, name, _ in entries])
        folded = _blended(history, means, decay)
        folded = torch.where(folded.isfinite(), folded, history)
        for (each, name, _), number in zip(entries, folded.unbind(), strict=True):
            each.history[name] = number


def _blended(history: Float[Tensor, "*#B"], values: Float[Tensor, "*B"], decay: float) -> Float[Tensor, "*B"]:
    """decay·history + (1 − decay)·value, and the value alone where there is no history, NaN, which is not itself."""
    return torch.where(history == history, torch.lerp(values, history, decay), values)


def _mean_of_finite(values: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """The mean without the numbers that are not finite; NaN if there are no others."""
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).sum() / finite.sum()
