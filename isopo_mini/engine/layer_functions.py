"""The uses of a parameter, as autograd functions that keep the factors of its gradient.

Whatever a layer does with its parameters, it is one of three things: a matrix product, a table look-up, or an
elementwise scale and shift. `handlers.py` writes PyTorch's functions in terms of these three. For the rest there is a
copy for each sequence; see `copies.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from isopo_mini.engine import reports
from isopo_mini.engine.in_place import Unchanged, not_a_view, saved_tensors
from isopo_mini.engine.reports import Use
from isopo_mini.engine.segments import Segments, remember
from isopo_mini.engine.sequence_axis import RowsOfSequences
from isopo_mini.engine.stand_in import Slot, StandIn, Tape, slot_of


def matrix_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """inputs Wᵀ + b, with inputs `(S, …, i)`. Weight and bias may be stand-ins or plain tensors.

    W is `(o, i)`; a weight with more axes, such as the kernel of a convolution, is read as `(o, everything else)`.
    With `transposed` it is inputs W + b, and W is `(i, o)`.
    """
    slots = _slots(weight, bias)
    use = Use(slots, _segments(slots, inputs, [2, 2]), transposed)
    matrix = values_of(weight).T if transposed else values_of(weight).flatten(1)
    if slots[0] is None and weight.requires_grad:  # a weight that was computed: its gradient is autograd's affair
        return scale_and_shift(F.linear(inputs, matrix), None, bias)
    tape = _tape(slots)
    if tape is not None:
        outputs = F.linear(inputs, matrix, values_of(bias))
        kept = inputs.detach().to(outputs.dtype)
        report = partial(reports.matrix_product, use, kept)
        outputs = tape.note(outputs, report if slots[0] is None else _if_unchanged(use, kept, report))
    else:
        outputs = _MatrixProduct.apply(use, inputs, matrix, values_of(bias), *_gates(slots))
    return remember(outputs, use.segments)


def table_lookup(indices: Tensor, table: Tensor, padding_index: int | None = None) -> Tensor:
    """Rows of the table, for indices `(S, …)`. The row `padding_index` gets no gradient.

    Indices `(1, …)` are the same for all sequences and looked up for each, as positions are.
    """
    slot = slot_of(table)
    if slot is None:
        return F.embedding(indices, table, padding_index)
    sequences = slot.layer.num_sequences
    if indices.ndim > 1 and len(indices) == 1 and sequences is not None and slot.layer.segments is None:
        indices = indices.expand(sequences, *indices.shape[1:])
    use = Use((slot,), slot.check_input(indices, axes=1))
    tape = slot.layer.tape
    if tape is None:
        rows = _TableLookup.apply(use, indices, slot.values, padding_index, slot.layer.gate())
    else:
        report = partial(reports.table_lookup, use, indices, padding_index)
        rows = tape.note(F.embedding(indices, slot.values, padding_index), _if_unchanged(use, indices, report))
    if indices.ndim == 1 and use.segments is None:
        return RowsOfSequences.of(rows, slot.name)
    return remember(rows, use.segments)


def scale_and_shift(inputs: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """inputs ∘ scale + shift, with inputs `(S, …, *shape)` and scale and shift of that shape, or None."""
    slots = _slots(scale, shift)
    use = Use(slots, _segments(slots, inputs, [1 + slot.parameter.ndim if slot else 0 for slot in slots]))
    tape = _tape(slots)
    if tape is not None:
        outputs, kept = _scaled_and_shifted(inputs, values_of(scale), values_of(shift)), inputs.detach()
        report = partial(reports.scale_and_shift, use, kept)
        outputs = tape.note(outputs, report if slots[0] is None else _if_unchanged(use, kept, report))
    else:
        outputs = _ScaleAndShift.apply(use, inputs, values_of(scale), values_of(shift), *_gates(slots))
    return remember(outputs, use.segments)


def copies_of(slot: Slot, sequences: int) -> Tensor:
    """One copy of a parameter a sequence, `(S, …)`, all in the same memory. The gradient at copy s is G_s."""
    use, shape = Use((slot,)), (sequences, *slot.parameter.shape)
    tape = slot.layer.tape
    if tape is not None:
        return tape.note(slot.values.expand(shape), partial(reports.copies, use))
    return cast(Tensor, _Copies.apply(use, slot.values, shape, slot.layer.gate()))


class _MatrixProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, use: Use, inputs: Tensor, weight: Tensor, bias: Tensor | None, *gates: Tensor) -> Tensor:
        outputs = F.linear(inputs, weight, bias)  # autocast, when on, picks the precision here
        _start_use(ctx, use)
        ctx.save_for_backward(
            inputs.to(outputs.dtype) if use.slots[0] is not None else None, weight if ctx.needs_input_grad[1] else None
        )
        return not_a_view(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = _end_use(ctx)
        reports.matrix_product(ctx.use, inputs, output_gradients)
        input_gradients = None
        if ctx.needs_input_grad[1]:
            input_gradients = output_gradients @ weight.to(output_gradients.dtype)
        return None, input_gradients, None, None, *_no_gradients(ctx.use.slots)


class _TableLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, use: Use, indices: Tensor, table: Tensor, padding_index: int | None, gate: Tensor) -> Tensor:
        _start_use(ctx, use)
        ctx.padding_index = padding_index
        ctx.save_for_backward(indices)
        return not_a_view(F.embedding(indices, table))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[None, ...]:
        (indices,) = _end_use(ctx)
        reports.table_lookup(ctx.use, indices, ctx.padding_index, output_gradients)
        return None, None, None, None, None


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, use: Use, inputs: Tensor, scale: Tensor | None, shift: Tensor | None, *gates: Tensor
    ) -> Tensor:
        _start_use(ctx, use)
        ctx.save_for_backward(inputs if use.slots[0] is not None else None, scale if ctx.needs_input_grad[1] else None)
        return not_a_view(_scaled_and_shifted(inputs, scale, shift))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale = _end_use(ctx)
        reports.scale_and_shift(ctx.use, inputs, output_gradients)
        input_gradients = None
        if ctx.needs_input_grad[1]:
            input_gradients = output_gradients if scale is None else output_gradients * scale
        return None, input_gradients, None, None, *_no_gradients(ctx.use.slots)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, use: Use, values: Tensor, shape: tuple[int, ...], gate: Tensor) -> Tensor:
        _start_use(ctx, use)
        return values.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[None, ...]:
        _end_use(ctx)
        reports.copies(ctx.use, gradients)
        return None, None, None, None


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of a tensor or stand-in. Asking a stand-in itself takes the long way round."""
    return tensor.slot.parameter.shape if isinstance(tensor, StandIn) else tensor.shape


