"""`check`: run a reader's function against the reference on a few cases and say what differs."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    cases: Iterable[tuple[Any, ...]],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> bool | None:
    """Print whether `function` agrees with `reference` on every case, or the first case where it does not.

    Nothing is ever raised because of what the function does, so a page with unfilled exercises still builds. Whole
    numbers are equal or not, alone, in lists, tuples and dicts, and in tensors and arrays of integers; the tolerances
    are for all others. Which of the two a number is, the reference decides.

    Args:
        function: what the reader wrote. Returning None or raising NotImplementedError means: not filled in yet.
        reference: what is right.
        cases: the arguments of each case, as a tuple. Both functions get their own copy.
        rtol: tolerated relative difference of numbers and of tensor entries.
        atol: tolerated absolute difference.

    Returns:
        True when all cases agree. None otherwise, so that a notebook shows the printed line and nothing below it.

    Raises:
        ValueError: there are no cases, which would pass everything.

    Example:
        >>> check(lambda x: 2 * x, lambda x: x + x, [(1.0,), (-3.0,)])
        <lambda>: passed, 2 of 2 cases.
        True
    """
    cases = list(cases)
    if not cases:
        raise ValueError("cases: expected at least one, got none")
    name = getattr(function, "__name__", "your function")
    for number, case in enumerate(cases, start=1):
        expected = reference(*copy.deepcopy(case))
        try:
            got = function(*copy.deepcopy(case))
        except NotImplementedError:
            got = None
        except (Exception, SystemExit) as error:
            print(f"{name}: case {number} of {len(cases)} raised {type(error).__name__}: {error}")
            print(f"  input:    {_shown(case)}")
            return None
        if got is None and expected is not None:
            print(f"{name}: not filled in yet.")
            return None
        difference = _difference(got, expected, rtol, atol)
        if difference:
            print(f"{name}: case {number} of {len(cases)} differs. {difference}")
            print(f"  input:    {_shown(case)}\n  expected: {_shown(expected)}\n  got:      {_shown(got)}")
            return None
    print(f"{name}: passed, {len(cases)} of {len(cases)} cases.")
    return True


def _difference(got: Any, expected: Any, rtol: float, atol: float) -> str:
    """What differs, in one line; empty when nothing does."""
    if isinstance(expected, str):
        return "" if got == expected else "The answers are not the same."
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or got.keys() != expected.keys():
            return f"Expected the entries {_shown(list(expected))}."
        return _first_difference(((key, got[key], value) for key, value in expected.items()), rtol, atol)
    if isinstance(expected, Sequence):
        if not isinstance(got, Sequence) or isinstance(got, str) or len(got) != len(expected):
            return f"Expected {len(expected)} entries."
        return _first_difference(zip(range(len(expected)), got, expected, strict=True), rtol, atol)
    if isinstance(expected, Integral) and isinstance(got, Real):  # of any size, which no tensor would hold
        return "" if got == expected else "A whole number is right or wrong."
    try:
        if isinstance(expected, Number | np.generic | np.ndarray | Tensor):  # only the values count
            got, expected = _as_tensor(got), _as_tensor(expected)
            if not (expected.is_floating_point() or expected.is_complex()):
                rtol = atol = 0.0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False, equal_nan=True)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split("\n\n")[0].split())
    return ""


def _first_difference(entries: Iterable[tuple[Any, Any, Any]], rtol: float, atol: float) -> str:
    """What differs in the first of these entries (key, what came, what is right) that does."""
    for key, got, expected in entries:
        if difference := _difference(got, expected, rtol, atol):
            return f"Entry {key!r}: {difference}"
    return ""


def _as_tensor(value: Any) -> Tensor:
    """A tensor of these values; a Python number in the precision that Python gives it."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)


def _shown(value: Any) -> str:
    """A value as a reader wants to see it: a case as its arguments, tensors with their shape, never too long."""
    if isinstance(value, tuple):
        return ", ".join(_shown(item) for item in value)
    text = " ".join(repr(value).split())
    text = text if len(text) <= 300 else f"{text[:300]} …"
    return f"{text} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else text
