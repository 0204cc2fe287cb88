"""Positions that are looked up once for all sequences are noticed; rows of sequences may be used as they are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from against_autograd import WIDTH, A, Given, S, assert_clean, assert_exact, autograd_gradients, engine_gradients, score
from torch import Tensor

from isopo_mini import engine
from isopo_mini.engine import Isopo
from isopo_mini.policies import TabularSoftmax


class Positions(nn.Module):
    """Words and positions, the positions looked up once for all sequences."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(9, WIDTH), nn.Embedding(9, WIDTH)
        self.combine = combine

    def forward(self, tokens: Tensor) -> Tensor:
        return self.combine(self.words(tokens), self.positions(torch.arange(tokens.shape[1])))


COMBINATIONS = [
    torch.add,
    lambda words, positions: words + positions,
    lambda words, positions: positions + words,
    lambda words, positions: words * positions,
    lambda words, positions: positions - words,
    lambda words, positions: words.add_(positions),
]


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("length", [S, S + 1])
def test_positions_that_are_taken_for_sequences_are_noticed(length: int, combine: Callable[..., Tensor]) -> None:
    """Also where there are as many of the one as of the other: there the shape of the indices does not show it."""
    model, tokens = Positions(combine).double(), torch.randint(9, (S, length))
    for run in (engine_gradients, engine.gram_matrices):
        with pytest.raises(ValueError, match=r"^parameter '(positions|words)\.weight': expected .* \(S, T\)"):
            run(model, lambda: score(model(tokens)))
    assert_clean(model)


def test_positions_of_every_sequence_are_exact() -> None:
    model, tokens = Positions(torch.add).double(), torch.randint(9, (S, S))

    def forward() -> Tensor:
        return score(model.words(tokens) + model.positions(torch.arange(S).expand(S, S)))

    assert_exact(engine_gradients(model, forward), autograd_gradients(model, forward))


class Contexts(nn.Module):
    """One row a sequence, which meets positions along an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.layer = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, indices: Tensor, inputs: Tensor) -> Tensor:
        rows = self.context(indices) * self.gain  # (S, d)
        rows += inputs[:, 1]
        rows = self.layer(self.context(indices)) + torch.tanh(rows)
        both = self.context(indices) + torch.stack([rows, inputs[:, 0]])  # (2, S, d): another first axis
        return self.layer(inputs + rows[:, None]) + both.mean(dim=0)[:, None]


def test_rows_of_sequences_may_be_used_in_every_other_way() -> None:
    model, indices, inputs = Contexts().double(), torch.randint(7, (S,)), torch.randn(S, S, WIDTH).double()

    def forward() -> Tensor:
        return score(model(indices, inputs))

    assert_exact(engine_gradients(model, forward), autograd_gradients(model, forward))
    grams = engine.gram_matrices(model, forward)
    assert set(grams) == {"(root)", "context", "layer"}
    # One sequence alone has no second axis to be mistaken for.
    alone = Positions(torch.add).double()
    one = torch.randint(9, (1, 1))
    with Isopo(alone, Given()).microbatch(A[:1]):
        score(alone(one)).sum().backward()
    assert alone.positions.weight.grad is not None


def test_a_table_of_states_is_exact() -> None:
    policy, states = TabularSoftmax(7, 3).double(), torch.tensor([0, 3, 3, 5])

    def forward() -> Tensor:
        return policy.logits(states).log_softmax(-1)[:, 1]

    assert_exact(engine_gradients(policy, forward), autograd_gradients(policy, forward))
