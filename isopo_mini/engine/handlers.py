"""What the engine knows about PyTorch's functions: each written in terms of the three uses of `layer_functions.py`.

Matrix products are in `product_handlers`, and what is made of them in `convolution_handlers`, `attention_handler` and
`recurrent_handlers`. Any other function goes to the fallback in `copies`. To save its copies, register one more. A norm
of channels, for example, is a gain and a shift of the last axis once the channels are there:

    @engine.register(F.instance_norm)
    def norm(input, weight=None, bias=None, **rest):
        channels_last = F.instance_norm(input).transpose(1, 2)                                # (S, T, channels)
        return engine.scale_and_shift(channels_last, weight, bias).transpose(1, 2)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine.layer_functions import scale_and_shift, shape_of, table_lookup
from isopo_mini.engine.stand_in import Copied, StandIn, register, slot_of


@register(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:  # each changes the gradient or the weight itself
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += shape_of(weight)[0]
    if isinstance(weight, StandIn) and _pairs_of_positions(input, weight):
        return weight.slot.layer.fallback.of_parameters_alone(F.embedding, input, weight, padding_idx)
    return table_lookup(input, weight, padding_idx)


@register(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    return scale_and_shift(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)


@register(F.rms_norm)
def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    return scale_and_shift(F.rms_norm(input, normalized_shape, None, eps), weight, None)


@register(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input: Any, other: Any) -> Any:
    inputs, scale = (other, input) if isinstance(input, StandIn) else (input, other)
    return scale_and_shift(inputs, scale, None) if _broadcasts_over_sequences(inputs, scale) else NotImplemented


@register(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    inputs, shift = (other, input) if isinstance(input, StandIn) else (input, other)
    handled = alpha == 1 and _broadcasts_over_sequences(inputs, shift)
    return scale_and_shift(inputs, None, shift) if handled else NotImplemented


@register(Tensor.__getitem__)
def _getitem(input: Any, index: Any) -> Any:
    """One entry of a stack of parameters, such as an expert's weight, is a parameter of its own."""
    if isinstance(index, Tensor) and index.ndim == 0 and index.dtype == torch.int64:
        index = int(index)
    slot = slot_of(input)
    if slot is None or type(index) is not int or len(shape_of(input)) < 2:
        return NotImplemented
    if not -len(slot.parameter) <= index < len(slot.parameter):
        raise IndexError(f"parameter '{slot.name}': expected an index below {len(slot.parameter)}")
    return StandIn.for_slot(slot.part(index))


def _broadcasts_over_sequences(inputs: Any, parameter: Tensor) -> bool:
    """Is this an activation `(S, …, *shape)` with a gain or bias of that shape, written out by hand?"""
    if not isinstance(inputs, Tensor) or isinstance(inputs, (StandIn, Copied)):
        return False
    shape = shape_of(parameter)
    return 0 < len(shape) < inputs.ndim and inputs.shape[-len(shape) :] == shape


def _pairs_of_positions(indices: Tensor, table: Tensor) -> bool:
    """Are these indices `(T, T')`, the same for all sequences, as those of relative positions are?"""
    slot = slot_of(table)
    if slot is None or indices.ndim < 2 or slot.layer.segments is not None or slot.layer.num_sequences is None:
        return False
    sequences = slot.layer.num_sequences
    if indices.ndim == 2 and sequences > 2 and indices.shape == (sequences, sequences):
        # Only the values can tell. What depends on i − j alone is the same all along the diagonals; tokens are not.
        along = torch.equal(indices[1:, 1:], indices[:-1, :-1])
        return along and not bool((indices == indices[0, 0]).all())
    return len(indices) not in (1, sequences)


def _keep_if_unchanged(function: Any) -> None:
    """`w.float()` of single precision is w itself, and so is its stand-in."""

    def handler(input: Any, *args: Any, **kwargs: Any) -> Any:
        slot = slot_of(input)
        if slot is None:
            return NotImplemented
        return input if function(slot.values, *args, **kwargs) is slot.values else NotImplemented

    register(function)(handler)


for _function in (Tensor.to, Tensor.float, Tensor.double, Tensor.type_as, Tensor.contiguous):
    _keep_if_unchanged(_function)
