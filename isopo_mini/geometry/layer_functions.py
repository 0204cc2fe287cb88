"""The three uses of a parameter, as autograd functions that keep the factors of its gradient.

Whatever a layer does with its parameters, it is one of three things: a matrix product, a table look-up, or an
elementwise scale and shift. `handlers.py` writes PyTorch's functions in terms of these three.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from isopo_mini.geometry.stand_in import Slot, StandIn, Tape


def matrix_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs Wᵀ + b, with inputs `(S, …, i)`. Weight and bias may be stand-ins or plain tensors.

    W is `(o, i)`; a weight with more axes, such as the kernel of a convolution, is read as `(o, everything else)`.
    """
    slots = _slots(weight, bias)
    for slot in slots:
        if slot is not None:
            slot.check_input(inputs, axes=2)
    if slots[0] is None and weight.requires_grad:  # a weight that was computed: its gradient is autograd's affair
        return scale_and_shift(F.linear(inputs, weight.flatten(1)), None, bias)
    tape = _tape(slots)
    if tape is not None:
        outputs = F.linear(inputs, _plain(weight).flatten(1), _plain(bias))
        return tape.note(outputs, partial(_report_matrix_product, slots, inputs.detach().to(outputs.dtype)))
    return _MatrixProduct.apply(slots, inputs, _plain(weight).flatten(1), _plain(bias), *_gates(slots))


def table_lookup(indices: Tensor, table: Tensor, padding_index: int | None = None) -> Tensor:
    """Rows of the table, for indices `(S, …)`. The row `padding_index` gets no gradient."""
    if not isinstance(table, StandIn):
        return F.embedding(indices, table, padding_index)
    table.slot.check_input(indices, axes=1)
    tape = _tape((table.slot,))
    if tape is not None:
        outputs = F.embedding(indices, _plain(table), padding_index)
        return tape.note(outputs, partial(_report_table_lookup, table.slot, indices, padding_index))
    return _TableLookup.apply(table.slot, indices, _plain(table), padding_index, table.slot.layer.gate())


def scale_and_shift(inputs: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """inputs ∘ scale + shift, with inputs `(S, …, *shape)` and scale and shift of that shape, or None."""
    slots = _slots(scale, shift)
    for slot in slots:
        if slot is not None:
            slot.check_input(inputs, axes=1 + slot.parameter.ndim)
    tape = _tape(slots)
    if tape is not None:
        outputs = _scaled_and_shifted(inputs, _plain(scale), _plain(shift))
        return tape.note(outputs, partial(_report_scale_and_shift, slots, inputs.detach()))
    return _ScaleAndShift.apply(slots, inputs, _plain(scale), _plain(shift), *_gates(slots))


class _MatrixProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, *gates: Tensor) -> Tensor:
        outputs = F.linear(inputs, weight, bias)  # autocast, when on, picks the precision here
        ctx.slots = slots
        ctx.save_for_backward(inputs.to(outputs.dtype), weight)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        _report_matrix_product(ctx.slots, inputs, output_gradients)
        input_gradients = None
        if ctx.needs_input_grad[1]:
            input_gradients = output_gradients @ weight.to(output_gradients.dtype)
        return None, input_gradients, None, None, *_no_gradients(ctx.slots)


class _TableLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slot: Any, indices: Tensor, table: Tensor, padding_index: int | None, gate: Tensor) -> Tensor:
        ctx.slot, ctx.padding_index = slot, padding_index
        ctx.save_for_backward(indices)
        return F.embedding(indices, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[None, ...]:
        (indices,) = ctx.saved_tensors
        _report_table_lookup(ctx.slot, indices, ctx.padding_index, output_gradients)
        return None, None, None, None, None


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slots: Any, inputs: Tensor, scale: Tensor | None, shift: Tensor | None, *gates: Tensor
    ) -> Tensor:
        ctx.slots = slots
        ctx.save_for_backward(inputs if slots[0] is not None else None, scale)
        return _scaled_and_shifted(inputs, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale = ctx.saved_tensors
        _report_scale_and_shift(ctx.slots, inputs, output_gradients)
        input_gradients = None
        if ctx.needs_input_grad[1]:
            input_gradients = output_gradients if scale is None else output_gradients * scale
        return None, input_gradients, None, None, *_no_gradients(ctx.slots)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of a tensor or stand-in. Asking a stand-in itself takes the long way round."""
    return tensor.slot.parameter.shape if isinstance(tensor, StandIn) else tensor.shape


def _scaled_and_shifted(inputs: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """inputs ∘ scale + shift."""
    if scale is None:
        return inputs if shift is None else inputs + shift
    return inputs * scale if shift is None else torch.addcmul(shift, inputs, scale)


# --- What backpropagation reports when it passes a use: the factors of the parameters' gradients --------------------


def _report_matrix_product(slots: tuple[Slot | None, ...], inputs: Tensor, output_gradients: Tensor) -> None:
    """dW_s = Σ_t g_st x_stᵀ, db_s = Σ_t g_st."""
    for_weight, for_bias = slots
    left = _positions(output_gradients, 1)
    if for_weight is not None:
        for_weight.layer.add_matrix_use(for_weight, left, _positions(inputs, 1))
    if for_bias is not None:
        for_bias.layer.add_vector_use(for_bias, left, None)


def _report_table_lookup(slot: Slot, indices: Tensor, padding_index: int | None, output_gradients: Tensor) -> None:
    """The row of each token gets the gradient at its output."""
    if padding_index is not None:
        output_gradients = output_gradients.masked_fill((indices == padding_index).unsqueeze(-1), 0.0)
    slot.layer.add_matrix_use(slot, indices.reshape(indices.shape[0], -1), _positions(output_gradients, 1))


def _report_scale_and_shift(slots: tuple[Slot | None, ...], inputs: Tensor | None, output_gradients: Tensor) -> None:
    """dγ_s = Σ_t g_st ∘ x_st, dβ_s = Σ_t g_st."""
    for_scale, for_shift = slots
    if for_scale is not None and inputs is not None:
        axes = for_scale.parameter.ndim
        for_scale.layer.add_vector_use(for_scale, _positions(output_gradients, axes), _positions(inputs, axes))
    if for_shift is not None:
        left = _positions(output_gradients, for_shift.parameter.ndim)
        for_shift.layer.add_vector_use(for_shift, left, None)


# --- Helpers -------------------------------------------------------------------------------------------------------


def _slots(*tensors: Tensor | None) -> tuple[Slot | None, ...]:
    """The slot of every stand-in, None for plain tensors."""
    return tuple(tensor.slot if isinstance(tensor, StandIn) else None for tensor in tensors)


def _tape(slots: tuple[Slot | None, ...]) -> Tape | None:
    """The tape of a use, where there is one."""
    for slot in slots:
        if slot is not None:
            return slot.layer.tape
    return None


def _plain(tensor: Any) -> Any:
    """The values of a stand-in; anything else as it is."""
    return tensor.slot.values if isinstance(tensor, StandIn) else tensor


def _gates(slots: tuple[Slot | None, ...]) -> list[Tensor]:
    """The gates of the slots that are there."""
    return [slot.layer.gate() for slot in slots if slot is not None]


def _no_gradients(slots: tuple[Slot | None, ...]) -> list[None]:
    """One None a gate: a gate is a dependency, not a number."""
    return [None for slot in slots if slot is not None]


def _positions(tensor: Tensor, feature_axes: int) -> Tensor:
    """`(S, …, *features)` as `(S, T, d)`: all axes in between are positions."""
    features = tensor.shape[tensor.ndim - feature_axes :].numel()
    return tensor.reshape(tensor.shape[0], -1, features)
