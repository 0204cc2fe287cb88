"""Numbers that leave their range: what has to happen before a sum, a square or an exponential, not after it.

Half precision counts to 2,048 (float16) or 256 (bfloat16) and stops; a square overflows single precision from 2e19 on
and vanishes below 1e-23. So what comes in half precision is computed, and returned, in single precision; a norm divides
by the largest entry first; and what does not fit is an error and not an infinity.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or in single precision if it is in half. Differentiable."""
    if tensor.dtype in (torch.float32, torch.float64):  # `to` would find that out ten times slower
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The smallest dtype that holds all of them, at least single precision."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def euclidean_norm(tensor: Tensor, dim: int, *, mean: bool = False) -> Tensor:
    """√Σx² along one axis, or √(mean of x²), in at least single precision. It overflows only where the norm does."""
    tensor = at_least_float32(tensor)
    largest = tensor.abs().amax(dim=dim, keepdim=True)
    # A row of zeros is divided by the smallest normal number, which leaves it zero.
    squares = (tensor / largest.clamp_min(torch.finfo(tensor.dtype).tiny)).square()
    norm = (squares.mean(dim=dim) if mean else squares.sum(dim=dim)).sqrt()
    return largest.squeeze(dim) * norm


def largest_exponent(dtype: torch.dtype) -> float:
    """The largest x whose eˣ is a finite number of this dtype: 88.7 for float32, 709.7 for float64."""
    # One step towards zero, so that the exponential of the rounded number does not overflow either.
    return math.log(torch.finfo(dtype).max) * (1 - torch.finfo(dtype).eps)


class DoesNotFit(FloatingPointError, ValueError):
    """A number that was computed does not fit its dtype. In training it means that the run has diverged."""


def require_fits(name: str, result: Tensor) -> Tensor:
    """The result itself, after a look at whether it is finite. `name` says what was computed, and from what.

    Raises:
        DoesNotFit: an entry does not fit the dtype; it is a ValueError.
    """
    finite = torch.isfinite(result)
    if not finite.all():
        index = tuple(torch.nonzero(~finite)[0].tolist())
        kind = str(result.dtype).removeprefix("torch.")
        raise DoesNotFit(f"{name}: expected numbers that fit {kind}, got {result[index].item()} at index {index}")
    return result
