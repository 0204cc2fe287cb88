"""Rows of several sequences: flattened, picked, or packed. Each is exact, or refused where its history is not known."""

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from against_autograd import WIDTH, A, Given, S, T, X, assert_clean, score
from against_loop import assert_per_sequence
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isopo_mini import engine
from isopo_mini.engine import Isopo

quiet = pytest.mark.filterwarnings("ignore:.*each sequence gets a copy")


class After(nn.Module):
    """A linear layer, and what is done with its outputs in a module."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.module, self.function = nn.Linear(WIDTH, WIDTH), module, function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.module, self.linear(inputs))


def flattened(module: nn.Module, x: Tensor) -> Tensor:
    """`(S·T, d)`, as routers, GPT-2 and OPT have it."""
    return module(x.view(-1, WIDTH)).unflatten(0, (S, T))


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 3), nn.Softmax(-1))


def test_flattened_rows() -> None:
    model = After(feed_forward(), flattened).double()
    assert_per_sequence(model, lambda: score(model(X)))


def test_flattened_rows_that_are_recomputed() -> None:
    model = After(feed_forward(), lambda m, x: checkpoint(flattened, m, x, use_reentrant=False)).double()
    assert_per_sequence(model, lambda: score(model(X)))


@pytest.mark.parametrize("positions", [T, 1])
def test_flattened_tokens(positions: int) -> None:
    model, tokens = nn.Embedding(7, WIDTH).double(), torch.randint(7, (S, positions))

    def values() -> Tensor:
        return score(model(tokens.view(-1)).unflatten(0, (S, positions)))

    assert_per_sequence(model, values, grams=positions == 1)
    if positions > 1:  # the first input decides what S is
        with pytest.raises(ValueError, match=r"^log_probs: expected .* S=12 .*, got shape \(4,\)"):
            engine.gram_matrices(model, values)


@quiet
def test_flattened_rows_meet_copies() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.linear = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.layer_norm(x * (1.0 + self.weight), (WIDTH,), self.weight.exp()))

    model = After(Gain(), flattened).double()
    assert_per_sequence(model, lambda: score(model(X)))


class Experts(nn.Module):
    """Each expert has an entry of two stacks of weights and gets some of the rows; the second bias is indexed too."""

    def __init__(self, chosen: list[list[int]]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(len(chosen), 8, WIDTH))
        self.second = nn.Parameter(torch.randn(len(chosen), 4, WIDTH))
        self.bias = nn.Parameter(torch.randn(len(chosen), WIDTH))
        self.chosen = [torch.tensor(rows) for rows in chosen]

    def forward(self, rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for expert, index in enumerate(self.chosen):
            gate, up = F.linear(rows[index], self.first[expert]).chunk(2, dim=-1)
            outputs = (F.silu(gate) * up) @ self.second[torch.tensor(expert)] + self.bias[expert - len(self.chosen)]
            result.index_add_(0, index, outputs * rows[index, :1])
        return result


@pytest.mark.parametrize(
    "chosen", [[[0, 5, 7, 7, 11], [1, 2]], [[3, 2, 1, 0], [5, 4, 9, 8]], [[8], list(range(12))]], ids=str
)
def test_experts(chosen: list[list[int]]) -> None:
    """Also where an expert gets as many rows as there are sequences, and rows of one sequence only."""
    model = After(Experts(chosen), flattened).double()
    assert_per_sequence(model, lambda: score(model(X)))


def test_an_expert_that_gets_nothing_has_no_gradient() -> None:
    experts = Experts([[0, 5], [3]])
    experts.chosen[1] = torch.zeros(0, dtype=torch.int64)
    model = After(experts, flattened).double()
    with Isopo(model, Given()).microbatch(A):
        score(model(X)).sum().backward()
    assert experts.first.grad is not None
    assert experts.first.grad[0].any()
    assert not experts.first.grad[1].any()


PARTS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "as many rows as sequences": lambda x: x.split(S),
    "chunks": lambda x: x.chunk(5),
    "of different lengths": lambda x: x.split([2, 7, 3]),
    "slices": lambda x: (x[:5], x[5:-3], x[-3:]),
    "selected": lambda x: (x.index_select(0, torch.arange(7)), x.narrow(0, 7, 5)),
    "parts of parts": lambda x: (*x[:8].split(3), *(x[8:] * 1.0).chunk(2)),
}


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_flattened_rows(parts: str) -> None:
    """As experts get them when the tokens were sorted first."""

    def apply(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([m(part) for part in PARTS[parts](x.view(-1, WIDTH))]).unflatten(0, (S, T))

    model = After(feed_forward(), apply).double()
    assert_per_sequence(model, lambda: score(model(X)))


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "sorted": lambda x: x.reshape(-1, WIDTH).sort(dim=0)[0],
    "positions first": lambda x: x.transpose(0, 1).reshape(-1, WIDTH),
    "joined": lambda x: torch.cat([x[:, 0], x[:, 1], x[:, 2]]),
    "cumulated over all": lambda x: x.view(-1, WIDTH).softmax(0),
    "a multiple by chance": lambda x: x.flatten().cumsum(0).view(-1, 1).expand(-1, WIDTH)[: S * 7].clone(),
    "as many as sequences, by chance": lambda x: x.reshape(-1, WIDTH).sort(dim=0)[0][torch.tensor([0, 5, 2, 7])],
}


@pytest.mark.parametrize("rows", UNKNOWN)
def test_rows_whose_sequences_are_not_known_are_refused(rows: str) -> None:
    model = After(nn.Linear(WIDTH, 2), lambda m, x: m(UNKNOWN[rows](x))).double()
    with (
        pytest.raises(ValueError, match=r"parameter 'module\.weight': expected an input whose first axis is the S=4"),
        Isopo(model, Given()).microbatch(A),
    ):
        model(X).sum().backward()
    assert_clean(model)


# --- Packing ---------------------------------------------------------------------------------------------------------

LENGTHS = (3, 1, 4, 2)
INDEX = torch.cat([torch.full((length,), sequence) for sequence, length in enumerate(LENGTHS)])
TOKENS = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5])


class Words(nn.Module):
    """What a transformer does to one position: nothing here mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, WIDTH), nn.Embedding(9, WIDTH)
        self.norm, self.gain = nn.LayerNorm(WIDTH), nn.Parameter(torch.rand(WIDTH))
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens `(R, T)` to logits `(R, T, 7)`."""
        hidden = self.norm(self.words(tokens) + self.positions(positions))
        hidden = hidden + self.layers(hidden.view(-1, WIDTH)).view_as(hidden)
        return F.linear(hidden * (1 + self.gain), self.words.weight)


POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])
PACKINGS = {
    "one row": (TOKENS[None], POSITIONS[None], INDEX[None]),
    "two rows": (TOKENS.view(2, 5), POSITIONS.view(2, 5), INDEX.view(2, 5)),
    "shuffled": tuple(each[None, torch.tensor([4, 0, 9, 2, 1, 7, 8, 3, 6, 5])] for each in (TOKENS, POSITIONS, INDEX)),
    "padded": tuple(
        F.pad(each[None], (1, 2), value=value) for each, value in ((TOKENS, 0), (POSITIONS, 0), (INDEX, -1))
    ),
}


@quiet
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences(packing: str) -> None:
    """The same as each sequence for itself, wherever its tokens are."""
    tokens, positions, index = PACKINGS[packing]
    model = Words().double()

    def values() -> Tensor:
        log_probs = model(tokens, positions).log_softmax(-1)[..., 2]
        return torch.stack([log_probs[index == sequence].sum() for sequence in range(S)])

    assert_per_sequence(model, values, segments=index)


@pytest.mark.usefixtures("unchecked")
def test_segments_are_checked() -> None:
    isopo = Isopo(nn.Linear(2, 2), Given())
    for segments, came in (
        (torch.zeros(1, 3), r"got torch.float32 of shape \(1, 3\)"),
        (torch.tensor([[0, 4]]), "got 0 to 4"),
        (torch.tensor([[-1, -1]]), "got -1 to -1"),
        (torch.zeros(0, dtype=torch.int64), "got no tokens"),
    ):
        with pytest.raises(ValueError, match=f"^segments: expected .*{came}"):
            isopo.microbatch(A, segments=segments).__enter__()
    with (
        pytest.raises(ValueError, match=r"S=4 sequences, in the segments \(1, 10\), got shape \(4, 2\)"),
        isopo.microbatch(A, segments=INDEX[None]),
    ):
        isopo.model(torch.ones(4, 2))
