"""ISOPO by the book: one backward pass a sequence, every G_s in full, one layer after the other."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from architectures import DoublePrecision, S, build, log_probs
from torch import Tensor

from isopo_mini.engine import NTK, FisherNormalized, Isopo, layer_names

DAMPING = 0.3
TOLERANCE = 1e-11  # double precision, through some hundred operations and a linear system
TRANSFORMS: dict[str, Any] = {"NTK": NTK(DAMPING), "Fisher": FisherNormalized()}


def coefficients(kind: str, gram: Tensor, advantages: Tensor) -> Tensor:
    """c of one layer, from its Gram matrix."""
    if kind == "Fisher":
        return advantages / gram.square().mean(dim=1).sqrt()
    damping = DAMPING * gram.diagonal().mean()
    return damping * torch.linalg.solve(gram + damping * torch.eye(len(gram)).to(gram), advantages)


def per_sequence_gradients(
    model: nn.Module, log_prob: Callable[[slice], Tensor], count: int
) -> dict[nn.Parameter, Tensor]:
    """G_s of every trainable parameter, `(S, P)`, by S backward passes of one sequence each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows: list[list[Tensor]] = []
    for index in range(count):
        of_one = torch.autograd.grad(log_prob(slice(index, index + 1)).sum(), parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, of_one, strict=True)])
    return {p: torch.stack(list(each)).flatten(1) for p, each in zip(parameters, zip(*rows, strict=True), strict=True)}


def expected_gradients(
    model: nn.Module, gradients: dict[nn.Parameter, Tensor], kind: str, advantages: Tensor
) -> dict[str, Tensor]:
    """Σ_s c_s G_s by name, zero where no sequence has a gradient."""
    layer_of = layer_names(model)
    grams: dict[str, Tensor] = {}
    for parameter, rows in gradients.items():
        grams[layer_of[parameter]] = grams.get(layer_of[parameter], 0) + rows @ rows.T
    names = {parameter: name for name, parameter in model.named_parameters()}
    result = {}
    for parameter, rows in gradients.items():
        gram = grams[layer_of[parameter]]
        c = coefficients(kind, gram, advantages) if gram.any() else torch.zeros_like(advantages)
        result[names[parameter]] = (c @ rows).view_as(parameter)
    return result


def engine_gradients(
    model: nn.Module, log_prob: Callable[[slice], Tensor], kind: str, advantages: Tensor, **options: Any
) -> tuple[dict[str, Tensor], Isopo]:
    """The same by the engine, and the engine, which knows how it came by it."""
    model.zero_grad()
    isopo = Isopo(model, TRANSFORMS[kind], **options)
    with isopo.microbatch(advantages):
        log_prob(slice(0, len(advantages))).sum().backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return found, isopo


def largest_error(model: nn.Module, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of all parameters, relative to the gradient of its layer.

    Not to its own: that of an attention's key bias, for one, is nothing but rounding.
    """
    assert found.keys() == expected.keys()
    parameters = dict(model.named_parameters())
    layer_of = layer_names(model)
    squares: dict[str, Tensor] = {}
    for name, theirs in expected.items():
        layer = layer_of[parameters[name]]
        squares[layer] = squares.get(layer, 0.0) + theirs.square().sum()
    errors = []
    for name, theirs in expected.items():
        size = float(squares[layer_of[parameters[name]]].sqrt())
        error = float((found[name] - theirs).norm())
        errors.append(error / size if size else error)
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


@dataclass(frozen=True)
class Outcome:
    """How the engine did on one model.

    Args:
        error: the largest error of all that was tried, infinite where something was refused.
        copied: parameters of which each sequence got a copy.
        functions: what no handler covered.
        refused: the error's message, or nothing.
    """

    error: float
    copied: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    refused: str = ""

    @property
    def result(self) -> str:
        """In one word."""
        if self.refused:
            return "refused"
        if not self.error <= TOLERANCE:
            return "wrong"
        return "exact, with copies" if self.copied else "exact"


def outcome(name: str, *, tied: bool, padded: bool, checkpointing: bool) -> Outcome:
    """The engine against the loop, with every transform.

    Raises:
        ValueError: the model itself lets its sequences influence one another.
    """
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(S, generator=generator, dtype=torch.float64)
    model = build(name, tied=tied, checkpointing=checkpointing)
    worst, isopo = 0.0, None
    with DoublePrecision(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*each sequence gets a copy")

        def log_prob(rows: slice) -> Tensor:
            return log_probs(name, model, rows, padded)

        alone = torch.cat([log_prob(slice(index, index + 1)) for index in range(S)])
        if not torch.allclose(alone, log_prob(slice(0, S)), rtol=1e-9, atol=1e-9):
            raise ValueError(f"{name}: expected the same log-probabilities for each sequence alone, got others")
        gradients = per_sequence_gradients(model, log_prob, S)
        for kind in TRANSFORMS:
            expected = expected_gradients(model, gradients, kind, advantages)
            assert sum(bool(each.any()) for each in expected.values()) > 0.8 * len(expected), name
            try:
                found, isopo = engine_gradients(model, log_prob, kind, advantages)
            except (ValueError, RuntimeError) as error:
                return Outcome(math.inf, refused=str(error))
            worst = max(worst, largest_error(model, found, expected))
    copied = {} if isopo is None else isopo.copied()
    return Outcome(worst, tuple(copied), tuple(sorted(set(copied.values()))))
