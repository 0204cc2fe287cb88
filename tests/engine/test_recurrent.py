"""Recurrent layers of PyTorch: exact in every form that they come in, without copies, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from against_autograd import WIDTH, A, Given, S, T, X, assert_clean, score
from against_loop import assert_per_sequence, loop_gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from isopo_mini import engine
from isopo_mini.engine import FisherNormalized, Isopo, verify

HIDDEN = 4
LENGTHS = torch.tensor([3, 3, 2, 1])


def joined(outputs: Tensor, states: Any) -> Tensor:
    """Outputs `(S, T, d)` and last states `(layers, S, h)`, each state in a unit of its own: `(S, …)`."""
    states = (states,) if isinstance(states, Tensor) else states
    parts = [state.transpose(0, 1).flatten(1) * (2 + number) for number, state in enumerate(states)]
    return torch.cat([outputs.flatten(1), *parts], dim=1)


class Recurrent(nn.Module):
    """A linear layer, and a recurrent one of a form that the options say."""

    def __init__(self, kind: Any, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.cells = kind(WIDTH, HIDDEN, batch_first=batch_first, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.linear(inputs)
        if self.cells.batch_first:
            return joined(*self.cells(inputs))
        outputs, states = self.cells(inputs.transpose(0, 1))
        return joined(outputs.transpose(0, 1), states)


class Packed(Recurrent):
    """The same with sequences of several lengths, and a layer that works on packed rows."""

    def __init__(self, kind: Any, lengths: Tensor = LENGTHS, **options: Any) -> None:
        super().__init__(kind, **options)
        self.lengths, self.rows = lengths, nn.Linear(HIDDEN * (2 if self.cells.bidirectional else 1), 2)

    def forward(self, inputs: Tensor) -> Tensor:
        in_order = self.lengths is LENGTHS
        packed = pack_padded_sequence(self.linear(inputs), self.lengths, batch_first=True, enforce_sorted=in_order)
        outputs, states = self.cells(packed)
        outputs = outputs._replace(data=self.rows(outputs.data))
        return joined(pad_packed_sequence(outputs, batch_first=True)[0], states)


KINDS = (nn.LSTM, nn.GRU, nn.RNN)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positions first": {"batch_first": False},
    "without biases": {"bias": False},
    "deep, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": False},
    "dropout": {"num_layers": 3, "dropout": 0.4},
}
LAYERS = [(kind, form) for kind in KINDS for form in FORMS.values()] + [
    (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


def assert_same_in_a_block(model: nn.Module, values: Callable[[], Tensor]) -> None:
    plain = values()
    with Isopo(model, Given()).microbatch(A):
        torch.testing.assert_close(values(), plain, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_layers(kind: Any, options: dict[str, Any], training: bool) -> None:
    """Values, Gram matrices and gradients; also where dropout is on, whose draws are PyTorch's own."""
    model = Recurrent(kind, **options).double().train(training)

    def values() -> Tensor:
        torch.manual_seed(3)
        return score(model(X))

    assert_same_in_a_block(model, values)
    assert assert_per_sequence(model, values).copied() == {}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: Any, options: dict[str, Any]) -> None:
    """Each ends where it ends, for a state, for the reverse direction, and for a layer on packed rows."""
    model = Packed(kind, **options).double()
    assert_same_in_a_block(model, lambda: score(model(X)))
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


def test_packed_sequences_in_another_order_are_refused() -> None:
    model = Packed(nn.LSTM, torch.tensor([1, 3, 2, 2])).double()
    with (
        pytest.raises(ValueError, match=r"^parameter 'weight_ih_l0' of LSTM: expected packed sequences in the order"),
        Isopo(model, Given()).microbatch(A),
    ):
        model(X)
    assert_clean(model)
    expected = model(X)  # outside of a block nothing is refused; nor inside of one, where no gradient is asked for
    with torch.no_grad(), Isopo(model, Given()).microbatch(A):
        assert torch.equal(model(X), expected)
    packed = pack_padded_sequence(X, model.lengths, batch_first=True, enforce_sorted=False)
    expected = model.cells.requires_grad_(False)(packed)[0].data
    with Isopo(model, Given()).microbatch(A):
        assert torch.equal(model.cells(packed)[0].data, expected)


