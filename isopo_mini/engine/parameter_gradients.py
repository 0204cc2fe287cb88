"""The per-sequence gradients of one parameter as backpropagation hands them over: in factors, not yet multiplied."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini.engine.path_costs import Sizes, exact_path
from isopo_mini.engine.workspace import Workspace
from isopo_mini.geometry import gram as grams
from isopo_mini.precision import at_least_float32


@dataclass(eq=False)
class MatrixGradients:
    """Gradients of a weight matrix: G_s = Σ_t left_st right_stᵀ, summed over the uses of the weight.

    `gram` picks a path and remembers what `combine` can use again: the dense path has every G_s and only adds them
    up; the other two never had them and make one ordinary weight-gradient product.
    """

    rows: int
    columns: int
    lefts: list[Tensor] = field(default_factory=list)  # each (S, T, o), or token indices (S, T)
    rights: list[Tensor] = field(default_factory=list)  # each (S, T, i)
    formed: Tensor | None = None  # the G_s, (S, o, i), once the dense path made them

    def add_use(self, left: Tensor, right: Tensor) -> None:
        """One more use of the weight in the forward pass."""
        self.lefts.append(left)
        self.rights.append(right)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.rights[0].dtype

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.rights[0].shape[0]

    @property
    def size(self) -> int:
        """Entries of one G_s."""
        return self.rows * self.columns

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The uses, those of a kind joined along time: a weight used twice is used on twice as many positions."""
        if len(self.lefts) == 1:
            return [(self.lefts[0], self.rights[0])]
        joined = []
        for indexed in (False, True):
            chosen = [use for use in zip(self.lefts, self.rights, strict=True) if indexed != use[0].is_floating_point()]
            if len(chosen) == 1:
                joined.append(chosen[0])
            elif chosen:
                joined.append(
                    (torch.cat([left for left, _ in chosen], 1), torch.cat([right for _, right in chosen], 1))
                )
        return joined

    def form(self, workspace: Workspace) -> Tensor:
        """All G_s, `(S, o, i)`."""
        if self.formed is None:
            for left, right in self.pairs:
                memory = workspace.take((right.shape[0], self.rows, self.columns), right)
                if left.is_floating_point():
                    gradients = torch.bmm(left.transpose(1, 2), right, out=memory)
                else:
                    gradients = grams.per_sequence_gradients(left, right, self.rows, out=memory)
                self.formed = gradients if self.formed is None else self.formed.add_(gradients)
        assert self.formed is not None
        return self.formed

    def sizes(self, sharing: int | None = None) -> Sizes:
        """What the costs of the paths to K depend on; `sharing` sequences share one, or all."""
        sequences = self.num_sequences if sharing is None else sharing
        return Sizes(sequences, self.num_terms, self.rows, self.columns, self.rights[0].element_size())

    def path(self, wanted: str, most_bytes: int | None = None, sharing: int | None = None) -> str:
        """The path to K: the wanted one, or the cheaper one when that is `"auto"`.

        Args:
            wanted: one of `PATHS`.
            most_bytes: what the G_s may take under `"auto"`; None for as much as they need.
            sharing: how many sequences share a K; all when None.
        """
        if most_bytes is not None and sharing is not None:
            most_bytes = most_bytes * sharing // self.num_sequences  # the G_s of all blocks are formed together
        return exact_path(self.sizes(sharing), most_bytes) if wanted == "auto" else wanted

    def of(self, place: slice) -> "MatrixGradients":
        """Those of some of the sequences."""
        lefts, rights = ([factor[place] for factor in factors] for factors in (self.lefts, self.rights))
        return MatrixGradients(self.rows, self.columns, lefts, rights)

    def gram(self, path: str, workspace: Workspace, bias: bool = False) -> Tensor:
        """K, `(S, S)`. With `bias` (ghost path) that of weight and bias together."""
        if path == "dense":
            return grams.inner_products(self.form(workspace))
        pairs = self.pairs
        return sum_of([grams.ghost_between(*pair, *other, bias) for pair in pairs for other in pairs])

    def has_bias(self, vector: "VectorGradients") -> bool:
        """Is this the gradient of a bias that was added at every use of the weight, and nowhere else?"""
        return (
            len(vector.output_gradients) == len(self.lefts)
            and all(left is gradients for left, gradients in zip(self.lefts, vector.output_gradients, strict=True))
            and all(factors is None for factors in vector.factors)
        )

    def sketched(
        self, sketch: grams.Sketch, workspace: Workspace | None = None, bias_column: Tensor | None = None
    ) -> Tensor:
        """Ĝ_s = P G_s Qᵀ, `(S, k, l)`; with a column of Q for the bias that of both, see `has_bias`."""
        workspace = Workspace() if workspace is None else workspace
        pairs = self.pairs
        if sketch.left is None:  # few rows: a one-hot vector is short enough to be written out
            pairs = [(_dense_left(left, self.rows, right), right) for left, right in pairs]
        return sum_of([grams.sketched_gradients(*pair, sketch, workspace.lend, bias_column) for pair in pairs])

    def squared_norms(self) -> Tensor:
        """‖G_s‖², `(S,)`, without the rest of the Gram matrix."""
        if self.formed is not None:
            return at_least_float32(self.formed.flatten(1)).square().sum(dim=1)
        pairs = self.pairs
        return sum_of([grams.own_products(*pair, *other) for pair in pairs for other in pairs])

    @property
    def num_terms(self) -> int:
        """How many outer products a G_s is the sum of."""
        return sum(right.shape[1] for right in self.rights)

    def squared_sizes(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ_t ‖left_st‖² ‖right_st‖², `(S,)`: about ‖G_s‖² if nothing cancelled. `measure`: see `squared_lengths`."""
        sizes = []
        for left, right in zip(self.lefts, self.rights, strict=True):
            products = measure(right)
            if left.is_floating_point():
                products = products * measure(left)
            sizes.append(products.sum(dim=1))
        return sum_of(sizes)

    def token_overlaps(self, sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """⟨G_s, g_n⟩ `(S, N)` and ‖g_n‖² `(N,)` for the tokens n = (sequence, position)."""
        tokens = [
            (_precise(left[sequences, positions]).unsqueeze(1), _precise(right[sequences, positions]).unsqueeze(1))
            for left, right in zip(self.lefts, self.rights, strict=True)
        ]
        overlaps = sum_of([grams.ghost_between(*pair, *token) for pair in self.pairs for token in tokens])
        squares = [
            (_dense_left(token[0], self.rows, token[1]) * _dense_left(other[0], self.rows, other[1])).sum(-1)
            * (token[1] * other[1]).sum(-1)
            for token in tokens
            for other in tokens
        ]
        return overlaps, sum_of(squares)[:, 0]

    def combine(self, coefficients: Float[Tensor, "S"], workspace: Workspace | None = None) -> Float[Tensor, "o i"]:
        """Σ_s c_s G_s. The weighted factors are written to the workspace, where there is one."""
        workspace = Workspace() if workspace is None else workspace
        if self.formed is not None:
            flat = self.formed.flatten(1)
            return (coefficients.to(flat.dtype) @ flat).view(self.rows, self.columns)
        parts = []
        for left, right in self.pairs:
            weights = coefficients.to(right.dtype)[:, None, None]
            if left.is_floating_point():
                # The shorter of the two factors carries the coefficients.
                if self.rows < self.columns:
                    left = torch.mul(left, weights.to(left.dtype), out=workspace.take(left.shape, left))
                else:
                    right = torch.mul(right, weights, out=workspace.take(right.shape, right))
                parts.append(left.flatten(0, 1).T @ right.flatten(0, 1))
            else:
                rows = right.new_zeros(self.rows, self.columns)
                parts.append(rows.index_add_(0, left.flatten(), (right * weights).flatten(0, 1)))
        return sum_of(parts)


@dataclass(eq=False)
class VectorGradients:
    """Gradients of a bias (factor None) or of an elementwise scale: G_s = Σ_t g_st ∘ factor_st. Always formed."""

    output_gradients: list[Tensor] = field(default_factory=list)  # each (S, T, d)
    factors: list[Tensor | None] = field(default_factory=list)  # each (S, T, d), or None for 1
    formed: Tensor | None = None  # the G_s, (S, d), once they are made

    def add_use(self, output_gradients: Tensor, factors: Tensor | None) -> None:
        """One more use of the parameter in the forward pass."""
        self.output_gradients.append(output_gradients)
        self.factors.append(factors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""
        return self.output_gradients[0].dtype

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.output_gradients[0].shape[0]

    @property
    def size(self) -> int:
        """Entries of one G_s."""
        return self.output_gradients[0].shape[2]

    def of(self, place: slice) -> "VectorGradients":
        """Those of some of the sequences."""
        factors = [None if factor is None else factor[place] for factor in self.factors]
        return VectorGradients([gradients[place] for gradients in self.output_gradients], factors)

    def form(self) -> Tensor:
        """All G_s, `(S, d)`."""
        if self.formed is None:
            self.formed = sum_of(
                [
                    (gradients if factors is None else gradients * factors).sum(dim=1)
                    for gradients, factors in zip(self.output_gradients, self.factors, strict=True)
                ]
            )
        return self.formed

    def as_matrix(self, rows: int, columns: int) -> MatrixGradients:
        """The same gradients as those of a matrix `(rows, columns)`: all its rows were looked up once."""
        formed = self.form()
        every_row = torch.arange(rows, device=formed.device).expand(len(formed), rows)
        return MatrixGradients(rows, columns, [every_row], [formed.view(-1, rows, columns)])

    def gram(self) -> Tensor:
        """K, `(S, S)`."""
        return grams.inner_products(self.form())

    def squared_norms(self) -> Tensor:
        """‖G_s‖², `(S,)`."""
        return at_least_float32(self.form()).square().sum(dim=1)

    @property
    def num_terms(self) -> int:
        """How many vectors a G_s is the sum of."""
        return sum(gradients.shape[1] for gradients in self.output_gradients)

    def squared_sizes(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ_t ‖g_st ∘ factor_st‖², `(S,)`: about ‖G_s‖² if nothing cancelled. `measure`: see `squared_lengths`."""
        terms = [
            gradients if factors is None else gradients * factors
            for gradients, factors in zip(self.output_gradients, self.factors, strict=True)
        ]
        return sum_of([measure(term).sum(dim=1) for term in terms])

    def token_overlaps(self, sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """⟨G_s, g_n⟩ `(S, N)` and ‖g_n‖² `(N,)` for the tokens n = (sequence, position)."""
        tokens = sum_of(
            [
                _precise(gradients[sequences, positions])
                * (1.0 if factors is None else _precise(factors[sequences, positions]))
                for gradients, factors in zip(self.output_gradients, self.factors, strict=True)
            ]
        )
        return at_least_float32(self.form()) @ tokens.T, tokens.square().sum(dim=1)

    def combine(self, coefficients: Float[Tensor, "S"], workspace: Workspace | None = None) -> Float[Tensor, "d"]:
        """Σ_s c_s G_s. Nothing is written to the workspace."""
        formed = self.form()
        return coefficients.to(formed.dtype) @ formed


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum of a list that has at least one entry, without adding to the number 0 first."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def squared_lengths(vectors: Tensor) -> Tensor:
    """‖v_st‖², `(S, T)`. The norm reads the vectors once, and writes none of their squares."""
    return torch.linalg.vector_norm(at_least_float32(vectors), dim=2).square()


def _precise(factors: Tensor) -> Tensor:
    """Vectors in at least single precision; token indices as they are."""
    return at_least_float32(factors) if factors.is_floating_point() else factors


def _dense_left(left: Tensor, rows: int, like: Tensor) -> Tensor:
    """Left vectors as vectors: a one-hot vector is written out. `one_hot` would look at the largest index."""
    if left.is_floating_point():
        return left
    return (left.unsqueeze(-1) == torch.arange(rows, device=left.device)).to(like.dtype)
