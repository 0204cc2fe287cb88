"""What the layers of one microbatch share: how Gram matrices are made, memory, projections, sampled tokens."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini.engine.workspace import Workspace
from isopo_mini.geometry.sketches import Projection, Sketch, draw_projection, random_signs

PATHS = ("auto", "dense", "ghost", "sketched", "signs", "fast")
# Paths that project the gradients, and how; `"fast"` does so in the layers where that takes the least.
SKETCHES = {"sketched": "gaussian", "signs": "signs", "fast": "signs"}


class Resources:
    """What the layers of one microbatch share: options, memory, projections and sampled tokens.

    Args:
        path: how Gram matrices of weight matrices are made, one of `PATHS`.
        sketch_size: k of the sketched path.
        workspace: memory for the G_s of the dense path, and for factors that carry the coefficients.
        generator_of: the source of randomness on a device.
        token_mask: `(S, T)`, which positions may be sampled as tokens; None for all.
        loss_scale: s.
        most_bytes: what the G_s of a weight may take where the path is left to the engine; None for any.
    """

    def __init__(
        self,
        path: str,
        sketch_size: int,
        workspace: Workspace,
        generator_of: Callable[[torch.device], torch.Generator],
        token_mask: Tensor | None = None,
        loss_scale: float | Tensor = 1.0,
        most_bytes: int | None = None,
    ) -> None:
        self.most_bytes = most_bytes
        self.path = path
        self.sketch_size = sketch_size
        self.workspace = workspace
        self.loss_scale = loss_scale
        self.relative_rounding = 0.0  # of the coarsest numbers that the backward pass has come by
        self._generator_of = generator_of
        self._token_mask = token_mask
        self._projections: dict[tuple[str, int, torch.dtype, torch.device], Projection] = {}
        self._tokens: dict[tuple[torch.Size, int, torch.device], Tensor] = {}

    def unscaled(self, values: Tensor, degree: int) -> Tensor:
        """What `values`, of that degree in the gradients, would be for a loss that is not scaled."""
        if not isinstance(self.loss_scale, Tensor) and self.loss_scale == 1:
            return values
        for _ in range(degree):  # not by s²: that may leave the range where s does not
            values = values / self.loss_scale
        return values

    def projection(self, side: str, length: int, like: Tensor) -> Projection:
        """A projection of `length` numbers to k. Weights with a side of the same length share it."""
        key = (side, length, like.dtype, like.device)
        if key not in self._projections:
            self._projections[key] = draw_projection(
                self.sketch_size, length, like, self._generator_of(like.device), SKETCHES[self.path]
            )
        return self._projections[key]

    def bias_column(self, like: Tensor) -> Float[Tensor, "_"]:
        """Q's column for the constant input 1 that a bias is the weight of, as long as Q's other columns."""
        key = ("bias", 1, like.dtype, like.device)
        if key not in self._projections:
            generator, size = self._generator_of(like.device), self.sketch_size
            if SKETCHES[self.path] == "signs":
                self._projections[key] = random_signs((size, 1), like, generator) / size**0.5
            else:
                self._projections[key] = draw_projection(size, 1, like, generator)
        return cast(Tensor, self._projections[key])[:, 0]

    def sketch(self, rows: int, columns: int, like: Tensor) -> Sketch:
        """The projections for a weight of shape `(rows, columns)`. The two sides are independent."""
        return Sketch(
            self.projection("left", rows, like) if rows > self.sketch_size else None,
            self.projection("right", columns, like) if columns > self.sketch_size else None,
        )

    def tokens(self, shape: torch.Size, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        """Sequence and position of `count` tokens of `(S, T)`, drawn without replacement; all where there are fewer."""
        key = (shape, count, device)
        if key not in self._tokens:
            generator = self._generator_of(device)
            if self._token_mask is not None and self._token_mask.shape == shape:
                allowed = self._token_mask.nonzero()
            else:
                allowed = torch.ones(shape, device=device).nonzero()
            if len(allowed) > count:
                allowed = allowed[torch.randperm(len(allowed), generator=generator, device=device)[:count]]
            self._tokens[key] = allowed
        return self._tokens[key][:, 0], self._tokens[key][:, 1]