class Stepping(nn.Module):
    """A cell in a loop."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.linear, self.cell = nn.Linear(WIDTH, WIDTH), kind(WIDTH, HIDDEN, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        state, states = None, []
        for step in self.linear(inputs).unbind(1):
            state = self.cell(step, state)
            states.append(state if isinstance(state, Tensor) else torch.cat(state, dim=-1))
        return torch.stack(states, dim=1)


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any, options: dict[str, Any]) -> None:
    model = Stepping(kind, **options).double()
    assert_same_in_a_block(model, lambda: score(model(X)))
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


def test_a_cell_with_another_activation() -> None:
    model = Stepping(nn.RNNCell, nonlinearity="relu").double()
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


# --- What a layer may meet --------------------------------------------------------------------------------------------


class Encoded(Recurrent):
    """The first states depend on parameters too: one for each sequence, and one for all of them, which is expanded."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.encoder, self.start = nn.Linear(WIDTH, HIDDEN), nn.Parameter(torch.randn(1, HIDDEN))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.encoder(inputs.mean(dim=1)).unsqueeze(0)
        cell = self.start.expand(len(inputs), -1, -1).transpose(0, 1)
        return joined(*self.cells(self.linear(inputs), (hidden, cell)))


@pytest.mark.filterwarnings("ignore:start .expand.*each sequence gets a copy")
def test_first_states() -> None:
    model = Encoded().double()
    assert_same_in_a_block(model, lambda: score(model(X)))
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {"start": "expand"}


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_frozen_parameters(frozen: str) -> None:
    model = Recurrent(nn.GRU).double()
    model.cells.get_parameter(frozen).requires_grad_(False)
    assert_per_sequence(model, lambda: score(model(X)))


def test_a_layer_that_is_used_twice_and_recomputed() -> None:
    model = Recurrent(nn.LSTM).double()

    def values() -> Tensor:
        again = checkpoint(lambda x: model(x), X.flip(2), use_reentrant=False)
        return score(model(X)) + score(again).tanh()

    assert_per_sequence(model, values)


def test_the_list_of_weights_is_what_it_was_and_stays_where_it_is() -> None:
    """On a GPU `flatten_parameters` gives the parameters other memory, which must not happen inside of a block."""
    cells = nn.LSTM(WIDTH, HIDDEN, batch_first=True).double()
    weights, flattened = cells._flat_weights, []
    cells.__class__ = type("Noted", (nn.LSTM,), {"flatten_parameters": lambda self: flattened.append(self)})
    with Isopo(cells, Given()).microbatch(A):
        cells.flatten_parameters()
        cells(X)
    assert flattened == []
    assert cells._flat_weights is weights
    assert all(ours is theirs for ours, theirs in zip(weights, cells.parameters(), strict=True))
    cells(X)
    cells.flatten_parameters()
    assert flattened == [cells]


