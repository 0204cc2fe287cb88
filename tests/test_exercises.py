"""The checker of exercises: it passes what is right, names what is wrong, and never stops a page from building."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from isopo_mini.exercises import check

CASES = [(torch.tensor([1.0, 2.0]), 3.0), (torch.tensor([-1.0, 0.5]), 2.0)]


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def test_a_right_answer_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda x, factor: factor * x, scaled, CASES) is True
    assert capsys.readouterr().out == "<lambda>: passed, 2 of 2 cases.\n"


def test_a_wrong_answer_is_shown_with_the_first_case_that_differs(capsys: pytest.CaptureFixture[str]) -> None:
    def forgets_the_sign(x: Tensor, factor: float) -> Tensor:
        return x.abs() * factor

    assert check(forgets_the_sign, scaled, CASES) is None
    out = capsys.readouterr().out
    assert out.startswith("forgets_the_sign: case 2 of 2 differs.")
    assert "input:    tensor([-1.0000, 0.5000]) of shape (2,), 2.0" in out
    assert "expected: tensor([-2., 1.]) of shape (2,)" in out
    assert "got:      tensor([2., 1.]) of shape (2,)" in out


def test_a_shape_that_would_broadcast_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda x, factor: (x * factor)[:, None], scaled, CASES) is None
    assert "torch.Size([2, 1]) != torch.Size([2])" in capsys.readouterr().out


def test_an_unfilled_stub_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(x: Tensor, factor: float) -> Tensor:
        raise NotImplementedError

    def returns_nothing(x: Tensor, factor: float) -> None: ...

    for stub in (raises, returns_nothing):
        assert check(stub, scaled, CASES) is None
        assert capsys.readouterr().out == f"{stub.__name__}: not filled in yet.\n"


def test_an_error_is_reported_and_not_raised(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda x, factor: x[5], scaled, CASES) is None
    assert "case 1 of 2 raised IndexError: index 5 is out of bounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("got", "expected", "passes"),
    [
        (torch.tensor(0.5), 0.5, True),
        (0.5, torch.tensor(0.5), True),
        (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0]), True),
        ([1.0, 2.0], torch.tensor([1.0, 2.0]), True),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        ("tie", "tie", True),
        ((1.0, torch.ones(2)), (1.0, torch.ones(2)), True),
        ({"a": 1.0}, {"a": 1.0}, True),
        (1.0 + 5e-5, 1.0, True),  # inside the relative tolerance 1e-4 ...
        (1.0 + 5e-4, 1.0, False),  # ... and outside
        (torch.tensor([0.5]), 0.5, False),
        ("win", "tie", False),
        ("tie", 1.0, False),
        ((1.0, torch.ones(2)), (1.0, torch.zeros(2)), False),
        ({"a": 1.0}, {"b": 1.0}, False),
        (torch.tensor([math.nan]), torch.tensor([0.0]), False),
    ],
)
def test_what_counts_as_equal(got: object, expected: object, passes: bool) -> None:
    assert (check(lambda: got, lambda: expected, [()]) is True) == passes


def test_a_function_that_changes_its_input_spoils_nothing() -> None:
    def in_place(x: Tensor, factor: float) -> Tensor:
        return x.mul_(factor)

    x = torch.tensor([1.0, 2.0])
    assert check(in_place, scaled, [(x, 2.0), (x, 2.0)])
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


def test_no_cases_would_pass_everything() -> None:
    with pytest.raises(ValueError, match="cases: expected at least one, got none"):
        check(scaled, scaled, [])
