"""A layer whose true gradient is zero gets no step, though what arrives is rounding and not zero."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from against_autograd import (
    WIDTH,
    A,
    S,
    T,
    X,
)
from torch import Tensor

from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled


class Shifted(nn.Module):
    """Logits that are all shifted by one number, which softmax does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(WIDTH, WIDTH), nn.Module()
        self.shift.by = nn.Parameter(torch.randn(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.layer(inputs)[..., None] + self.shift.by)[..., 0]


DIVIDING = [FisherNormalized(), FisherNormalized("token"), FisherNormalized("token-unscaled"), LayerScaled()]
DIVIDING += [FisherNormalized(scale="natural"), NTK(1.0, scale="natural")]  # type: ignore[list-item]


@pytest.mark.parametrize("gram", ["auto", "ghost", "sketched", "signs", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", DIVIDING, ids=str)
def test_rounding_is_not_blown_up_to_a_step(transform: Any, dtype: torch.dtype, gram: str) -> None:
    """Before: a step of 1e7 in single precision, and of 1e16 in double."""
    model = Shifted().to(dtype)
    with Isopo(model, transform, gram=gram).microbatch(A.to(dtype)):
        model(X.to(dtype)).log_softmax(-1)[..., 0].sum().backward()
    assert model.shift.by.grad is not None
    assert float(model.shift.by.grad.abs()) < 1e-5
    assert model.layer.weight.grad is not None
    assert float(model.layer.weight.grad.norm()) > 1e-3


def test_one_sequence_without_a_gradient_takes_no_part() -> None:
    """Of the others the coefficients are what they were; its own is zero."""
    model, directions = Shifted().double(), torch.randn(S, T, WIDTH).double()

    def coefficients(which: slice) -> Tensor:
        with Isopo(model, FisherNormalized()).microbatch(A[which]) as opened:
            logits = model(X[which])
            shares = torch.where(torch.arange(S)[which, None, None] == 3, logits.log_softmax(-1), logits)
            (shares * torch.where(torch.arange(S)[which, None, None] == 3, 1.0, directions[which])).sum().backward()
        return opened.coefficients["shift"]

    found, without = coefficients(slice(S)), coefficients(slice(S - 1))
    assert found[3] == 0
    torch.testing.assert_close(found[:3], without * (S / (S - 1)) ** 0.5, rtol=1e-10, atol=0.0)  # a mean over S
