"""What a wrong answer looks like: a known mistake of the exercise, or a slip that is made everywhere."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from isopo_mini.exercises.comparing import as_tensor, difference

Case = tuple[Any, ...]


def outcomes(function: Callable[..., Any], cases: Sequence[Case]) -> list[Any]:
    """What the function returns for each case, or the exception that it raises. It gets copies."""
    found: list[Any] = []
    for case in cases:
        try:
            found.append(function(*copy.deepcopy(case)))
        except (Exception, SystemExit) as error:  # `exit()` must not end the page
            found.append(error)
    return found


def hint(
    answers: Sequence[Any],
    expected: Sequence[Any],
    known: Mapping[str, Sequence[Any]],
    rtol: float,
    atol: float,
) -> str:
    """The hint of the mistake whose answers these are, in every case; empty where none is known.

    Args:
        answers: what the reader's function made of every case, exceptions included.
        expected: what is right.
        known: from each hint to the answers of the mistake that it is about.
        rtol: tolerated relative difference between two answers that count as the same.
        atol: tolerated absolute difference.
    """
    for said, wrong in known.items():
        if all(_alike(*pair, rtol, atol) for pair in zip(answers, wrong, strict=True)):
            return said
    return _slip(answers, expected, rtol, atol)


def _alike(answer: Any, wrong: Any, rtol: float, atol: float) -> bool:
    """Whether two outcomes are the same: two values, or two errors of one kind."""
    if isinstance(answer, BaseException) or isinstance(wrong, BaseException):
        return type(answer) is type(wrong)
    return not difference(answer, wrong, rtol, atol)


def _slip(answers: Sequence[Any], expected: Sequence[Any], rtol: float, atol: float) -> str:
    """A slip that needs no knowledge of the exercise: zeros, nan, the sign, a factor, the transpose, the shape."""
    try:
        got = [tensor for answer in answers for tensor in _tensors(answer)]
        right = [tensor for answer in expected for tensor in _tensors(answer)]
    except (TypeError, ValueError, RuntimeError):
        return ""
    if not got or len(got) != len(right):
        return ""
    if any(tensor.isnan().any() for tensor in got) and not any(tensor.isnan().any() for tensor in right):
        return "Some numbers are nan: 0/0, or the logarithm or root of a negative number."
    if all((tensor == 0).all() for tensor in got):
        return "Every number is zero."

    def same(change: Callable[[Tensor], Tensor]) -> bool:
        pairs = zip(got, right, strict=True)
        return not any(difference(answer, change(tensor), rtol, atol) for answer, tensor in pairs)

    if same(torch.neg):
        return "The numbers are right but for their sign."
    if all(tensor.ndim >= 2 for tensor in right) and same(lambda tensor: tensor.mT):
        return "This is the transpose of what is right."
    if all(one.numel() == other.numel() for one, other in zip(got, right, strict=True)):
        got = [one.reshape(other.shape) for one, other in zip(got, right, strict=True)]
        if same(lambda tensor: tensor):
            return "The numbers are right, their shape is not."
    return _factor(got, right, rtol, atol)


def _factor(got: list[Tensor], right: list[Tensor], rtol: float, atol: float) -> str:
    """Whether every number is off by one factor, or those of a case by one; numbers of one entry show no factor."""
    factors = []
    for answer, tensor in zip(got, right, strict=True):
        if answer.shape != tensor.shape or tensor.numel() < 2:
            return ""
        factor = (answer * tensor).sum() / tensor.square().sum()
        if not factor.isfinite() or difference(answer, factor * tensor, rtol, atol):
            return ""
        factors.append(factor.item())
    if max(factors) - min(factors) <= rtol * abs(factors[0]):
        return f"Every number is {factors[0]:.4g} times what it should be."
    listed = ", ".join(f"{factor:.4g}" for factor in factors)
    return f"The numbers are right but for a factor of their case, {listed}: a sum in the place of a mean?"


def _tensors(answer: Any) -> list[Tensor]:
    """All numbers of an answer, in double precision."""
    if isinstance(answer, BaseException | str):
        raise TypeError("no numbers")
    if isinstance(answer, Mapping):
        return [tensor for value in answer.values() for tensor in _tensors(value)]
    if isinstance(answer, list | tuple):
        return [tensor for value in answer for tensor in _tensors(value)]
    tensor = as_tensor(answer).detach()
    if tensor.is_complex():
        raise TypeError("complex numbers are not compared here")
    return [tensor.double()]
