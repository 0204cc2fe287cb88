"""Every test checks every shape, also of functions that are defined inside of others, whose checks are written once."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker_of_the_tests import check
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from isopo_mini.geometry.isopo import ntk_coefficients


def scaled_by(factor: float, checker: Callable[..., Any] = check) -> Callable[..., Any]:
    """A function inside of a function, as the hook leaves it."""

    @jaxtyped(typechecker=checker)
    def scaled(values: Float[Tensor, "2 N"]) -> Float[Tensor, "N"]:
        return factor * values[0]

    return scaled


def of_type(hint: type) -> Callable[..., Any]:
    """One definition, whose hint differs from call to call."""

    @jaxtyped(typechecker=check)
    def same(value: hint) -> Any:
        return value

    return same


def test_of_the_library() -> None:
    with pytest.raises(TypeCheckError, match="ntk_coefficients"):
        ntk_coefficients(torch.eye(3), torch.ones(2), damping=1.0)


def test_at_every_definition_for_the_function_that_is_defined_then() -> None:
    for factor in (1.0, 2.0):
        scaled = scaled_by(factor)
        assert scaled(torch.ones(2, 3)).tolist() == [factor] * 3
        with pytest.raises(TypeCheckError, match="scaled"):
            scaled(torch.ones(3, 3))


def test_a_check_is_written_once() -> None:
    written = []

    def noted(signature: Callable[..., Any]) -> Callable[..., Any]:
        written.append(check(signature))
        return written[-1]

    for factor in (1.0, 2.0, 3.0):
        scaled_by(factor, noted)
    assert len(written) == 6  # of the arguments, and with what is returned
    assert len(set(written)) == 2


def test_other_hints_get_another_check() -> None:
    number, word = of_type(int), of_type(str)
    assert (number(1), word("one")) == (1, "one")
    for function, value in ((number, "one"), (word, 1)):
        with pytest.raises(TypeCheckError):
            function(value)


def test_a_check_keeps_no_default_alive() -> None:
    def holding(held: Tensor) -> Callable[..., Any]:
        @jaxtyped(typechecker=check)
        def kept(value: int, held: Tensor = held) -> Tensor:
            return value * held

        return kept

    held = torch.ones(2)
    function, alive = holding(held), weakref.ref(held)
    assert function(2).tolist() == [2.0, 2.0]
    del held, function
    gc.collect()
    assert alive() is None
