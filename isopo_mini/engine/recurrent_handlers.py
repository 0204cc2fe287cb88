"""`nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells, written out step by step.

PyTorch's functions hide the steps, and with them what a weight is multiplied by. Here each weight of a layer is used
once, for all positions, as that of any other layer is. But the hidden states h_t that W meets are not known before W is
used. So the recurrence runs twice: without a graph, which finds their values h̄_t, and then with

    W h_t = W h̄_t + W (h_t − h̄_t).

The first product is the use, of inputs `(S, T, h)`. In the second, which is zero but for rounding, W is a constant: it
passes the gradient on to h_t.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini.engine.layer_functions import values_of
from isopo_mini.engine.segments import Segments, remember
from isopo_mini.engine.stand_in import Copied, StandIn, register

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM, each (S, d)
Cell = Callable[[Tensor, Tensor, State], State]  # of W_i x + b_i, W_h h + b_h, and the state before
Product = Callable[[int, Tensor], Tensor]  # of the number of a step and what a weight is multiplied by there


class Weights(NamedTuple):
    """The parameters of one layer in one direction, g numbers in all gates together."""

    input: Tensor  # (g, n)
    hidden: Tensor  # (g, h)
    input_bias: Tensor | None = None  # (g,)
    hidden_bias: Tensor | None = None  # (g,)
    projection: Tensor | None = None  # (p, h) of an LSTM whose outputs are projected

    @classmethod
    def of_list(cls, tensors: Sequence[Tensor], has_biases: bool) -> "Weights":
        """From the order that PyTorch has them in."""
        biases = 2 if has_biases else 0
        matrices = [*tensors[:2], *tensors[2 + biases :]]
        return cls(*matrices[:2], *(tensors[2:4] if has_biases else (None, None)), *matrices[2:])


# --- One step ------------------------------------------------------------------------------------------------------


def _lstm_cell(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    input_gate, forget_gate, candidate, output_gate = (from_input + from_hidden).chunk(4, dim=-1)
    cell = forget_gate.sigmoid() * state[1] + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell


def _gru_cell(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    gates = zip(from_input.chunk(3, dim=-1), from_hidden.chunk(3, dim=-1), strict=True)
    (reset_input, reset_hidden), (update_input, update_hidden), (candidate_input, candidate_hidden) = gates
    update = (update_input + update_hidden).sigmoid()
    candidate = (candidate_input + (reset_input + reset_hidden).sigmoid() * candidate_hidden).tanh()
    return ((state[0] - candidate) * update + candidate,)


def _tanh_cell(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    return ((from_input + from_hidden).tanh(),)


def _relu_cell(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    return ((from_input + from_hidden).relu(),)


# --- All steps -----------------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """What a recurrence went through; each of the lists has T entries `(S, d)`."""

    before: list[Tensor]  # h_{t−1}
    unprojected: list[Tensor]  # o ∘ tanh c, of which h is a projection
    after: list[Tensor]  # h_t
    last: State


def _steps(
    cell: Cell,
    from_inputs: Sequence[Tensor],
    state: State,
    active: Sequence[Tensor] | None,
    recurrent: Product,
    project: Product,
) -> _Steps:
    """One step after the other. A sequence that is not `active` any more, `(S, 1)` a step, keeps its state."""
    steps = _Steps([], [], [], state)
    for step, from_input in enumerate(from_inputs):
        steps.before.append(state[0])
        hidden, *rest = cell(from_input, recurrent(step, state[0]), state)
        steps.unprojected.append(hidden)
        new = (project(step, hidden), *rest)
        if active is not None:
            new = tuple(torch.where(active[step], *pair) for pair in zip(new, state, strict=True))
        state = new
        steps.after.append(state[0])
    return steps._replace(last=state)


class _ProductOfAllSteps:
    """W x_t + b, step by step: one use of W and b for all steps, from values x̄_t `(S, T, d)` known before."""

    def __init__(self, weight: Tensor, bias: Tensor | None, known: Float[Tensor, "S T d"]) -> None:
        self._of_known = F.linear(known, weight, bias).unbind(1)
        self._known = known.unbind(1)
        self._constant = values_of(weight).detach()

    def __call__(self, step: int, inputs: Tensor) -> Tensor:
        return self._of_known[step] + F.linear(inputs - self._known[step], self._constant)


def _one_direction(
    cell: Cell, weights: Weights, inputs: Float[Tensor, "S T n"], state: State, lengths: Int[Tensor, "S"] | None
) -> tuple[Float[Tensor, "S T h"], State]:
    """The hidden states of one layer in one direction, and its last state."""
    active = None
    if lengths is not None:
        active = (torch.arange(inputs.shape[1], device=lengths.device) < lengths[:, None]).unsqueeze(-1).unbind(1)
    run = partial(_steps, cell, F.linear(inputs, weights.input, weights.input_bias).unbind(1), state, active)
    with torch.no_grad():
        plain = Weights(*map(values_of, weights))
        known = run(
            lambda _, hidden: F.linear(hidden, plain.hidden, plain.hidden_bias),
            lambda _, hidden: hidden if plain.projection is None else F.linear(hidden, plain.projection),
        )
        before, unprojected = (torch.stack(each, dim=1) for each in (known.before, known.unprojected))
    project: Product = lambda _, hidden: hidden  # noqa: E731
    if weights.projection is not None:
        project = _ProductOfAllSteps(weights.projection, None, unprojected)
    steps = run(_ProductOfAllSteps(weights.hidden, weights.hidden_bias, before), project)
    return torch.stack(steps.after, dim=1), steps.last


def _reversed(inputs: Float[Tensor, "S T d"], lengths: Int[Tensor, "S"] | None) -> Float[Tensor, "S T d"]:
    """Each sequence from its end to its beginning; what comes after its end stays where it is."""
    if lengths is None:
        return inputs.flip(1)
    positions, lengths = torch.arange(inputs.shape[1], device=lengths.device), lengths[:, None]
    mirrored = torch.where(positions < lengths, lengths - 1 - positions, positions)
    return inputs.gather(1, mirrored.unsqueeze(-1).expand_as(inputs))


def _layers(
    cell: Cell,
    weights: list[Weights],
    inputs: Float[Tensor, "S T n"],
    states: State,
    lengths: Int[Tensor, "S"] | None,
    dropout: float,
    directions: int,
) -> tuple[Float[Tensor, "S T d"], State]:
    """Layer upon layer: the outputs of the last, and the last states `(layers · directions, S, d)` of all."""
    last = []
    for first in range(0, len(weights), directions):
        if first > 0 and dropout > 0:  # drawn with the positions first, as PyTorch does
            inputs = F.dropout(inputs.transpose(0, 1).contiguous(), dropout).transpose(0, 1)
        outputs = []
        for index in range(first, first + directions):
            turn = partial(_reversed, lengths=lengths) if index > first else lambda each: each
            state = tuple(each[index] for each in states)
            hidden, state = _one_direction(cell, weights[index], turn(inputs), state, lengths)
            outputs.append(turn(hidden))
            last.append(state)
        inputs = torch.cat(outputs, dim=2)
    return inputs, tuple(torch.stack(each) for each in zip(*last, strict=True))


# --- PyTorch's functions -------------------------------------------------------------------------------------------


def _recurrent(cell: Cell, *args: Any) -> Any:
    """`torch.lstm` and the like: outputs and last states, of `(S, T, n)` or `(T, S, n)`, or of packed rows."""
    if isinstance(args[3], (list, tuple)):
        data, batch_sizes, *rest = args
        batch_first = None
    else:
        data, *rest, batch_first = args
    states, tensors, has_biases, num_layers, dropout, training, bidirectional = rest
    states = (states,) if isinstance(states, Tensor) else tuple(states)
    if any(isinstance(each, (StandIn, Copied)) for each in (data, *states)):
        return NotImplemented
    _check_rows(tensors, data, states[0].shape[1], batch_first)
    directions = 2 if bidirectional else 1
    each = len(tensors) // (num_layers * directions)
    weights = [Weights.of_list(tensors[start : start + each], has_biases) for start in range(0, len(tensors), each)]
    run = partial(_layers, cell, weights, dropout=dropout if training else 0.0, directions=directions)
    if batch_first is not None:
        outputs, last = run(data if batch_first else data.transpose(0, 1), states, None)
        return (outputs if batch_first else outputs.transpose(0, 1)), *last
    padded, lengths = torch._pad_packed_sequence(data, batch_sizes, True, 0.0, len(batch_sizes))
    outputs, last = run(padded, states, lengths.to(data.device))
    return _packed(outputs, lengths, batch_sizes), *last


def _check_rows(tensors: Sequence[Tensor], data: Tensor, count: int, batch_first: bool | None) -> None:
    """There must be one row a sequence: a recurrence would carry the state of one on to the next in the same row."""
    slot = next(each.slot for each in tensors if isinstance(each, StandIn))
    if slot.layer.segments is not None:
        raise ValueError(
            f"parameter '{slot.name}': expected one sequence in a row, got the segments of several, which a recurrent "
            f"layer does not keep apart; give it a sequence a row, padded or by pack_padded_sequence, and no segments"
        )
    if slot.layer.num_sequences not in (None, count):
        where = "in the packed rows" if batch_first is None else f"along axis {0 if batch_first else 1}"
        raise ValueError(
            f"parameter '{slot.name}': expected the S={slot.layer.num_sequences} sequences {where}, got {count} in an "
            f"input of shape {tuple(data.shape)}; the sequences are the first axis with batch_first=True, and the "
            f"second without it"
        )


def _packed(outputs: Float[Tensor, "S T d"], lengths: Int[Tensor, "S"], batch_sizes: Int[Tensor, "T"]) -> Tensor:
    """Outputs `(N, d)` as a `PackedSequence` has them, with a note whose rows they are."""
    rows = torch._pack_padded_sequence(outputs, lengths, True)[0]
    index = torch.cat([torch.arange(count) for count in batch_sizes.tolist()])
    return remember(rows, Segments(index.to(rows.device), len(lengths)))


def _one_step(
    cell: Cell,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """`torch.lstm_cell` and the like: the state `(S, h)` after a step with inputs `(S, n)`."""
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if any(isinstance(each, (StandIn, Copied)) for each in (input, *state)):
        return NotImplemented
    after = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
    return after[0] if isinstance(hx, Tensor) else after


for _cell, _layer_function, _step_function in (
    (_lstm_cell, torch.lstm, torch.lstm_cell),
    (_gru_cell, torch.gru, torch.gru_cell),
    (_tanh_cell, torch.rnn_tanh, torch.rnn_tanh_cell),
    (_relu_cell, torch.rnn_relu, torch.rnn_relu_cell),
):
    register(_layer_function)(partial(_recurrent, _cell))
    register(_step_function)(partial(_one_step, _cell))
