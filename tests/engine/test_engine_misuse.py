"""The engine notices what it is given wrongly, names the parameter, and takes everything that is right."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from against_autograd import (
    WIDTH,
    A,
    Given,
    ShiftedTwice,
    X,
    assert_clean,
    assert_exact,
    autograd_gradients,
    engine_gradients,
    perceptron,
    score,
)
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from isopo_mini import engine
from isopo_mini.engine import Isopo, UnhandledParameterError
from isopo_mini.policies import MLP
from isopo_mini.rules import NtkIsopo
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training.loop import train

# --- Compiled parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("part", ["wrapped", "first layer", "function"])
def test_a_compiled_part_gives_the_gradient_of_what_was_written(part: str, used_before: bool, backend: str) -> None:
    model = perceptron()
    forward: Callable[[Tensor], Tensor] = model
    if part == "wrapped":
        forward = torch.compile(model, backend=backend)
    elif part == "first layer":
        model[0].compile(backend=backend)
    else:
        forward = torch.compile(lambda inputs: model[2](model[1](model[0](inputs))), backend=backend)
    if used_before:
        score(forward(X)).sum()
    expected = autograd_gradients(
        model, lambda: score(model[2](torch.tanh(F.linear(X, model[0].weight, model[0].bias))))
    )
    assert_exact(engine_gradients(model, lambda: score(forward(X))), expected)
    grams = engine.gram_matrices(model, lambda: score(forward(X)))
    plain = engine.gram_matrices(model, lambda: score(model[2](torch.tanh(model[0](X)))))
    assert grams.keys() == {"0", "2"}
    torch.testing.assert_close(grams, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("_forget_compiled_code")
def test_a_compiled_policy_learns() -> None:
    """Silently no gradient at all before: the report was a gradient norm of 0 for ever."""
    tables = []
    for compiled in (False, True):
        torch.manual_seed(2)
        task = ContextualBandit(torch.rand(6, 3), features=torch.randn(6, 4))
        policy = MLP(4, 3)
        if compiled:
            policy.layers.compile(backend="eager")
        optimizer = torch.optim.SGD(policy.parameters(), 1.0)
        tables.append(train(policy, task, NtkIsopo(), optimizer, 3, 0, progress=False))
    assert (tables[0]["gradient_norm"] > 0).all()
    assert tables[0]["gradient_norm"].tolist() == pytest.approx(tables[1]["gradient_norm"].tolist(), rel=1e-5)


# --- Uses past PyTorch's functions, and parameters that are exchanged -------------------------------------------------


class Fused(torch.autograd.Function):
    """A kernel of one's own: it takes values, and PyTorch does not say that they are a parameter's."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return gradients @ weight, gradients.flatten(0, 1).T @ inputs.flatten(0, 1)


