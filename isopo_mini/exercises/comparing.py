"""What differs between an answer and what is right, and how values are shown to a reader."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Number, Real
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def difference(got: Any, expected: Any, rtol: float, atol: float) -> str:
    """What differs, in one line; empty when nothing does. Whole numbers, also inside of lists, must be equal."""
    if isinstance(expected, str):
        return "" if isinstance(got, str) and got == expected else "The answers are not the same."
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or got.keys() != expected.keys():
            return f"Expected the entries {shown(list(expected))}."
        return _first_difference(((key, got[key], value) for key, value in expected.items()), rtol, atol)
    if isinstance(expected, Sequence):
        if not isinstance(got, Sequence) or isinstance(got, str) or len(got) != len(expected):
            return f"Expected {len(expected)} entries."
        return _first_difference(zip(range(len(expected)), got, expected, strict=True), rtol, atol)
    if isinstance(expected, bool) and isinstance(got, bool):
        return "" if got == expected else "One is True, the other False."
    if isinstance(expected, Integral) and isinstance(got, Real):  # of any size, which no tensor would hold
        return "" if got == expected else "A whole number is right or wrong."
    try:
        if isinstance(expected, Number | np.generic | np.ndarray | Tensor):  # only the values count
            got, expected = as_tensor(got), as_tensor(expected)
            if not (expected.is_floating_point() or expected.is_complex()):
                rtol = atol = 0.0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False, equal_nan=True)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split("\n\n")[0].split())
    return ""


def _first_difference(entries: Iterable[tuple[Any, Any, Any]], rtol: float, atol: float) -> str:
    """What differs in the first of these entries (key, what came, what is right) that does."""
    for key, got, expected in entries:
        if differs := difference(got, expected, rtol, atol):
            return f"Entry {key!r}: {differs}"
    return ""


def as_tensor(value: Any) -> Tensor:
    """A tensor of these values; a Python number in the precision that Python gives it."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)


def shown(value: Any) -> str:
    """A value as a reader wants to see it: a case as its arguments, tensors with their shape, never too long."""
    if isinstance(value, tuple):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, FunctionType):  # without its address, which differs each time
        return f"the function {value.__name__}"
    text = " ".join(repr(value).split())
    text = text if len(text) <= 300 else f"{text[:300]} …"
    return f"{text} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else text
