"""What the engine knows about PyTorch's functions: each written in terms of the three uses of `layer_functions.py`.

To teach it a new layer, register one more. A convolution, for example, is a matrix product with patches:

    @engine.register(F.conv1d)
    def convolution(input, weight, bias=None, *rest):                       # stride 1, no padding
        patches = input.unfold(2, weight.shape[2], 1).transpose(1, 2).flatten(2)     # (S, T, channels · width)
        return engine.matrix_product(patches, weight, bias).transpose(1, 2)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine.layer_functions import matrix_product, scale_and_shift, shape_of, table_lookup
from isopo_mini.engine.stand_in import StandIn, register


@register(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, StandIn) or len(shape_of(weight)) != 2:
        return NotImplemented
    return matrix_product(input, weight, bias)


@register(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:  # each changes the gradient or the weight itself
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += shape_of(weight)[0]
    return table_lookup(input, weight, padding_idx)


@register(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return scale_and_shift(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)


@register(F.rms_norm)
def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return scale_and_shift(F.rms_norm(input, normalized_shape, None, eps), weight, None)


@register(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input: Tensor, other: Tensor) -> Tensor:
    inputs, scale = (other, input) if isinstance(input, StandIn) else (input, other)
    return scale_and_shift(inputs, scale, None) if _broadcasts_over_sequences(inputs, scale) else NotImplemented


@register(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    inputs, shift = (other, input) if isinstance(input, StandIn) else (input, other)
    handled = alpha == 1 and _broadcasts_over_sequences(inputs, shift)
    return scale_and_shift(inputs, None, shift) if handled else NotImplemented


def _broadcasts_over_sequences(inputs: Any, parameter: Tensor) -> bool:
    """Is this an activation `(S, …, *shape)` with a gain or bias of that shape, written out by hand?"""
    if not isinstance(inputs, Tensor) or isinstance(inputs, StandIn):
        return False
    shape = shape_of(parameter)
    return 0 < len(shape) < inputs.ndim and inputs.shape[-len(shape) :] == shape
