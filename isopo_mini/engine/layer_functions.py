"""The three uses of a parameter, as autograd functions that keep the factors of its gradient.

Whatever a layer does with its parameters, it is one of three things: a matrix product, a table look-up, or an
elementwise scale and shift. `handlers.py` writes PyTorch's functions in terms of these three.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from isopo_mini.engine.in_place import Unchanged, not_a_view, saved_tensors
from isopo_mini.engine.sequence_axis import RowsOfSequences
from isopo_mini.engine.stand_in import Slot, StandIn, Tape, slot_of


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
        kept = inputs.detach().to(outputs.dtype)
        report = partial(_report_matrix_product, slots, kept)
        return tape.note(outputs, report if slots[0] is None else _if_unchanged(slots, kept, report))
    return _MatrixProduct.apply(slots, inputs, _plain(weight).flatten(1), _plain(bias), *_gates(slots))


def table_lookup(indices: Tensor, table: Tensor, padding_index: int | None = None) -> Tensor:
    """Rows of the table, for indices `(S, …)`. The row `padding_index` gets no gradient."""
    slot = slot_of(table)
    if slot is None:
        return F.embedding(indices, table, padding_index)
    slot.check_input(indices, axes=1)
    tape = slot.layer.tape
    if tape is None:
        rows = _TableLookup.apply((slot,), indices, slot.values, padding_index, slot.layer.gate())
    else:
        report = partial(_report_table_lookup, slot, indices, padding_index)
        rows = tape.note(F.embedding(indices, slot.values, padding_index), _if_unchanged((slot,), indices, report))
    return RowsOfSequences.of(rows, slot.name) if indices.ndim == 1 else rows


def scale_and_shift(inputs: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """inputs ∘ scale + shift, with inputs `(S, …, *shape)` and scale and shift of that shape, or None."""
    slots = _slots(scale, shift)
    for slot in slots:
        if slot is not None:
            slot.check_input(inputs, axes=1 + slot.parameter.ndim)
    tape = _tape(slots)
    if tape is not None:
        outputs, kept = _scaled_and_shifted(inputs, _plain(scale), _plain(shift)), inputs.detach()
        report = partial(_report_scale_and_shift, slots, kept)
        return tape.note(outputs, report if slots[0] is None else _if_unchanged(slots, kept, report))
    return _ScaleAndShift.apply(slots, inputs, _plain(scale), _plain(shift), *_gates(slots))


class _MatrixProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, *gates: Tensor) -> Tensor:
        outputs = F.linear(inputs, weight, bias)  # autocast, when on, picks the precision here
        _start_use(ctx, slots)
        ctx.save_for_backward(
            inputs.to(outputs.dtype) if slots[0] is not None else None, weight if ctx.needs_input_grad[1] else None
        )
        return not_a_view(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = _end_use(ctx)
        _report_matrix_product(ctx.slots, inputs, output_gradients)
        input_gradients = None
        if ctx.needs_input_grad[1]:
            input_gradients = output_gradients @ weight.to(output_gradients.dtype)
        return None, input_gradients, None, None, *_no_gradients(ctx.slots)


class _TableLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slots: Any, indices: Tensor, table: Tensor, padding_index: int | None, gate: Tensor
    ) -> Tensor:
        _start_use(ctx, slots)
        ctx.padding_index = padding_index
        ctx.save_for_backward(indices)
        return not_a_view(F.embedding(indices, table))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[None, ...]:
        (indices,) = _end_use(ctx)
        _report_table_lookup(ctx.slots[0], indices, ctx.padding_index, output_gradients)
        return None, None, None, None, None


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slots: Any, inputs: Tensor, scale: Tensor | None, shift: Tensor | None, *gates: Tensor
    ) -> Tensor:
        _start_use(ctx, slots)
        ctx.save_for_backward(inputs if slots[0] is not None else None, scale if ctx.needs_input_grad[1] else None)
        return not_a_view(_scaled_and_shifted(inputs, scale, shift))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale = _end_use(ctx)
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


# --- What a use keeps until backpropagation comes by, and what it is asked then ------------------------------------


def _start_use(ctx: Any, slots: tuple[Slot | None, ...]) -> None:
    """Note what a use is of, and whether it is made by recomputing inside of a backward pass."""
    ctx.slots = slots
    ctx.recomputed = torch._C._current_graph_task_id() != -1


def _end_use(ctx: Any) -> tuple[Any, ...]:
    """What the use saved, if it is still what it was, and if this is the backward pass that it belongs to.

    A checkpoint without re-entry recomputes for the saved tensors only. A re-entrant one runs a backward pass of its
    own through what it recomputed; the layer's other uses are not in it, so that no gate could wait for them all.
    """
    name = _name_of(ctx.slots)
    if ctx.recomputed:
        raise RuntimeError(
            f"parameter '{name}': expected one backward pass through all uses of its layer, got a use that was "
            f"recomputed inside of another one; checkpoint with use_reentrant=False"
        )
    return saved_tensors(ctx, name)


def _if_unchanged(
    slots: tuple[Slot | None, ...], kept: Tensor, report: Callable[[Tensor], None]
) -> Callable[[Tensor], None]:
    """The report, after a look at whether what it holds on to was changed in the meantime."""
    unchanged = Unchanged(_name_of(slots), kept)

    def checked(output_gradients: Tensor) -> None:
        unchanged.check()
        report(output_gradients)

    return checked


def _name_of(slots: tuple[Slot | None, ...]) -> str:
    """The name of the first parameter of a use."""
    return next(slot.name for slot in slots if slot is not None)


# --- What backpropagation reports when it passes a use: the factors of the parameters' gradients --------------------


def _report_matrix_product(slots: tuple[Slot | None, ...], inputs: Tensor | None, output_gradients: Tensor) -> None:
    """dW_s = Σ_t g_st x_stᵀ, db_s = Σ_t g_st."""
    for_weight, for_bias = slots
    left = _positions(output_gradients, 1)
    if for_weight is not None and inputs is not None:
        for_weight.layer.add_matrix_use(for_weight, left, _positions(inputs, 1))
    if for_bias is not None:
        for_bias.layer.add_vector_use(for_bias, left, None)


def _report_table_lookup(slot: Slot, indices: Tensor, padding_index: int | None, output_gradients: Tensor) -> None:
    """The row of each token gets the gradient at its output."""
    if padding_index is not None:
        output_gradients = output_gradients.masked_fill((indices == padding_index).unsqueeze(-1), 0.0)
    slot.layer.add_matrix_use(slot, indices.reshape(indices.shape[0], -1).long(), _positions(output_gradients, 1))


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
    return tuple(slot_of(tensor) for tensor in tensors)


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
