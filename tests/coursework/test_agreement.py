"""What a test says of an answer: right, or what is wrong with it."""

import pytest
import torch

from isopo_mini.coursework.agreement import assert_agrees

RIGHT = torch.tensor([1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("got", [RIGHT, RIGHT + 1e-9, RIGHT.clone().requires_grad_()])
def test_the_right_answer_passes(got: torch.Tensor) -> None:
    assert_agrees(got, RIGHT)


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (None, "got nothing: is the function filled in"),
        (..., "got nothing"),
        ([1.0, 2.0], "expected a tensor of shape .2,., got a list"),
        ("1 2", "got a str"),
        (torch.ones(1, 2), "got one of shape .1, 2."),
        (RIGHT * torch.nan, "expected finite numbers, got 2"),
        (-RIGHT, "the largest difference is 4, where the largest right number is 2"),
        (RIGHT + 1e-5, "where the largest right number is 2$"),
        (RIGHT.float() + 1e-5, "yours are of float32, and double precision .float64. is asked for$"),
        (RIGHT.float() + 1, "where the largest right number is 2$"),
    ],
)
def test_a_wrong_answer_hears_why(got: object, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_agrees(got, RIGHT)


@pytest.mark.parametrize(("got", "right"), [(3, True), (3.0, True), (True, False), (3.1, False), ("3", False)])
def test_numbers(got: object, right: bool) -> None:
    if right:
        assert_agrees(got, 3.0)
    else:
        with pytest.raises(AssertionError):
            assert_agrees(got, 3.0)
