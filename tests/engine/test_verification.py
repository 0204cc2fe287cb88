"""`verify`: silent on every model that the engine gets right, and loud on the mistakes that nothing else can see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from test_engine import MODELS, POSITIONS, SEQUENCES, WORDS, make
from torch import Tensor

from isopo_mini.engine import UnhandledParameterError, matrix_product, verify
from isopo_mini.engine.stand_in import HANDLERS
from isopo_mini.policies import CausalTransformer

S, WIDTH = 6, 5


def chosen(outputs: Tensor) -> Tensor:
    """Some log-probability of every sequence and position."""
    return outputs.log_softmax(-1)[..., 0]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_that_the_engine_gets_right(name: str) -> None:
    model, inputs, directions, _ = make(name)
    errors = verify(model, lambda n: (model(inputs[:n]) * directions[:n]).sum(dim=-1), SEQUENCES)
    assert errors.keys() == dict(model.named_parameters()).keys()
    assert max(errors.values()) < 1e-14  # sums of some hundred numbers in double precision


@pytest.mark.parametrize("positions", [POSITIONS, SEQUENCES])
def test_a_transformer_in_single_precision_leaves_grad_alone(positions: int) -> None:
    """The gradient of a key's bias is zero but for rounding: an error relative to itself would be 100 %."""
    policy = CausalTransformer(WORDS, positions, width=8, layers=2, heads=2)
    tokens = torch.randint(WORDS, (SEQUENCES, positions))
    errors = verify(policy, lambda n: chosen(policy(tokens[:n])), SEQUENCES)
    assert max(errors.values()) < 1e-5
    assert all(parameter.grad is None for parameter in policy.parameters())


# --- Mistakes that leave no trace in shapes ---------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Works on `(T, S, d)`, as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs.transpose(0, 1)))).transpose(0, 1)


class SortsItsBatch(nn.Module):
    """Last sequence first, and back again: layers see another order than the advantages have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.flip(0)).flip(0)


class Normalises(nn.Module):
    """Over the batch: every sequence has a part in the log-probabilities of every other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return outputs - outputs.mean(dim=(0, 1))


