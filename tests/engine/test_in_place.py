"""Operations in place: exact where autograd allows them, noticed where a use still needs what was there."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from against_autograd import (
    WIDTH,
    S,
    ShiftedTwice,
    T,
    X,
    assert_clean,
    assert_exact,
    autograd_gradients,
    engine_gradients,
    perceptron,
    score,
)
from torch import Tensor

from isopo_mini import engine
from isopo_mini.policies import MLP
from isopo_mini.rules import NtkIsopo
from isopo_mini.tasks import ContextualBandit
from isopo_mini.training.loop import train


class Changing(nn.Module):
    """A layer whose output is changed in place, or by an operation that makes a new tensor."""

    def __init__(self, layer: nn.Module, change: str, in_place: bool) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(WIDTH, WIDTH)
        self.change, self.in_place = change, in_place

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        if self.change == "relu":
            outputs = F.relu(outputs, inplace=self.in_place)
        elif self.change == "dropout":
            outputs = F.dropout(outputs, 0.0, inplace=self.in_place)
        elif self.in_place:
            outputs += 0.5 * X
        else:
            outputs = outputs + 0.5 * X
        return self.last(outputs)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "after another": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
    "embedding": lambda: nn.Embedding(7, WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
}


@pytest.mark.parametrize("change", ["relu", "dropout", "add"])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_may_be_changed_in_place(layer: str, change: str) -> None:
    """`Linear` with a bias gave a view, which autograd does not let anybody change."""
    inputs = torch.randint(7, (S, T)) if layer == "embedding" else X
    models = []
    for in_place in (False, True):
        torch.manual_seed(3)
        models.append(Changing(LAYERS[layer](), change, in_place).double())
    grams = [engine.gram_matrices(model, lambda m=model: score(m(inputs))) for model in models]
    gradients = [engine_gradients(model, lambda m=model: score(m(inputs))) for model in models]
    assert_exact(gradients[1], gradients[0])
    assert_exact(gradients[1], autograd_gradients(models[0], lambda: score(models[0](inputs))))
    assert_exact(grams[1], grams[0])  # type: ignore[arg-type]


def test_a_policy_with_an_activation_in_place_learns_as_the_other() -> None:
    tables = []
    for in_place in (False, True):
        torch.manual_seed(4)
        task = ContextualBandit(torch.rand(4, 3), features=torch.randn(4, 5))
        policy = MLP(5, 3, activation=partial(nn.ReLU, inplace=in_place))
        optimizer = torch.optim.SGD(policy.parameters(), 1.0)
        tables.append(train(policy, task, NtkIsopo(), optimizer, 3, 0, progress=False))
    assert tables[0]["gradient_norm"].tolist() == pytest.approx(tables[1]["gradient_norm"].tolist(), rel=1e-6)


class ChangesItsInput(nn.Module):
    """Writes to the input of a layer after the layer has been used."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone()
        outputs = self.layer(inputs)
        inputs.mul_(0) if inputs.dtype == torch.int64 else inputs.mul_(2.0)
        return outputs


@pytest.mark.parametrize("layer", ["linear", "linear without bias", "embedding", "gain"])
def test_an_input_that_is_changed_after_its_use_is_noticed(layer: str) -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.weight

    model = ChangesItsInput((LAYERS | {"gain": Gain})[layer]()).double()
    inputs = torch.randint(7, (S, T)) if layer == "embedding" else X
    for run in (engine_gradients, engine.gram_matrices):
        with pytest.raises(RuntimeError, match=r"^parameter 'layer\.weight': .* changed in place; use an operation"):
            run(model, lambda: score(model(inputs)))
    assert_clean(model)


def test_what_no_gradient_needs_may_be_changed() -> None:
    """A bias alone does not look at its layer's input, and autograd would not either."""
    model = ChangesItsInput(nn.Linear(WIDTH, WIDTH)).double()
    model.layer.weight.requires_grad_(False)  # type: ignore[union-attr]
    expected = autograd_gradients(model, lambda: score(model(X)))
    assert_exact(engine_gradients(model, lambda: score(model(X))), expected)
    (gram,) = engine.gram_matrices(model, lambda: score(model(X))).values()
    rows = torch.stack([torch.autograd.grad(score(model(x[None])).sum(), model.layer.bias)[0] for x in X])  # type: ignore[arg-type]
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=1e-13)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    model = perceptron()

    def stepped() -> Tensor:
        result = score(model(X))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        return result

    with pytest.raises(RuntimeError, match=r"^parameter '2\.weight': .* changed in place"):
        engine_gradients(model, stepped)


def test_a_gradient_that_a_hook_changes_in_place_is_noticed() -> None:
    model = ShiftedTwice(lambda gradient: gradient.mul_(3.0)).double()
    with pytest.raises(RuntimeError, match=r"^parameter 'shift': .* shape \(4, 3, 5\) changed in place"):
        engine_gradients(model, lambda: score(model(X)))
    model.hook = lambda gradient: 3.0 * gradient
    assert_exact(engine_gradients(model, lambda: score(model(X))), autograd_gradients(model, lambda: score(model(X))))
