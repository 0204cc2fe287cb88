"""The per-sequence gradients of one layer, and what ISOPO asks of them, without forming more than needed.

A layer is a weight and its bias (or whatever parameters its module owns). From the factors of their gradients come the
Gram matrix, the norms, the overlaps with single tokens, and at the end the only thing that leaves: Σ_s c_s G_s.

Where the loss is scaled by s, the factors are s times as large. What a transform asks for is divided by s, or by s²,
and what leaves is not: it is on its way to whoever scaled the loss.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini.engine.parameter_gradients import MatrixGradients, VectorGradients, squared_lengths, sum_of
from isopo_mini.engine.path_costs import exact_cost, products_pay, sketched_cost
from isopo_mini.engine.resources import SKETCHES, Resources
from isopo_mini.geometry import gram as grams
from isopo_mini.geometry.sketches import project
from isopo_mini.precision import at_least_float32

# A gradient that is zero comes out as a sum that does not quite cancel: up to 5 ε times the root of the sum of squares
# in single and double precision, a third of ε in bfloat16 (attention of 1 to 4 layers, 6 to 512 positions). What is no
# longer than the first number times ε, or the second in half precision, is taken for zero.
ROUNDING, HALF_ROUNDING = 16.0, 2.0


@runtime_checkable
class LayerGeometry(Protocol):
    """What a transform may ask of a layer: inner products of the gradients of its sequences."""

    def gram(self) -> Float[Tensor, "S S"]:
        """K_ss' = ⟨G_s, G_s'⟩, summed over the parameters of the layer."""
        ...

    def few_columns(self) -> Float[Tensor, "S P"] | None:
        """G, one row a sequence, where GᵀG is cheaper than K; else None."""
        ...

    def rows_for_products(self, iterations: int) -> Float[Tensor, "S P"] | None:
        """G, one row a sequence, where so many products with G and Gᵀ may take the place of K, and are faster."""
        ...

    def norms(self) -> Float[Tensor, "S"]:
        """‖G_s‖, the Euclidean norm."""
        ...

    def token_overlaps(self, count: int) -> tuple[Float[Tensor, "S N"], Float[Tensor, "N"]]:
        """⟨G_s, g_n⟩ and ‖g_n‖ for `count` random tokens n."""
        ...

    def rounding(self, from_gram: bool) -> Float[Tensor, "S"] | None:
        """Up to which ‖G_s‖ the gradient is zero but for rounding; None where it is no sum that could cancel.

        Args:
            from_gram: is ‖G_s‖ the root of K_ss or of ‖G_s‖², which may be sums of products themselves?
        """
        ...


@dataclass
class LayerGradients:
    """The per-sequence gradients of a layer: those of its parameters, side by side.

    Args:
        parameters: by name.
        resources: shared with the other layers of the microbatch.
        sharing: how many sequences share a Gram matrix, which decides how it is made; all of them when None.
    """

    parameters: dict[str, MatrixGradients | VectorGradients]
    resources: Resources
    sharing: int | None = None

    def __post_init__(self) -> None:
        self.resources.workspace.start_layer()

    @property
    def _parts(self) -> list[MatrixGradients | VectorGradients]:
        """Those of every parameter."""
        return list(self.parameters.values())

    @cached_property
    def path(self) -> str:
        """How K is made here: `"fast"` is `"signs"` where that takes less than half of the time, else `"auto"`."""
        resources = self.resources
        if resources.path != "fast":
            return resources.path
        sizes = [part.sizes(self.sharing) for part in self._parts if isinstance(part, MatrixGradients)]
        exact = sum(exact_cost(of_matrix, resources.most_bytes) for of_matrix in sizes)
        sketched = sum(sketched_cost(of_matrix, resources.sketch_size) for of_matrix in sizes)
        return "signs" if 2 * sketched < exact else "auto"

    def path_of(self, matrix: MatrixGradients) -> str:
        """How the exact K of one weight is made."""
        return matrix.path(self.path, self.resources.most_bytes, self.sharing)

    @property
    def is_sketched(self) -> bool:
        """Is K an estimate, from projections?"""
        return self.path in SKETCHES

    def gram(self) -> Float[Tensor, "S S"]:
        """K_ss' = ⟨G_s, G_s'⟩, summed over the parameters of the layer."""
        return self.resources.unscaled(self._gram(), 2)

    def few_columns(self) -> Float[Tensor, "S P"] | None:
        """G, one row a sequence, where the layer has at most half as many parameters as there are sequences; else None.

        GᵀG is then the smaller matrix and says all that K = GGᵀ says. Sketches of random signs are taken for G where
        they are asked for and short enough. Not where Gaussian ones or products of positions were asked for by name.
        """
        most = self.num_sequences // 2
        if self.resources.path in ("auto", "dense", "fast") and sum(part.size for part in self._parts) <= most:
            formed = self._formed()
        elif self.path == "signs" and sum(part[0].numel() for part in self.sketched_parts) <= most:
            formed = self.sketched_parts
        else:
            return None
        return self._side_by_side(formed)

    def rows_for_products(self, iterations: int) -> Float[Tensor, "S P"] | None:
        """See `LayerGeometry`: of whatever K would be made of. Only under `"fast"`, which promises no exact c."""
        if self.resources.path != "fast":
            return None
        if self.is_sketched:
            parts = self.sketched_parts
        elif all(isinstance(part, VectorGradients) or self.path_of(part) == "dense" for part in self._parts):
            parts = self._formed()
        else:
            return None
        columns = sum(part[0].numel() for part in parts)
        return self._side_by_side(parts) if products_pay(self.num_sequences, columns, iterations) else None

    def _formed(self) -> list[Float[Tensor, "S ..."]]:
        """The G_s of every parameter."""
        workspace = self.resources.workspace
        return [part.form(workspace) if isinstance(part, MatrixGradients) else part.form() for part in self._parts]

    def _side_by_side(self, parts: list[Float[Tensor, "S ..."]]) -> Float[Tensor, "S P"]:
        """One row a sequence, as for a loss that is not scaled."""
        rows = [at_least_float32(part.flatten(1)) for part in parts]
        return self.resources.unscaled(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1), 1)

    def _gram(self) -> Float[Tensor, "S S"]:
        """K as the gradients came."""
        resources = self.resources
        if self.is_sketched:
            return sum_of([grams.inner_products(part) for part in self.sketched_parts])
        matrices = [part for part in self.parameters.values() if isinstance(part, MatrixGradients)]
        vectors = [part for part in self.parameters.values() if isinstance(part, VectorGradients)]
        parts = []
        for matrix in matrices:
            path = self.path_of(matrix)
            biases = [vector for vector in vectors if path == "ghost" and matrix.has_bias(vector)][:1]
            vectors = [vector for vector in vectors if vector not in biases]
            parts.append(matrix.gram(path, resources.workspace, bias=bool(biases)))
        return sum_of(parts + [vector.gram() for vector in vectors])

    @cached_property
    def sketched_parts(self) -> list[Float[Tensor, "S ..."]]:
        """Ĝ_s in pieces whose inner products add up to K̂, as the gradients came (not unscaled).

        A bias is one more column of its weight, so it goes through the same projections. What is short on both sides
        is what it is.
        """
        resources = self.resources
        matrices = [part for part in self._parts if isinstance(part, MatrixGradients)]
        vectors = [part for part in self._parts if isinstance(part, VectorGradients)]
        parts, apart = [], []
        for matrix in matrices:
            like = matrix.rights[0]
            sketch = resources.sketch(matrix.rows, matrix.columns, like)
            if sketch.left is None and sketch.right is None:  # short on both sides: nothing to gain
                parts.append(matrix.form(resources.workspace))
                continue
            of_uses = [vector for vector in vectors if sketch.right is not None and matrix.has_bias(vector)][:1]
            vectors = [vector for vector in vectors if vector not in of_uses]
            column = resources.bias_column(like) if of_uses else None
            parts.append(matrix.sketched(sketch, resources.workspace, column))
            apart.append((matrix.rows, sketch.left))
        for rows, left in apart:  # a vector as long as a weight's other biases goes through their projection
            alike = [vector for vector in vectors if vector.size == rows]
            parts += [vector.form() if left is None else project(vector.form(), left) for vector in alike]
            vectors = [vector for vector in vectors if vector.size != rows]
        return parts + [vector.form() for vector in vectors]

    def norms(self) -> Float[Tensor, "S"]:
        """‖G_s‖, the Euclidean norm."""
        norms = sum_of([part.squared_norms() for part in self.parameters.values()]).sqrt()
        return self.resources.unscaled(norms, 1)

    def token_overlaps(self, count: int) -> tuple[Float[Tensor, "S N"], Float[Tensor, "N"]]:
        """⟨G_s, g_n⟩ and ‖g_n‖ for `count` random tokens n, or for all tokens where there are fewer."""
        sequences, positions = self.resources.tokens(*self._shape_of_uses(), count)
        parts = [part.token_overlaps(sequences, positions) for part in self.parameters.values()]
        overlaps, squares = (sum_of(list(pieces)) for pieces in zip(*parts, strict=True))
        return self.resources.unscaled(overlaps, 2), self.resources.unscaled(squares.sqrt(), 1)

    def rounding(self, from_gram: bool) -> Float[Tensor, "S"] | None:
        """See `LayerGeometry`."""
        parts, resources = self._parts, self.resources
        for part in parts:  # under autocast a sum in single precision may be one of numbers from half precision
            units = HALF_ROUNDING if part.dtype in grams.HALF_PRECISION else ROUNDING
            resources.relative_rounding = max(resources.relative_rounding, units * torch.finfo(part.dtype).eps)
        if all(part.num_terms == 1 for part in parts):
            return None
        squares = []
        for part, size in zip(parts, self._squared_sizes, strict=True):
            of_square = resources.relative_rounding**2
            if from_gram and isinstance(part, MatrixGradients) and part.formed is None and not self.is_sketched:
                of_square += ROUNDING * torch.finfo(torch.promote_types(part.dtype, torch.float32)).eps
            squares.append(of_square * size)
        rounding = sum_of(squares).sqrt()
        rounding = torch.where(rounding.isfinite(), rounding, 0.0)  # squares that do not fit say nothing
        return resources.unscaled(rounding, 1)

    @cached_property
    def _squared_sizes(self) -> list[Float[Tensor, "S"]]:
        """About ‖G_s‖² of every parameter if nothing cancelled. Weight and bias share the gradients at the outputs."""
        lengths = cache(squared_lengths)
        return [part.squared_sizes(lengths) for part in self._parts]

    @property
    def num_sequences(self) -> int:
        """S."""
        return next(iter(self.parameters.values())).num_sequences

    def combine(self, coefficients: Float[Tensor, "S"]) -> dict[str, Tensor]:
        """Σ_s c_s G_s, for every parameter."""
        dtypes = {part.dtype for part in self._parts}
        if dtypes.isdisjoint(grams.HALF_PRECISION):
            return self._combine(coefficients)
        # Half precision ends at 65,504, and c_s = A_s/‖G_s‖_F may be larger: c goes in units of its largest entry.
        unit = coefficients.abs().amax().clamp_min(torch.finfo(coefficients.dtype).tiny)
        combined = self._combine(coefficients / unit)
        return {name: at_least_float32(gradient) * unit for name, gradient in combined.items()}

    def _combine(self, coefficients: Float[Tensor, "S"]) -> dict[str, Tensor]:
        """Σ_s c_s G_s in the precision of the factors."""
        workspace = self.resources.workspace
        return {name: part.combine(coefficients, workspace) for name, part in self.parameters.items()}

    def _shape_of_uses(self) -> tuple[torch.Size, torch.device]:
        """(S, T) of every use of the layer, and where they are."""
        factors = [
            factor
            for part in self.parameters.values()
            for factor in (part.rights if isinstance(part, MatrixGradients) else part.output_gradients)
        ]
        shapes = {factor.shape[:2] for factor in factors}
        if len(shapes) != 1:
            raise ValueError(
                f"{', '.join(self.parameters)}: the token-sampled norm expected every use of the layer to have "
                f"the same sequences and positions, got {sorted(shapes)}; use norm='sequence'"
            )
        return shapes.pop(), factors[0].device