class RelativePositions(nn.Module):
    """A bias for each distance, looked up once as `(T, T)` for all sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bias = nn.Linear(WIDTH, WIDTH), nn.Embedding(2 * S, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = torch.arange(inputs.shape[1])
        scores = inputs @ inputs.transpose(1, 2) + self.bias(steps[:, None] - steps + S)[..., 0]
        return self.layer(torch.tanh(scores) @ inputs)


class PositionsByLayer(nn.Module):
    """Features of positions, `(T, d)`, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(WIDTH, WIDTH), nn.Linear(1, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = torch.arange(inputs.shape[1], dtype=inputs.dtype)
        return self.layer(inputs) * self.positions(steps[:, None])


@pytest.mark.parametrize(
    ("make_model", "named"),
    [
        (TimeFirst, r"'first\.weight'"),
        (SortsItsBatch, r"'layer\.weight'"),
        (Normalises, r"'layer\.weight'"),
        (PositionsByLayer, r"'positions\.weight'"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mistake_is_named_where_there_are_as_many_positions_as_sequences(
    dtype: torch.dtype, make_model: Callable[[], nn.Module], named: str
) -> None:
    model, inputs = make_model().to(dtype), torch.randn(S, S, WIDTH, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^model: expected autograd's gradient with S=6.* {named} \(\d+\.\d% off\)"):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


def test_a_gradient_that_cancels_is_none_and_not_quadrillions_of_percent_off() -> None:
    """The mean over the batch takes the bias away, and autograd's gradient is the rounding that is left."""
    model, inputs = Normalises().double(), torch.randn(S, 4, WIDTH).double()
    with pytest.raises(ValueError, match=r"'layer\.weight' \([\d.]+% off\), 'layer\.bias' \(where there is none\);"):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


@pytest.mark.parametrize("make_model", [TimeFirst, PositionsByLayer])
def test_and_by_its_shape_where_there_are_not(make_model: Callable[[], nn.Module]) -> None:
    """With S = T + 1 the first number of sequences shows it; the second one, T, would not have to."""
    model, inputs = make_model(), torch.randn(S, S - 1, WIDTH)
    with pytest.raises(ValueError, match=r"expected an input whose first axis is the S=6 sequences"):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


@pytest.mark.filterwarnings("ignore:.*each sequence gets a copy")
@pytest.mark.parametrize("positions", [S - 2, S - 1, S])
def test_relative_positions_are_told_from_tokens(positions: int) -> None:
    """A table of all pairs of positions has the same shape as tokens where there are as many sequences."""
    model, inputs = RelativePositions().double(), torch.randn(S, positions, WIDTH).double()
    assert max(verify(model, lambda n: chosen(model(inputs[:n])), S).values()) < 1e-13


def test_a_second_number_of_sequences_finds_what_one_hides() -> None:
    """A table indexed by the sequences' own numbers, as if they were positions, is right for S alone."""

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.numbers = nn.Linear(WIDTH, WIDTH), nn.Embedding(S, WIDTH)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs) + self.numbers(torch.arange(S))[: len(inputs), None]

    model, inputs = Numbered(), torch.randn(S, 3, WIDTH)
    with pytest.raises(ValueError, match=r"parameter 'numbers\.weight': .* the S=5 sequences, got shape \(6,\)"):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


def test_a_handler_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right outputs, and twice the gradient of the weight."""

    def doubled(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return matrix_product(2.0 * input, weight, bias) - nn.functional.linear(input, weight.slot.values)

    model, inputs = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), torch.randn(S, WIDTH)
    assert len(verify(model, lambda n: chosen(model(inputs[:n])), S)) == 4
    monkeypatch.setitem(HANDLERS, nn.functional.linear, doubled)
    with pytest.raises(
        ValueError, match=r"from the engine for '0\.weight' \(100\.0% off\), '1\.weight' \(100\.0% off\);"
    ):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


# --- What it says -----------------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_is_left_out() -> None:
    """The first factor of a low-rank update whose second is zero: nothing could be compared."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.unused = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
            nn.init.zeros_(self.up.weight)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.up(self.down(inputs))

    model, inputs = LowRank(), torch.randn(S, WIDTH)
    assert verify(model, lambda n: chosen(model(inputs[:n])), S).keys() == {"up.weight"}


def test_many_wrong_parameters_are_counted() -> None:
    model, inputs = nn.Sequential(*[SortsItsBatch() for _ in range(4)]), torch.randn(S, S, WIDTH)
    with pytest.raises(ValueError, match=r"off\) and 3 more; the first axis of every layer's input must be"):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    model, inputs = nn.Linear(WIDTH, WIDTH), torch.randn(S, WIDTH)
    with pytest.raises(ValueError, match=r"^num_sequences: expected a finite number >= 2, got 1$"):
        verify(model, lambda n: chosen(model(inputs[:n])), 1)
    with pytest.raises(TypeError, match=r"^num_sequences: expected an integer, got float$"):
        verify(model, lambda n: chosen(model(inputs[:n])), 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^log_probs: expected .* the S=5 sequences, got \(6,\)$"):
        verify(model, lambda n: chosen(model(inputs)), S - 1)
    with pytest.raises(ValueError, match=r"^log_probs: expected .* the S=6 sequences, got float$"):
        verify(model, lambda n: 0.0, S)  # type: ignore[arg-type, return-value]
    dropout = nn.Sequential(model, nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"^log_probs: expected the same numbers in two calls.*model\.eval\(\)$"):
        verify(dropout, lambda n: chosen(dropout(inputs[:n])), S)
    kept = model.weight
    with pytest.raises(UnhandledParameterError, match=r"^parameter 'weight': .* a path that does not go through"):
        verify(model, lambda n: chosen(model(inputs[:n]) @ kept), S)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: expected at least one trainable parameter, got none$"):
        verify(model, lambda n: chosen(model(inputs[:n])), S)


class SingleInside(nn.Module):
    """Of double precision, but for a norm: as the models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 5).double(), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after((x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True))).double())


def test_rounding_inside_of_the_model_is_called_by_its_name() -> None:
    torch.manual_seed(0)
    model, features = SingleInside(), torch.randn(6, 3).double()
    with pytest.raises(
        ValueError, match=r"\(by \de-\d+ of its size\).*; as small an error is the rounding of single prec"
    ):
        verify(model, lambda n: model(features[:n]).log_softmax(-1)[:, 0], 6)
