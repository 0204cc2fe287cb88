"""The checker of exercises: it passes what is right, names what is wrong, and never stops a page from building."""

import inspect
import math
from typing import Any

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
        (33346, 33345, False),  # a count is right or wrong, whatever its size ...
        (33345.0, 33345, True),
        (33345 + 1e-3, 33345, False),
        (torch.tensor(33346), 33345, False),
        (33346, torch.tensor(33345), False),
        (2**70 + 1, 2**70, False),
        (2**70, 2**70, True),
        ([100000, 1], [100001, 1], False),  # ... and wherever it stands
        ((100001, 0.5 + 1e-6), (100001, 0.5), True),
        ([[1.0, 100000]], [[1.0, 100001]], False),
        ({"a": (100000,)}, {"a": (100001,)}, False),
        (torch.tensor([100000, 1]), torch.tensor([100001, 1]), False),
        (torch.tensor([100000.0, 1.0]), torch.tensor([100001, 1]), False),
        (np.array([100000]), np.array([100001]), False),
        (np.array([100000]), torch.tensor([100000]), True),
        (np.int64(100000), np.int64(100001), False),
        (True, False, False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (100000, 100001.0, True),  # the reference is no whole number: inside the tolerance
        ([1.0], [1.0, 2.0], False),
        (1.0, [1.0], False),
        (["tie", 1], ["tie", 1], True),
        (["win", 1], ["tie", 1], False),
        (1e300, 2e300, False),  # beyond single precision
        (1j, 1j, True),
    ],
)
def test_what_counts_as_equal(got: object, expected: object, passes: bool) -> None:
    assert (check(lambda: got, lambda: expected, [()]) is True) == passes


def test_tolerances_are_those_of_double_precision_for_python_numbers() -> None:
    assert check(lambda: 1.0 + 1e-9, lambda: 1.0, [()], rtol=1e-12, atol=0.0) is None
    assert check(lambda: 1.0 + 1e-13, lambda: 1.0, [()], rtol=1e-12, atol=0.0) is True


def test_the_entry_that_differs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda: {"a": [3, 4]}, lambda: {"a": [3, 5]}, [()]) is None
    assert "case 1 of 1 differs. Entry 'a': Entry 1: A whole number is right or wrong." in capsys.readouterr().out


def test_a_yes_in_the_place_of_a_no_is_not_called_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda: True, lambda: False, [()]) is None
    assert "case 1 of 1 differs. One is True, the other False." in capsys.readouterr().out


def test_a_function_that_changes_its_input_spoils_nothing() -> None:
    def in_place(x: Tensor, factor: float) -> Tensor:
        return x.mul_(factor)

    x = torch.tensor([1.0, 2.0])
    assert check(in_place, scaled, [(x, 2.0), (x, 2.0)])
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


def test_no_cases_would_pass_everything() -> None:
    with pytest.raises(ValueError, match="cases: expected at least one, got none"):
        check(scaled, scaled, [])


def test_a_function_that_ends_the_program_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    def gives_up(x: float) -> None:
        raise SystemExit(1)  # as `exit()` does

    assert check(gives_up, lambda x: x, [(1.0,)]) is None
    assert "gives_up: case 1 of 1 raised SystemExit: 1" in capsys.readouterr().out


def hint_of(
    function: object, reference: object, cases: list, capsys: pytest.CaptureFixture[str], **options: Any
) -> str:
    """The hint that is printed, or nothing."""
    assert check(function, reference, cases, **options) is None
    lines = capsys.readouterr().out.splitlines()
    return next((line.removeprefix("  hint:     ") for line in lines if line.startswith("  hint:")), "")


SQUARES = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]),), (torch.tensor([[0.0, 1.0], [5.0, 2.0]]),)]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda x: -x, "The numbers are right but for their sign."),
        (lambda x: x.T, "This is the transpose of what is right."),
        (lambda x: 0 * x, "Every number is zero."),
        (lambda x: x / 2, "Every number is 0.5 times what it should be."),
        (
            lambda x: x * x[0, 1],
            "The numbers are right but for a factor of their case, 2, 1: a sum in the place of a mean?",
        ),
        (lambda x: x.flatten(), "The numbers are right, their shape is not."),
        (lambda x: 0 * x / 0, "Some numbers are nan: 0/0, or the logarithm or root of a negative number."),
        (lambda x: x.flip(0), ""),
        (lambda x: "x", ""),
        (lambda x: [x], "The numbers are right, their shape is not."),
        (lambda x: x + 1j, ""),
    ],
)
def test_a_slip_of_any_exercise_is_named(wrong: object, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint_of(wrong, lambda x: x, SQUARES, capsys) == hint


def test_a_single_number_shows_no_factor(capsys: pytest.CaptureFixture[str]) -> None:
    assert hint_of(lambda x: 3 * x, lambda x: x, [(1.0,), (2.0,)], capsys) == ""


MISTAKES = {"Squared.": lambda x, factor: x**2, "Doubled.": lambda x, factor: 2 * x, "Looked up.": lambda x, f: x[9]}


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda x, factor: x * x, "Squared."),
        (lambda x, factor: x + x, "Doubled."),
        (lambda x, factor: [][0], "Looked up."),  # the same kind of error in every case
        (lambda x, factor: x * x if factor == 3 else x, ""),  # in one case only
        (lambda x, factor: 1 / 0, ""),
    ],
)
def test_the_mistake_that_explains_every_case_is_named(
    wrong: object, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint_of(wrong, scaled, CASES, capsys, mistakes=MISTAKES) == hint


def test_a_known_mistake_is_named_before_a_general_slip(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {"It climbs.": lambda x, factor: -factor * x}
    assert hint_of(lambda x, factor: -x * factor, scaled, CASES, capsys, mistakes=mistakes) == "It climbs."


def test_mistakes_spoil_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    def in_place(x: Tensor, factor: float) -> Tensor:
        return x.zero_()

    assert hint_of(lambda x, factor: x + 1, scaled, CASES, capsys, mistakes={"Nothing.": in_place}) == ""
    assert torch.equal(CASES[0][0], torch.tensor([1.0, 2.0]))


def test_an_exercise_of_the_book_is_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda theta, v: None, "fisher_product") is None
    assert "not filled in yet" in capsys.readouterr().out
    with pytest.raises(ValueError, match="such as 'fisher_product', got 'fischer_product'"):
        check(scaled, "fischer_product")
    with pytest.raises(ValueError, match="expected none, since exercise 'fisher_product' brings its own"):
        check(scaled, "fisher_product", CASES)


def test_the_call_that_coursework_uses_stays() -> None:
    assert list(inspect.signature(check).parameters)[:3] == ["function", "reference", "cases"]
    assert check(scaled, scaled, CASES, rtol=1e-4, atol=1e-6) is True