class WithFused(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = self.first if tied else nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return Fused.apply(torch.tanh(self.first(inputs)), self.second.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_an_autograd_function_that_reads_a_parameter_is_named(tied: bool) -> None:
    """Before: no gradient; and half of it where another use of the weight was handled."""
    model = WithFused(tied).double()
    message = rf"^parameter '{'first' if tied else 'second'}\.weight': .* got an autograd\.Function or an extension"
    with pytest.raises(UnhandledParameterError, match=message):
        engine_gradients(model, lambda: score(model(X)))
    with pytest.raises(UnhandledParameterError, match=message):
        engine.gram_matrices(model, lambda: score(model(X)))
    assert_clean(model)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_other_values_for_the_parameters_are_noticed(with_gradient: bool) -> None:
    """The stand-ins would win against them, and the block would compute with the present values in silence."""
    model = perceptron()
    other = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    with (
        pytest.raises(ValueError, match=r"^parameter '0\.weight': .* another tensor in its place; use torch\.func"),
        Isopo(model, Given()).microbatch(A),
        torch.set_grad_enabled(with_gradient),
    ):
        functional_call(model, other, (X,))
    assert_clean(model)


def test_a_functional_call_with_the_models_own_parameters_is_the_model() -> None:
    model = perceptron()
    own = dict(model.named_parameters())
    found = engine_gradients(model, lambda: score(functional_call(model, own, (X,))))
    assert_exact(found, autograd_gradients(model, lambda: score(model(X))))


def test_a_parameter_that_is_assigned_inside_of_a_block_is_named() -> None:
    model = perceptron()
    with (
        pytest.raises(RuntimeError, match=r"^parameter '0\.weight': expected the same parameter until the microbatch"),
        Isopo(model, Given()).microbatch(A),
    ):
        model[0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    assert_clean(model)
    assert torch.equal(model[0].weight, torch.zeros(WIDTH, WIDTH))


def test_what_happened_inside_of_the_block_is_not_hidden_by_its_end() -> None:
    model = perceptron()

    def replace_and_fail() -> Tensor:
        del model[0].weight
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine_gradients(model, replace_and_fail)
    assert_clean(model)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_reentrant_checkpoint_is_named() -> None:
    """It runs a backward pass of its own for its part. A layer used outside of it as well would be closed twice."""
    model = nn.Linear(WIDTH, WIDTH).double()
    with pytest.raises(RuntimeError, match=r"^parameter 'weight': expected one backward pass .* use_reentrant=False$"):
        engine_gradients(model, lambda: score(checkpoint(model, model(X), use_reentrant=True)))
    assert_clean(model)


def test_checkpoints_inside_of_checkpoints() -> None:
    model = perceptron()

    def again(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return checkpoint(function, inputs, use_reentrant=False)

    def nested() -> Tensor:
        return score(again(lambda inputs: again(model, inputs) + model[0](inputs), model[2](X)))

    plain = autograd_gradients(model, lambda: score(model(model[2](X)) + model[0](model[2](X))))
    assert_exact(engine_gradients(model, nested), plain)


# --- Backward passes --------------------------------------------------------------------------------------------------


def test_asking_for_the_gradient_of_the_input_counts_nothing_twice() -> None:
    model, inputs = perceptron(), X.clone().requires_grad_()
    expected = autograd_gradients(model, lambda: score(model(X)))
    with Isopo(model, Given()).microbatch(A) as opened:
        total = score(model(inputs)).sum()
        (saliency,) = torch.autograd.grad(total, inputs, retain_graph=True)
        assert opened.coefficients == {}
        total.backward(retain_graph=True)
        torch.autograd.grad(total, inputs)  # nor does it leave anything open
    assert_exact({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    torch.testing.assert_close(inputs.grad, saliency)


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_pass_that_stops_halfway(again: bool) -> None:
    """Swallowed, it is an error at the end of the block; run again, it has left no trace."""
    stops = ["no memory left"]

    def stop(gradient: Tensor) -> None:
        if stops:
            raise MemoryError(stops.pop())

    model = ShiftedTwice(stop).double()
    outcome = nullcontext() if again else pytest.raises(RuntimeError, match=r"^parameter 'shift': .* run to its end")
    with outcome, Isopo(model, Given()).microbatch(A):
        total = score(model(X)).sum()
        with pytest.raises(MemoryError, match="no memory left"):
            total.backward(retain_graph=True)
        if again:
            total.backward()
    if again:
        assert_exact({"shift": model.shift.grad}, autograd_gradients(model, lambda: score(model(X))))
    assert_clean(model)


def test_separate_losses_are_transformed_separately_and_added() -> None:
    model, second = perceptron(), torch.flip(X, (0,))
    parts = [autograd_gradients(model, lambda inputs=inputs: score(model(inputs))) for inputs in (X, second)]
    with Isopo(model, Given()).microbatch(A):
        score(model(X)).sum().backward()
        score(model(second)).sum().backward()
    expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}  # type: ignore[operator]
    assert_exact({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


class Branches(nn.Module):
    """Every way in which a parameter may have no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen, self.never, self.cut, self.ignored, self.silent = (
            nn.Linear(WIDTH, WIDTH) for _ in range(6)
        )
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.ignored(inputs)
        with torch.no_grad():
            silent = self.silent(inputs) @ self.silent.weight.T
        return self.used(self.frozen(inputs)) + self.cut(inputs).detach() + silent


def test_what_has_no_part_in_the_loss_has_no_gradient() -> None:
    model = Branches().double()
    found = engine_gradients(model, lambda: score(model(X)))
    assert_exact(found, autograd_gradients(model, lambda: score(model(X))))
    assert {name.split(".")[0] for name, gradient in found.items() if gradient is not None} == {"used"}
