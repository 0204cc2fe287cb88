"""The checks at the door: they let the right thing pass, and say what was expected and what came."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isopo_mini import checks

pytestmark = pytest.mark.usefixtures("unchecked")


class TestShape:
    def test_returns_the_sizes_for_the_next_argument(self) -> None:
        sizes = checks.require_shape("log_probs", torch.zeros(2, 3), "S T")
        assert sizes == {"S": 2, "T": 3}
        assert checks.require_shape("logits", torch.zeros(2, 3, 5), "S T A", sizes) == {"S": 2, "T": 3, "A": 5}
        assert sizes == {"S": 2, "T": 3}, "what was passed in stays as it was"

    def test_a_name_is_one_size_within_one_shape(self) -> None:
        assert checks.require_shape("gram", torch.zeros(4, 4), "S S") == {"S": 4}
        with pytest.raises(ValueError, match=r"^gram: expected shape \(S S\), got \(4, 5\)$"):
            checks.require_shape("gram", torch.zeros(4, 5), "S S")

    def test_a_number_is_itself_and_names_no_axis(self) -> None:
        assert checks.require_shape("points", torch.zeros(6, 2), "N 2") == {"N": 6}
        with pytest.raises(ValueError, match=r"^points: expected shape \(N 2\), got \(6, 3\)$"):
            checks.require_shape("points", torch.zeros(6, 3), "N 2")

    def test_a_scalar_has_no_axes(self) -> None:
        assert checks.require_shape("damping", torch.tensor(1.0), "") == {}
        with pytest.raises(ValueError, match=r"^damping: expected shape \(\), got \(1,\)$"):
            checks.require_shape("damping", torch.zeros(1), "")

    @given(lead=st.lists(st.integers(0, 3), max_size=3), last=st.integers(0, 4))
    @settings(max_examples=30, deadline=None)
    def test_dots_stand_for_any_number_of_axes(self, lead: list[int], last: int) -> None:
        assert checks.require_shape("observations", torch.zeros(*lead, last), "... d") == {"d": last}

    def test_dots_need_the_axes_behind_them(self) -> None:
        with pytest.raises(ValueError, match=r"^observations: expected shape \(d\), got \(\)$"):
            checks.require_shape("observations", torch.tensor(1.0), "... d")
        with pytest.raises(ValueError, match=r"^observations: expected shape \(d=3\), got \(7, 2\)$"):
            checks.require_shape("observations", torch.zeros(7, 2), "... d", {"d": 3})

    @pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 3, 1)])
    def test_nothing_broadcasts(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"^mask: expected shape \(S=2 T=3\), got \("):
            checks.require_shape("mask", torch.zeros(shape), "S T", {"S": 2, "T": 3})

    def test_no_tensor(self) -> None:
        with pytest.raises(TypeError, match=r"^rewards: expected a tensor of shape \(S\), got list$"):
            checks.require_shape("rewards", [0.0], "S")  # type: ignore[arg-type]


def test_floating() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        checks.require_floating("scores", torch.zeros(1, dtype=dtype))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"^scores: expected a floating-point tensor, got {dtype}$"):
            checks.require_floating("scores", torch.zeros(1, dtype=dtype))


def test_integer() -> None:
    checks.require_integer("actions", torch.zeros(1, dtype=torch.int64))
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.float32):
        with pytest.raises(TypeError, match=f"^actions: expected an int64 tensor, got {dtype}$"):
            checks.require_integer("actions", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_finite_names_the_first_index(number: float) -> None:
    values = torch.zeros(2, 3)
    checks.require_finite("rewards", values)
    checks.require_finite("rewards", torch.zeros(0))
    values[1, 0] = values[1, 2] = number
    with pytest.raises(ValueError, match=rf"^rewards: expected finite numbers, got {number} at index \(1, 0\)$"):
        checks.require_finite("rewards", values)
    with pytest.raises(ValueError, match=rf"^damping: expected finite numbers, got {number} at index \(\)$"):
        checks.require_finite("damping", torch.tensor(number))


def test_same_device() -> None:
    here, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    checks.require_same_device("groups", here, "rewards", here.double())
    with pytest.raises(ValueError, match=r"^groups: expected device meta \(that of rewards\), got cpu$"):
        checks.require_same_device("groups", here, "rewards", elsewhere)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_not_empty(shape: tuple[int, ...]) -> None:
    checks.require_not_empty("scores", torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"^scores: expected at least one entry along every axis, got shape") as error:
        checks.require_not_empty("scores", torch.zeros(shape))
    assert str(error.value).endswith(str(shape))


@pytest.mark.parametrize(
    ("check", "passes", "fails", "expected"),
    [
        (lambda name, value: checks.require_at_least(name, value, 1), (1, 1.0, 10**9), (0.999, -1), ">= 1"),
        (lambda name, value: checks.require_at_least(name, value, 0.5), (0.5, True), (0.25, False), ">= 0.5"),
        (checks.require_positive, (1e-300, 1), (0, 0.0, -1e-300), "> 0"),
    ],
)
def test_numbers_in_range(
    check: Callable[[str, Any], None], passes: tuple[float, ...], fails: tuple[float, ...], expected: str
) -> None:
    for value in passes:
        check("damping", value)
    for value in (*fails, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^damping: expected a finite number {expected}, got {value}$"):
            check("damping", value)
    for value in ("1", None, torch.tensor(1.0), 1j):
        with pytest.raises(TypeError, match=f"^damping: expected a number, got {type(value).__name__}$"):
            check("damping", value)


def test_choice_lists_what_there_is() -> None:
    checks.require_choice("scale", "none", ("std", "none"))
    with pytest.raises(ValueError, match=r"^scale: expected one of std, none, got 'Std'$"):
        checks.require_choice("scale", "Std", ("std", "none"))


def test_rows_that_are_no_probabilities_are_named() -> None:
    rows = torch.tensor([[[0.5, 0.5], [0.5, 0.4]]])
    with pytest.raises(ValueError, match=r"rows: .* sum 1 in each row, got sum 0.9 .* at state 0, action 1"):
        checks.require_probabilities("rows", rows, ("state", "action"))
    with pytest.raises(ValueError, match=r"rows: expected non-negative .* smallest -0.5"):
        checks.require_probabilities("rows", torch.tensor([1.5, -0.5]))
    checks.require_probabilities("rows", rows[0, :1], ("state",))


def test_a_layer_takes_its_own_dtype_or_what_autocast_converts() -> None:
    weight = torch.zeros(2, 2)
    checks.require_layer_input("x", weight, weight)
    with pytest.raises(ValueError, match=r"^x: expected shape \(d=2\), got \(2, 3\)$"):
        checks.require_layer_input("x", torch.zeros(2, 3), weight)
    with pytest.raises(TypeError, match=r"^x: expected torch.float32 \(the dtype of .*\), got torch.float16$"):
        checks.require_layer_input("x", weight.half(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks.require_layer_input("x", weight.half(), weight)
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(TypeError, match=f"^x: expected torch.float32 .* got {dtype}$"):
                checks.require_layer_input("x", weight.to(dtype), weight)


def test_numbers_and_vectors_of_them() -> None:
    matrix = torch.eye(3)
    checks.require_numbers("x", matrix)
    checks.require_vector("x", matrix[0], matrix, "y", {"P": 3})
    with pytest.raises(TypeError, match=r"^x: expected a floating-point tensor, got torch.int64$"):
        checks.require_numbers("x", matrix.long())
    with pytest.raises(ValueError, match=r"^x: expected at least one entry along every axis, got shape \(0, 3\)$"):
        checks.require_numbers("x", matrix[:0])
    with pytest.raises(ValueError, match=r"^x: expected finite numbers, got nan at index \(0, 0\)$"):
        checks.require_numbers("x", matrix * torch.nan)
    with pytest.raises(ValueError, match=r"^x: expected shape \(N=3\), got \(2,\)$"):
        checks.require_vector("x", matrix[0, :2], matrix, "y", {"N": 3}, axis="N")


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_symmetric_up_to_rounding_whatever_the_unit(unit: float) -> None:
    matrix = torch.tensor([[1.0, 2.0], [2.0 * (1 + 1e-7), 1.0]])
    checks.require_symmetric("x", unit * matrix)
    with pytest.raises(ValueError, match=r"^x: expected a symmetric matrix, got entries that differ by .*$"):
        checks.require_symmetric("x", unit * (matrix + torch.tensor([[0.0, 1e-3], [0.0, 0.0]])))
