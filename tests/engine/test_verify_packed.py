"""`verify` on packed sequences: a model must keep those of a row apart, and one that does not is found out."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from isopo_mini.engine import verify

WORDS, WIDTH = 7, 6
LENGTHS = (3, 1, 4, 2)
INDEX = torch.cat([torch.full((length,), sequence) for sequence, length in enumerate(LENGTHS)])[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5, 3, 5]])


class Attention(nn.Module):
    """One layer of causal attention over a row; `apart`: within each of its sequences."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(5, WIDTH)
        self.projection, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WORDS)
        self.apart = apart

    def forward(self, tokens: Tensor, positions: Tensor, index: Tensor) -> Tensor:
        """Rows `(R, T)` to the log-probability of some word after each of their tokens."""
        hidden = self.words(tokens) + self.positions(positions)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        if self.apart:
            mask = mask & (index[:, :, None] == index[:, None, :])
        hidden = hidden + F.scaled_dot_product_attention(*self.projection(hidden).chunk(3, dim=-1), attn_mask=mask)
        return self.head(hidden).log_softmax(-1)[..., 2]


class Packed:
    """The first sequences of a row, which ends with a token of padding."""

    def __init__(self, apart: bool) -> None:
        self.model = Attention(apart).double()

    def segments(self, count: int) -> Tensor:
        return F.pad(INDEX[:, : sum(LENGTHS[:count])], (0, 1), value=-1)

    def of_tokens(self, count: int) -> Tensor:
        tokens, positions = (F.pad(each[:, : sum(LENGTHS[:count])], (0, 1)) for each in (TOKENS, POSITIONS))
        return self.model(tokens, positions, self.segments(count))

    def of_sequences(self, count: int) -> Tensor:
        values, index = self.of_tokens(count), self.segments(count)
        return torch.stack([values[index == sequence].sum() for sequence in range(count)])

    def loss(self, count: int) -> Tensor:
        return -self.of_sequences(count).sum()


@pytest.mark.parametrize("form", ["of_tokens", "of_sequences"])
def test_a_model_that_keeps_them_apart(form: str) -> None:
    packed = Packed(apart=True)
    errors = verify(packed.model, getattr(packed, form), 4, segments=packed.segments, loss=packed.loss)
    assert errors.keys() == dict(packed.model.named_parameters()).keys()
    assert max(errors.values()) < 1e-14


@pytest.mark.parametrize("form", ["of_tokens", "of_sequences"])
def test_a_model_that_does_not(form: str) -> None:
    """All below the attention is wrong: its parameters meet tokens of one sequence for the sake of another."""
    packed = Packed(apart=False)
    with pytest.raises(ValueError, match=r"autograd's gradient with S=4 .*'words\.weight' \(.*no sequence may influe"):
        verify(packed.model, getattr(packed, form), 4, segments=packed.segments)


def test_log_probabilities_of_neither_tokens_nor_sequences() -> None:
    packed = Packed(apart=True)
    with pytest.raises(
        ValueError, match=r"^log_probs: expected .* S=4 sequences, or .* tokens \(1, 11\), got \(1, 10\)"
    ):
        verify(packed.model, lambda n: packed.of_tokens(n)[:, 1:], 4, segments=packed.segments)
    with pytest.raises(ValueError, match=r"^segments: expected sequences from 0 to 2, got -1 to 3"):
        verify(packed.model, packed.of_tokens, 4, segments=lambda _: packed.segments(4))
