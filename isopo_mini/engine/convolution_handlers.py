"""A convolution is a matrix product with patches. One in groups, such as Mamba's, goes to the fallback."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine.layer_functions import matrix_product, shape_of
from isopo_mini.engine.stand_in import Copied, StandIn, register

Pair = tuple[int, int]


@register(F.conv1d)
def _conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if groups != 1 or isinstance(padding, str) or not _is_batch(input, 3):
        return NotImplemented
    (width,) = shape_of(weight)[2:]
    settings = [(at_rest, *_several(given, 1)) for at_rest, given in ((1, stride), (0, padding), (1, dilation))]
    return _convolution(input.unsqueeze(2), weight, bias, (1, width), settings).squeeze(2)


@register(F.conv2d)
def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if groups != 1 or isinstance(padding, str) or not _is_batch(input, 4):
        return NotImplemented
    kernel = shape_of(weight)[2:]
    settings = [_several(given, 2) for given in (stride, padding, dilation)]
    return _convolution(input, weight, bias, tuple(kernel), settings)


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None, kernel: Any, settings: Any) -> Tensor:
    """`(S, C, H, W)` to `(S, O, H', W')`."""
    stride, padding, dilation = settings
    patches = F.unfold(input, kernel, dilation=dilation, padding=padding, stride=stride)  # (S, C · kernel, H' · W')
    outputs = matrix_product(patches.transpose(1, 2), weight, bias).transpose(1, 2)  # (S, O, H' · W')
    size = input.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1
    return outputs.unflatten(2, (size // stride[0] + 1, -1))


def _is_batch(input: Any, axes: int) -> bool:
    return isinstance(input, Tensor) and not isinstance(input, (StandIn, Copied)) and input.ndim == axes


def _several(given: Any, count: int) -> tuple[int, ...]:
    """A setting for each axis, where it may be one number for all."""
    return (given,) * count if isinstance(given, int) else tuple(given)