def values_of(tensor: Any) -> Any:
    """The values of a stand-in; anything else as it is."""
    return tensor.slot.values if isinstance(tensor, StandIn) else tensor


def _scaled_and_shifted(inputs: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """inputs ∘ scale + shift."""
    if scale is None:
        return inputs if shift is None else inputs + shift
    return inputs * scale if shift is None else torch.addcmul(shift, inputs, scale)


# --- What a use keeps until backpropagation comes by, and what it is asked then ------------------------------------


def _start_use(ctx: Any, use: Use) -> None:
    """Note what a use is of, and whether it is made by recomputing inside of a backward pass."""
    ctx.use = use
    ctx.recomputed = torch._C._current_graph_task_id() != -1


def _end_use(ctx: Any) -> tuple[Any, ...]:
    """What the use saved, if it is still what it was, and if this is the backward pass that it belongs to.

    A checkpoint without re-entry recomputes for the saved tensors only. A re-entrant one runs a backward pass of its
    own through what it recomputed; the layer's other uses are not in it, so that no gate could wait for them all.
    """
    name = ctx.use.name
    if ctx.recomputed:
        raise RuntimeError(
            f"parameter '{name}': expected one backward pass through all uses of its layer, got a use that was "
            f"recomputed inside of another one; checkpoint with use_reentrant=False"
        )
    return saved_tensors(ctx, name)


def _if_unchanged(use: Use, kept: Tensor, report: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The report, after a look at whether what it holds on to was changed in the meantime."""
    unchanged = Unchanged(use.name, kept)

    def checked(output_gradients: Tensor) -> None:
        unchanged.check()
        report(output_gradients)

    return checked


# --- Helpers -------------------------------------------------------------------------------------------------------


def _slots(*tensors: Tensor | None) -> tuple[Slot | None, ...]:
    """The slot of every stand-in, None for plain tensors."""
    return tuple(slot_of(tensor) for tensor in tensors)


def _segments(slots: tuple[Slot | None, ...], inputs: Tensor, axes: list[int]) -> Segments | None:
    """Whose the rows of the inputs are, after a look at whether the axes are there that each parameter needs."""
    segments = None
    for slot, needed in zip(slots, axes, strict=True):
        if slot is not None and segments is None:
            segments = slot.check_input(inputs, needed)
    return segments


def _tape(slots: tuple[Slot | None, ...]) -> Tape | None:
    """The tape of a use, where there is one."""
    for slot in slots:
        if slot is not None:
            return slot.layer.tape
    return None


def _gates(slots: tuple[Slot | None, ...]) -> list[Tensor]:
    """The gates of the slots that are there."""
    return [slot.layer.gate() for slot in slots if slot is not None]


def _no_gradients(slots: tuple[Slot | None, ...]) -> list[None]:
    """One None a gate: a gate is a dependency, not a number."""
    return [None for slot in slots if slot is not None]
