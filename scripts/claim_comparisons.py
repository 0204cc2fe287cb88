"""Two things that were compared, as two numbers: those that decide, and how much is left until they turn around.

A comparison's *slack* is the distance between its sides over the larger of the two: 0.15 is 15 % left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
ASSERT_CLOSE = {"assert_allclose", "assert_close"}
# Relative and absolute tolerance where a call names none. For torch.testing.assert_close they depend on the dtype.
TOLERANCES = {"numpy": (1e-5, 1e-8), "torch": (1e-5, 1e-8), "math": (1e-9, 0.0), "numpy.testing": (1e-7, 0.0)}
TORCH_TESTING = {
    "float16": (1e-3, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
    "float32": (1.3e-6, 1e-5),
    "float64": (1e-7, 1e-7),
}


@dataclass
class Comparison:
    """Two numbers that were compared, and how much is left until the comparison would turn around."""

    text: str
    left: float
    sign: str
    right: float
    one_suffices: bool = False  # inside any(…) or `or`: the best counts, elsewhere the worst

    @property
    def distance(self) -> float:
        """How far apart the sides are, in the direction that is claimed."""
        return float(distances(np.array(self.left), self.sign, np.array(self.right)))

    @property
    def slack(self) -> float:
        """The distance over the larger side."""
        return float(slacks(np.array(self.left), self.sign, np.array(self.right)))


def distances(left: np.ndarray, sign: str, right: np.ndarray) -> np.ndarray:
    """How far apart the sides are, in the direction that is claimed; a comparison with NaN is lost by any distance."""
    with np.errstate(invalid="ignore"):
        difference = right - left if sign in ("<", "<=") else left - right
    lost = np.isnan(left) | np.isnan(right)
    return np.where(left == right, 0.0, np.where(lost, -np.inf, difference))  # also for two infinities


def slacks(left: np.ndarray, sign: str, right: np.ndarray) -> np.ndarray:
    """The distance over the larger side; its sign alone where that is 0 or infinite."""
    distance = distances(left, sign, right)
    larger = np.maximum(abs(left), abs(right))
    usable = (larger > 0) & (larger < np.inf)
    return np.where(usable, distance / np.where(usable, larger, 1.0), np.sign(distance))


def numbers(value: Any) -> np.ndarray | None:
    """The value as float64 numbers; None when it holds none."""
    if isinstance(value, str | bytes | set | frozenset | dict) or value is None:
        return None
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # lists of different lengths, tuples of tensors
        return None
    return array.astype(np.float64) if array.dtype.kind in "iuf" and array.size else None


def binding_entry(text: str, left: Any, sign: str, right: Any, one_suffices: bool) -> Comparison | None:
    """Of two arrays the entries that decide: the least slack, or the largest where one entry suffices."""
    lefts, rights = numbers(left), numbers(right)
    in_order = isinstance(left, list | tuple) and isinstance(right, list | tuple)  # their first difference decides
    if lefts is None or rights is None or in_order or sign not in OPPOSITE:
        return None
    try:
        lefts, rights = np.broadcast_arrays(lefts, rights)
    except ValueError:  # the comparison itself will say so
        return None
    slack = slacks(lefts, sign, rights)
    where = np.unravel_index(slack.argmax() if one_suffices else slack.argmin(), slack.shape)
    return Comparison(text, float(lefts[where]), sign, float(rights[where]), one_suffices)


def worst_error(function: Callable, args: tuple, kwargs: dict[str, Any]) -> float | None:
    """max |a − b| / (atol + rtol |b|): how much of its tolerance a call of allclose and its like has used."""
    left, right = numbers(args[0]), numbers(args[1])
    if left is None or right is None:
        return None
    family = (function.__module__ or "").split(".")[0] + (".testing" if function.__name__ in ASSERT_CLOSE else "")
    if family == "torch.testing":
        defaults = TORCH_TESTING.get(str(getattr(args[0], "dtype", "float64")).removeprefix("torch."), (0.0, 0.0))
    else:
        defaults = TOLERANCES.get(family, (1e-5, 1e-8))
    named = [*args[2:4], None, None]
    relative = next((x for x in (kwargs.get("rtol"), kwargs.get("rel_tol"), named[0]) if x is not None), defaults[0])
    absolute = next((x for x in (kwargs.get("atol"), kwargs.get("abs_tol"), named[1]) if x is not None), defaults[1])
    with np.errstate(all="ignore"):
        size = np.maximum(abs(left), abs(right)) if family == "math" else abs(right)
        error = abs(left - right) / (absolute + relative * size)
    return float(np.max(np.where((left == right) | (np.isnan(left) & np.isnan(right)), 0.0, error)))
