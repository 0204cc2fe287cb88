"""What backpropagation reports when it passes a use: the factors of the parameters' gradients, by sequence."""

from typing import NamedTuple

from torch import Tensor

from isopo_mini.engine.segments import Segments
from isopo_mini.engine.stand_in import Slot


class Use(NamedTuple):
    """One use of parameters: a weight and a bias, a scale and a shift, a table.

    Args:
        slots: of the parameters, None where there is none or a plain tensor.
        segments: whose the rows of the input are, where its first axis is not the sequences.
        transposed: is the weight `(i, o)` instead of `(o, i)`?
    """

    slots: tuple[Slot | None, ...]
    segments: Segments | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """Of its first parameter."""
        return next(slot.name for slot in self.slots if slot is not None)

    def positions(self, tensor: Tensor, feature_axes: int) -> Tensor:
        """`(S, …, *features)` as `(S, T, d)`: all axes in between are positions."""
        if self.segments is not None:
            return self.segments.by_sequence(tensor, feature_axes)
        if feature_axes == 1 and tensor.ndim == 3:  # as it is: a view is one call more
            return tensor
        features = tensor.shape[tensor.ndim - feature_axes :].numel()
        return tensor.reshape(tensor.shape[0], -1, features)


def matrix_product(use: Use, inputs: Tensor | None, output_gradients: Tensor) -> None:
    """dW_s = Σ_t g_st x_stᵀ, or its transpose; db_s = Σ_t g_st."""
    for_weight, for_bias = use.slots
    gradients = use.positions(output_gradients, 1)
    if for_weight is not None and inputs is not None:
        right = use.positions(inputs, 1)
        left, right = (right, gradients) if use.transposed else (gradients, right)
        for_weight.layer.add_matrix_use(for_weight, left, right)
    if for_bias is not None:
        for_bias.layer.add_vector_use(for_bias, gradients, None)


def table_lookup(use: Use, indices: Tensor, padding_index: int | None, output_gradients: Tensor) -> None:
    """The row of each token gets the gradient at its output."""
    (slot,) = use.slots
    assert slot is not None
    if padding_index is not None:
        output_gradients = output_gradients.masked_fill((indices == padding_index).unsqueeze(-1), 0.0)
    rows = use.positions(indices, 0).squeeze(-1).long()
    slot.layer.add_matrix_use(slot, rows, use.positions(output_gradients, 1))


def scale_and_shift(use: Use, inputs: Tensor | None, output_gradients: Tensor) -> None:
    """dγ_s = Σ_t g_st ∘ x_st, dβ_s = Σ_t g_st."""
    for_scale, for_shift = use.slots
    if for_scale is not None and inputs is not None:
        axes = for_scale.parameter.ndim
        for_scale.layer.add_vector_use(for_scale, use.positions(output_gradients, axes), use.positions(inputs, axes))
    if for_shift is not None:
        for_shift.layer.add_vector_use(for_shift, use.positions(output_gradients, for_shift.parameter.ndim), None)


def copies(use: Use, gradients: Tensor) -> None:
    """The gradients of the sequences, `(S, …)`, in full: one position each."""
    (slot,) = use.slots
    assert slot is not None
    slot.layer.add_vector_use(slot, gradients.reshape(gradients.shape[0], 1, -1), None)
