"""The engine with c = A against autograd's ∇ Σ_s A_s log π_s: what several test files compare."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from isopo_mini.engine import Isopo

S, T, WIDTH = 4, 3, 5
Objective = Callable[[], Tensor]


class Given:
    """c = A, so that the engine has to give exactly the gradient of Σ_s A_s log π_s, whatever the model."""

    def coefficients(self, layer: Any, advantages: Tensor, averages: Any) -> Tensor:
        return advantages


def make_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((S, T, WIDTH), (S,)))


X, A = make_inputs()


def score(outputs: Tensor) -> Tensor:
    """Some scalar of every sequence, `(S,)`."""
    return torch.tanh(outputs).flatten(1).sum(dim=1)


def autograd_gradients(model: nn.Module, objective: Objective) -> dict[str, Tensor | None]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(objective() @ A, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def engine_gradients(model: nn.Module, objective: Objective) -> dict[str, Tensor | None]:
    model.zero_grad()
    with Isopo(model, Given()).microbatch(A):
        objective().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_exact(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """The same up to the rounding of double precision, and None in the same places."""
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=name)


def assert_clean(model: nn.Module) -> None:
    """No stand-in is left, so that the next block can open."""
    assert not any(set(module.__dict__) & set(module._parameters) for module in model.modules())


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


class ShiftedTwice(nn.Module):
    """A shift passes the gradient of its output on as it is, and keeps it until its other use has been seen."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.hook = hook

    def forward(self, inputs: Tensor) -> Tensor:
        between = inputs + self.shift
        if between.requires_grad:
            between.register_hook(self.hook)
        return between + self.shift
