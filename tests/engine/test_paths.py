"""`gram="auto"`: multiplications, the memory they go through, and a cap on it."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from isopo_mini.engine import NTK, Isopo
from isopo_mini.engine.parameter_gradients import MatrixGradients
from isopo_mini.engine.path_costs import CACHE
from isopo_mini.geometry import gram as grams


def gradients(sequences: int, positions: int, rows: int, columns: int) -> MatrixGradients:
    left, right = torch.randn(sequences, positions, rows), torch.randn(sequences, positions, columns)
    return MatrixGradients(rows, columns, [left], [right])


def test_in_a_cache_multiplications_decide() -> None:
    for sequences, positions, rows, columns in ((16, 8, 64, 64), (8, 1, 64, 64), (8, 16, 32, 8)):
        assert sequences * rows * columns * 4 <= CACHE
        expected = grams.cheaper(sequences, positions, rows, columns)
        assert gradients(sequences, positions, rows, columns).path("auto") == expected


def test_beyond_a_cache_memory_counts() -> None:
    """By multiplications alone the dense path, whose gradients no longer fit into a cache."""
    assert grams.cheaper(8, 32, 2048, 512) == "dense"
    assert gradients(8, 32, 2048, 512).path("auto") == "ghost"
    assert gradients(8, 256, 2048, 512).path("auto") == "dense"


def test_the_cap_is_kept() -> None:
    wide = gradients(8, 64, 64, 64)
    needed = 8 * 64 * 64 * 4
    assert wide.path("auto", needed) == "dense"
    assert wide.path("auto", needed - 1) == "ghost"
    assert wide.path("dense", 0) == "dense"  # what is asked for by name is done


@pytest.mark.parametrize("gram_bytes", [None, 0])
def test_the_step_is_the_same(gram_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, advantages = nn.Linear(6, 5).double(), torch.randn(4, 9, 6).double(), torch.randn(4).double()
    formed = []
    form = MatrixGradients.form

    def noted(self: MatrixGradients, *workspace: Any) -> Tensor:
        formed.append(self)
        return form(self, *workspace)

    monkeypatch.setattr(MatrixGradients, "form", noted)

    def step(**options: Any) -> Tensor:
        model.zero_grad()
        with Isopo(model, NTK(0.3), **options).microbatch(advantages):
            torch.tanh(model(inputs)).sum().backward()
        assert model.weight.grad is not None
        return model.weight.grad

    found = step(gram_bytes=gram_bytes)
    assert bool(formed) == (gram_bytes is None)
    torch.testing.assert_close(found, step(gram="dense"), rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("unchecked")
def test_options_are_checked() -> None:
    for option in ("gram_bytes", "copy_bytes"):
        with pytest.raises(ValueError, match=f"^{option}: expected"):
            Isopo(nn.Linear(2, 2), NTK(1.0), **{option: -1})  # type: ignore[arg-type]