# --- Both transforms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gram", ["dense", "ghost"])
@pytest.mark.parametrize("kind", KINDS)
def test_fisher_norm(kind: Any, gram: str) -> None:
    """Σ_s A_s G_s / ‖G_s‖_F, with ‖G_s‖_F² the mean of K_ss'², from gradients of one sequence at a time."""
    cells = kind(WIDTH, HIDDEN, batch_first=True).double()
    rows = loop_gradients(list(cells.parameters()), lambda: score(cells(X)[0]))
    layer = torch.cat(list(rows.values()), dim=1)
    c = A / (layer @ layer.T).square().mean(dim=1).sqrt()
    with Isopo(cells, FisherNormalized(), gram=gram).microbatch(A):
        score(cells(X)[0]).sum().backward()
    for parameter, gradients in rows.items():
        expected = (c @ gradients).view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_token_norm() -> None:
    """A token is a position, for both weights: its gradient is that of parameters of its own for that step."""
    cells = nn.LSTM(WIDTH, HIDDEN, batch_first=True).double()
    own = [parameter.detach().expand(T, *parameter.shape).clone().requires_grad_() for parameter in cells.parameters()]
    state, outputs = (torch.zeros(S, HIDDEN).double(),) * 2, []
    for step, inputs in enumerate(X.unbind(1)):
        state = torch.lstm_cell(inputs, state, *[each[step] for each in own])
        outputs.append(state[0])
    values = score(torch.stack(outputs, dim=1))
    of_steps = [torch.autograd.grad(value, own, retain_graph=True) for value in values]
    tokens = torch.stack([torch.cat([each.flatten(1) for each in grads], dim=1) for grads in of_steps])  # (S, T, P)
    overlaps = tokens.sum(dim=1) @ tokens.flatten(0, 1).T
    isopo = Isopo(cells, FisherNormalized(norm="token", tokens=S * T))
    with isopo.microbatch(A) as block:
        score(cells(X)[0]).sum().backward()
    norms = overlaps.norm(dim=1) / tokens.norm()
    torch.testing.assert_close(block.coefficients["(root)"].double(), A / norms, rtol=1e-10, atol=1e-12)


# --- A policy, and mistakes -------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Log-probabilities of tokens, by a recurrent network."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.words, self.cells = nn.Embedding(7, WIDTH), nn.LSTM(WIDTH, HIDDEN, batch_first=batch_first)
        self.head = nn.Linear(HIDDEN, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs = self.head(self.cells(self.words(tokens[:, :-1]))[0])
        return outputs.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def test_verify_passes_on_a_policy() -> None:
    model, tokens = Policy(batch_first=True), torch.randint(7, (6, 7))  # with as many sequences as positions
    errors = verify(model.double(), lambda n: model(tokens[:n]), 6)
    assert errors.keys() == dict(model.named_parameters()).keys()
    assert max(errors.values()) < 1e-14
    errors = verify(model.float(), lambda n: model(tokens[:n]), 6)
    assert max(errors.values()) < 1e-5


def test_sequences_that_are_taken_for_positions_are_refused() -> None:
    model, tokens = Policy(batch_first=False).double(), torch.randint(7, (6, 9))
    with pytest.raises(
        ValueError, match=r"'cells\.weight_ih_l0': expected the S=6 sequences along axis 1, got 8 .*batch_first=True"
    ):
        verify(model, lambda n: model(tokens[:n]), 6)
    tokens = torch.randint(7, (6, 7))  # with as many positions as sequences, only the numbers show it
    with pytest.raises(ValueError, match=r"expected autograd's gradient with S=6 sequences, got another one"):
        verify(model, lambda n: model(tokens[:n]), 6)


def test_a_row_of_several_sequences_is_refused() -> None:
    model = nn.LSTM(WIDTH, HIDDEN, batch_first=True).double()
    with (
        pytest.raises(ValueError, match=r"'weight_ih_l0': expected one sequence in a row, got the segments of several"),
        Isopo(model, Given()).microbatch(A, segments=torch.tensor([[0, 0, 1, 2], [2, 3, 3, 3]])),
    ):
        model(torch.randn(2, 4, WIDTH).double())


def test_a_sequence_alone_and_a_single_step() -> None:
    cells = nn.GRU(WIDTH, HIDDEN, bidirectional=True).double()
    inputs = torch.randn(1, WIDTH).double()  # (T, n), without an axis of sequences
    (gram,) = engine.gram_matrices(cells, lambda: torch.tanh(cells(inputs)[0]).sum()).values()
    gradients = torch.autograd.grad(torch.tanh(cells(inputs)[0]).sum(), list(cells.parameters()))
    torch.testing.assert_close(gram, sum(each.square().sum() for each in gradients).view(1, 1))
