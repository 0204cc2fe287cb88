"""Stand-ins for parameters, and the three autograd functions that their uses become.

Whatever a layer does with its parameters, it is one of three things: a matrix product, a table look-up, or an
elementwise scale and shift. `handlers.py` writes PyTorch's functions in terms of these three.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map


class UnhandledParameterError(ValueError):
    """A trainable parameter would get a gradient that ISOPO has not transformed."""

    def __init__(self, name: str, use: str) -> None:
        super().__init__(
            f"parameter '{name}': expected a use that a handler covers, got {use}; register a handler with "
            f"isopo_mini.geometry.layerwise.register, or freeze it with requires_grad_(False)"
        )


@runtime_checkable
class Layer(Protocol):
    """What a use reports to; see `layerwise._Layer`."""

    tape: "Tape | None"

    def expected_sequences(self, tensor: Tensor) -> int: ...
    def gate(self) -> Tensor: ...
    def add_matrix_use(self, slot: "Slot", left: Tensor, right: Tensor) -> None: ...
    def add_vector_use(self, slot: "Slot", output_gradients: Tensor, factors: Tensor | None) -> None: ...


class Slot:
    """A trainable parameter, its full name and its layer."""

    def __init__(self, name: str, parameter: nn.Parameter, layer: Layer) -> None:
        self.name = name
        self.parameter = parameter
        self.layer = layer
        self.values = parameter.detach()  # without a path to the parameter: that path is the gate

    def check_input(self, tensor: Tensor, axes: int) -> None:
        """The first axis must be the sequences, and at least `axes` axes must be there."""
        sequences = self.layer.expected_sequences(tensor)
        if tensor.ndim < axes or tensor.shape[0] != sequences:
            raise ValueError(
                f"parameter '{self.name}': expected an input whose first axis is the S={sequences} sequences, got "
                f"shape {tuple(tensor.shape)}; keep that axis through the model (for positions: expand them to (S, T))"
            )


class Tape:
    """Notes the outputs of all uses, for asking autograd afterwards for their gradients and for nothing else."""

    def __init__(self) -> None:
        self.edges: list[GradientEdge] = []
        self.reports: list[Callable[[Tensor], None]] = []

    def note(self, outputs: Tensor, report: Callable[[Tensor], None]) -> Tensor:
        """The same outputs, in a graph; `report` is what their gradient will be given to."""
        if not outputs.requires_grad:
            outputs = outputs.requires_grad_().clone()  # a leaf could not be changed in place by what follows
        self.edges.append(get_gradient_edge(outputs))
        self.reports.append(report)
        return outputs


class StandIn(Tensor):
    """Takes a parameter's place in its module and sends every use to its handler."""

    slot: Slot

    @classmethod
    def for_slot(cls, slot: Slot) -> "StandIn":
        """A stand-in that shares the memory of the parameter."""
        stand_in = slot.values.as_subclass(cls)
        stand_in.slot = slot
        return stand_in

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of `func` whenever an argument is a stand-in."""
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled():
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        real_args, real_kwargs = tree_map(_parameter_of, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            (name, *_) = [leaf.slot.name for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
            raise UnhandledParameterError(name, getattr(func, "__name__", str(func)))
        return result


HANDLERS: dict[Callable, Callable] = {}


def register(*functions: Callable) -> Callable[[Callable], Callable]:
    """Decorator: handle uses of trainable parameters by these PyTorch functions.

    The handler takes the function's own arguments, with stand-ins where parameters are, and returns its result by
    way of `matrix_product`, `table_lookup` and `scale_and_shift`. It may return `NotImplemented`.
    """

    def add(handler: Callable) -> Callable:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return add


# --- The three uses ------------------------------------------------------------------------------------------------


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


def _parameter_of(leaf: Any) -> Any:
    """The parameter behind a stand-in; anything else as it is."""
    return leaf.slot.parameter if isinstance(leaf, StandIn) else leaf


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
