"""A convolution is a matrix product with patches. One in groups, such as Mamba's, goes to the fallback."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine.layer_functions import matrix_product, shape_of
from isopo_mini.engine.stand_in import Copied, StandIn, register


@register(F.conv1d, F.conv2d)
def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """`(S, C, W)` to `(S, O, W')`, or `(S, C, H, W)` to `(S, O, H', W')`."""
    kernel = tuple(shape_of(weight)[2:])
    if groups != 1 or isinstance(padding, str) or not _is_batch(input, 2 + len(kernel)):
        return NotImplemented
    stride, padding, dilation = (_for_each(given, len(kernel)) for given in (stride, padding, dilation))
    if len(kernel) == 1:  # a picture of one row
        picture, kernel = input.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    else:
        picture = input
    patches = F.unfold(picture, kernel, dilation=dilation, padding=padding, stride=stride)  # (S, C · kernel, H' · W')
    outputs = matrix_product(patches.transpose(1, 2), weight, bias).transpose(1, 2)  # (S, O, H' · W')
    size = picture.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1
    return outputs.unflatten(2, (size // stride[0] + 1, -1)) if input.ndim == 4 else outputs


def _is_batch(input: Any, axes: int) -> bool:
    return isinstance(input, Tensor) and not isinstance(input, (StandIn, Copied)) and input.ndim == axes


def _for_each(given: Any, axes: int) -> tuple[int, ...]:
    """A setting for each axis, where it may be one number for all."""
    return (given,) * axes if isinstance(given, int) else tuple(given)
