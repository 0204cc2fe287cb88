"""The engine against one backward pass a sequence: every layer's Gram matrix, and the step of NTK."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from against_autograd import WIDTH, A
from torch import Tensor

from isopo_mini import engine
from isopo_mini.engine import NTK, Isopo

DAMPING = 0.3


class Own(nn.Module):
    """A linear layer, and something done with parameters by hand."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.own = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.linear(inputs), *self.own)


def assert_per_sequence(model: nn.Module, values: Callable[[], Tensor], grams: bool = True, **options: Any) -> Isopo:
    """K of every layer and Σ_s c_s G_s are those of the loop, up to the rounding of double precision."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = loop_gradients(list(parameters.values()), values)
    layer_of = engine.layer_names(model)
    expected_grams = {layer: torch.zeros(len(A), len(A)).double() for layer in layer_of.values()}
    for parameter, gradients in rows.items():
        expected_grams[layer_of[parameter]] += gradients @ gradients.T
    if grams and "segments" not in options:
        for layer, gram in engine.gram_matrices(model, values).items():
            torch.testing.assert_close(gram, expected_grams[layer], rtol=1e-11, atol=1e-12, msg=layer)
    model.zero_grad()
    isopo = Isopo(model, NTK(DAMPING))
    with isopo.microbatch(A, **options):
        values().sum().backward()
    for name, parameter in parameters.items():
        gram = expected_grams[layer_of[parameter]]
        damping = DAMPING * gram.diagonal().mean()
        if not gram.any():  # a layer that the values do not depend on
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        c = damping * torch.linalg.solve(gram + damping * torch.eye(len(A)).double(), A)
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = (c @ rows[parameter]).view_as(parameter)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11, msg=name)
    return isopo


def loop_gradients(parameters: list[nn.Parameter], values: Callable[[], Tensor]) -> dict[nn.Parameter, Tensor]:
    """G_s, `(S, P)`, of every parameter."""
    rows: dict[nn.Parameter, list[Tensor]] = {parameter: [] for parameter in parameters}
    for index in range(len(A)):
        of_one = torch.autograd.grad(values()[index], parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, of_one, strict=True):
            rows[parameter].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {parameter: torch.stack(each).reshape(len(A), -1) for parameter, each in rows.items()}
