"""The factor s of a loss s·Σ log π, which the transforms must not see.

Every G_s arrives multiplied by s. A Gram matrix divided by s² and a norm divided by s give the coefficients c of the
plain loss, and Σ_s c_s (s·G_s) is then s times the plain step, which is what `GradScaler.unscale_` divides by s.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from isopo_mini import checks

Scale = float | Tensor


def check_loss_scale(loss_scale: Scale) -> None:
    """A number > 0, or a tensor without axes. The value of a tensor is not looked at: that would make a GPU wait."""
    if isinstance(loss_scale, Tensor):
        checks.require_shape("loss_scale", loss_scale, "")
        checks.require_floating("loss_scale", loss_scale)
    else:
        checks.require_positive("loss_scale", loss_scale)


@contextmanager
def grad_scaler_noticed(note: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, `note` is given the scale of every `torch.amp.GradScaler` that scales a loss.

    A scaler that the engine is not told of would change the Fisher-normalised step by s⁻² without any error, and the
    usual recipe, `scaler.scale(loss).backward()`, says nothing to the engine.
    """
    scale = GradScaler.scale

    def noticed(self: GradScaler, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        if self.is_enabled() and self._scale is not None:
            note(self._scale)
        return scaled

    GradScaler.scale = noticed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GradScaler.scale = scale  # type: ignore[method-assign]
