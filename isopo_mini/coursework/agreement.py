"""What the tests of assignments say: whether a number or a tensor is the right one, and what is wrong if not."""

import math
from typing import Any

import torch
from torch import Tensor


def assert_agrees(got: Any, expected: Tensor | float, *, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Compare what a student's function returned with what is right.

    Args:
        got: of any type; a number where `expected` is a number, or a tensor of its shape.
        expected: what is right, in double precision.
        rtol: tolerated relative difference of an entry.
        atol: tolerated absolute difference.

    Raises:
        AssertionError: the two disagree; says how: no value, another type, another shape, not finite, other numbers.

    Example:
        >>> assert_agrees(torch.ones(2), torch.tensor([1.0, 1.0]))
        >>> assert_agrees([1.0, 1.0], torch.tensor([1.0, 1.0]))
        Traceback (most recent call last):
        ...
        AssertionError: expected a tensor of shape (2,), got a list
    """
    right = torch.as_tensor(expected, dtype=torch.float64)
    wanted = f"a tensor of shape {tuple(right.shape)}" if right.ndim else "a number"
    if got is None or got is ...:
        raise AssertionError(f"expected {wanted}, got nothing: is the function filled in, and does it return?")
    if isinstance(got, int | float) and not isinstance(got, bool) and right.ndim == 0:
        got = torch.tensor(got, dtype=torch.float64)
    if not isinstance(got, Tensor):
        raise AssertionError(f"expected {wanted}, got a {type(got).__name__}")
    if got.shape != right.shape:
        raise AssertionError(f"expected {wanted}, got one of shape {tuple(got.shape)}")
    precision = str(got.dtype).removeprefix("torch.")
    got = got.detach().to(torch.float64)
    if not torch.isfinite(got).all():
        raise AssertionError(f"expected finite numbers, got {int((~torch.isfinite(got)).sum())} that are not")
    difference = (got - right).abs()
    if (difference > atol + rtol * right.abs()).any():
        size = max(right.abs().max().item(), math.ulp(0.0))
        hint = f"; yours are of {precision}, and double precision (float64) is asked for"
        rounded = precision != "float64" and bool(difference.max() < 1e-3 * size)
        raise AssertionError(
            f"expected other numbers: the largest difference is {difference.max().item():.3g}, "
            f"where the largest right number is {size:.3g}{hint if rounded else ''}"
        )
