"""What the checker knows of one exercise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def unchanged(answer: Any) -> Any:
    """The answer itself is compared."""
    return answer


@dataclass(frozen=True)
class Exercise:
    """An exercise with a checker.

    Args:
        reference: what is right, by another path than the solution's where there is one.
        cases: makes the arguments of each case, the same every time.
        mistakes: from a hint to the function that makes the mistake. On these cases no two of them agree in all
            answers, nor with the reference.
        measure: what of an answer is compared; of use where many answers are right.
        atol: tolerated absolute difference.
    """

    reference: Function
    cases: Callable[[], list[tuple[Any, ...]]]
    mistakes: Mapping[str, Function] = field(default_factory=dict)
    measure: Callable[[Any], Any] = unchanged
    atol: float = 1e-6


def solve_damped(matrix: Tensor, right: Tensor, damping: float) -> Tensor:
    """(matrix + damping · I)⁻¹ right, without the library's solves, which the chapters are about."""
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).to(matrix), right)


def normal(seed: int) -> Callable[..., Tensor]:
    """A function from a shape to standard normal numbers in double precision, drawn one after the other."""
    draw = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
