"""A Gram matrix for every block of sequences, in one backward pass: what a loop over microbatches would give.

The sequences of a microbatch share K. To share it among fewer, a batch is usually cut into microbatches, each with a
pass of its own. Cut inside of the one pass instead, K is block diagonal: the same coefficients, for one forward and one
backward pass, and the memory of the whole batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.moving_averages import MovingAverages
from isopo_mini.engine.parameter_gradients import MatrixGradients, VectorGradients, sum_of
from isopo_mini.engine.resources import Resources
from isopo_mini.engine.transforms import NTK, Transform
from isopo_mini.geometry import gram as grams

Uses = dict[str, MatrixGradients | VectorGradients]


@dataclass
class Blocks:
    """The blocks of a microbatch.

    Args:
        places: of each block among the sequences, one after another. All have the same size but for the last.
        resources: of each block, as of a microbatch of its own.
    """

    places: list[slice]
    resources: list[Resources]

    def gradients(
        self, uses: Uses, transform: Transform, advantages: Float[Tensor, "S"], averages: MovingAverages
    ) -> tuple[Float[Tensor, "S"], dict[str, Tensor]]:
        """c of all sequences of a layer, and Σ_s c_s G_s for every parameter.

        The moving averages see the blocks as they see the microbatches of one step: each blends the history with its
        own value, and the mean over the blocks enters the history.
        """
        size = self.places[0].stop - self.places[0].start
        if isinstance(transform, NTK) and not transform.spectra and len(advantages) % size == 0:
            whole = LayerGradients(uses, self.resources[0], sharing=size)
            coefficients = transform.coefficients_of_blocks(BlockGeometry(whole, self.places), advantages, averages)
            return coefficients, whole.combine(coefficients)
        found: list[Tensor] = []
        total: dict[str, Tensor] = {}
        for place, resources in zip(self.places, self.resources, strict=True):
            part = LayerGradients({name: gradients.of(place) for name, gradients in uses.items()}, resources)
            found.append(transform.coefficients(part, advantages[place], averages))
            for name, gradient in part.combine(found[-1]).items():
                total[name] = total[name] + gradient if name in total else gradient
        return torch.cat(found), total


@dataclass
class BlockGeometry:
    """What the NTK asks of a layer, for blocks of the same size, all at once.

    Args:
        whole: the gradients of all sequences.
        places: of the blocks.
    """

    whole: LayerGradients
    places: list[slice]

    def grams(self) -> Float[Tensor, "B b b"]:
        """K of every block. Sketches are shared by all blocks."""
        layer, count = self.whole, len(self.places)
        if layer.is_sketched:
            parts = [grams.block_products(part, count) for part in layer.sketched_parts]
        else:
            parts = [self._exact(part) for part in layer.parameters.values()]
        return layer.resources.unscaled(sum_of(parts), 2)

    def _exact(self, part: MatrixGradients | VectorGradients) -> Float[Tensor, "B b b"]:
        """K of one parameter, by the cheaper way for as many sequences as share one."""
        workspace = self.whole.resources.workspace
        if isinstance(part, VectorGradients):
            return grams.block_products(part.form(), len(self.places))
        if self.whole.path_of(part) == "dense":
            return grams.block_products(part.form(workspace), len(self.places))
        return torch.stack([part.of(place).gram("ghost", workspace) for place in self.places])

    def rounding(self) -> Float[Tensor, "B b"] | None:
        """See `LayerGeometry.rounding`."""
        rounding = self.whole.rounding(from_gram=True)
        return None if rounding is None else rounding.unflatten(0, (len(self.places), -1))
