"""The per-sequence gradients of one layer, and what ISOPO asks of them, without forming more than needed.

A layer is a weight and its bias (or whatever parameters its module owns). From the factors of their gradients come the
Gram matrix, the norms, the overlaps with single tokens, and at the end the only thing that leaves: Σ_s c_s G_s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini.geometry import gram as grams
from isopo_mini.geometry.parameter_gradients import MatrixGradients, VectorGradients, Workspace, sum_of

PATHS = ("auto", "dense", "ghost", "sketched")


@dataclass
class LayerGradients:
    """The per-sequence gradients of a layer: those of its parameters, side by side.

    Args:
        parameters: by name.
        path: how Gram matrices of weight matrices are made, one of `PATHS`.
        sketch_size: k of the sketched path.
    """

    parameters: dict[str, MatrixGradients | VectorGradients]
    path: str
    sketch_size: int
    workspace: Workspace
    make_generator: Callable[[], torch.Generator]
    token_mask: Tensor | None = None  # (S, T): which positions may be sampled as tokens; None for all

    @property
    def generator(self) -> torch.Generator:
        """The source of randomness of sketches and sampled tokens."""
        return self.make_generator()

    def gram(self) -> Float[Tensor, "S S"]:
        """K_ss' = ⟨G_s, G_s'⟩, summed over the parameters of the layer."""
        self.workspace.start_layer()
        if self.path == "sketched":
            return self._sketched_gram()
        return sum_of(
            [
                part.gram(self.path, self.workspace) if isinstance(part, MatrixGradients) else part.gram()
                for part in self.parameters.values()
            ]
        )

    def _sketched_gram(self) -> Float[Tensor, "S S"]:
        """K̂ of the layer. A bias is one more column of its weight, so it goes through the same projections."""
        matrices = [part for part in self.parameters.values() if isinstance(part, MatrixGradients)]
        vectors = [part for part in self.parameters.values() if isinstance(part, VectorGradients)]
        parts = []
        for matrix in matrices:
            like = matrix.rights[0]
            sketch = grams.draw_sketch(self.sketch_size, matrix.rows, matrix.columns, like, self.generator)
            if sketch.left is None and sketch.right is None:  # short on both sides: nothing to gain
                parts.append(matrix.gram("dense", self.workspace))
                continue
            sketched = matrix.sketched(sketch)  # (S, k, l)
            for bias in [vector for vector in vectors if vector.form().shape[1] == matrix.rows]:
                vectors.remove(bias)
                column = bias.form() if sketch.left is None else bias.form() @ sketch.left.to(like.dtype).T  # (S, k)
                if sketch.right is None:
                    sketched = torch.cat([sketched, column[:, :, None]], dim=2)
                else:
                    entries = torch.randn(
                        sketched.shape[2], dtype=like.dtype, device=like.device, generator=self.generator
                    )
                    sketched = sketched + column[:, :, None] * (entries / math.sqrt(self.sketch_size))
            parts.append(grams.inner_products(sketched))
        return sum_of(parts + [vector.gram() for vector in vectors])

    def norms(self) -> Float[Tensor, "S"]:
        """‖G_s‖, the Euclidean norm."""
        return sum_of([part.squared_norms() for part in self.parameters.values()]).sqrt()

    def token_overlaps(self, count: int) -> tuple[Float[Tensor, "S N"], Float[Tensor, "N"]]:
        """⟨G_s, g_n⟩ and ‖g_n‖ for `count` random tokens n, or for all tokens where there are fewer."""
        sequences, positions = self._sample_tokens(count)
        parts = [part.token_overlaps(sequences, positions) for part in self.parameters.values()]
        overlaps, squares = (sum_of(list(pieces)) for pieces in zip(*parts, strict=True))
        return overlaps, squares.sqrt()

    def combine(self, coefficients: Float[Tensor, "S"]) -> dict[str, Tensor]:
        """Σ_s c_s G_s, for every parameter."""
        return {name: part.combine(coefficients) for name, part in self.parameters.items()}

    def _sample_tokens(self, count: int) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
        """Sequence and position of `count` tokens, drawn without replacement."""
        shapes = {
            tuple(factor.shape[:2])
            for part in self.parameters.values()
            for factor in (part.rights if isinstance(part, MatrixGradients) else part.output_gradients)
        }
        if len(shapes) != 1:
            raise ValueError(
                f"{', '.join(self.parameters)}: the token-sampled norm expected every use of the layer to have "
                f"the same sequences and positions, got {sorted(shapes)}; use norm='sequence'"
            )
        (shape,) = shapes
        if self.token_mask is not None and tuple(self.token_mask.shape) == shape:
            allowed = self.token_mask.nonzero()
        else:
            allowed = torch.ones(shape, device=self.generator.device).nonzero()
        if len(allowed) > count:
            chosen = torch.randperm(len(allowed), generator=self.generator, device=self.generator.device)[:count]
            allowed = allowed[chosen]
        return allowed[:, 0], allowed[:, 1]
