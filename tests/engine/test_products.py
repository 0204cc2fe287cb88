"""Every way of writing a product with a weight is exact, and costs no copies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from against_autograd import WIDTH, S, T, X, score
from against_loop import Own, assert_per_sequence
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    return x.view(-1, WIDTH)


PRODUCTS: dict[str, tuple[Any, ...]] = {
    "@": (lambda x, w: x @ w, (WIDTH, 2)),
    "@ w.T": (lambda x, w: x @ w.T, (2, WIDTH)),
    "@ w.mT": (lambda x, w: x @ w.mT, (2, WIDTH)),
    "@ w.t()": (lambda x, w: x @ w.t(), (2, WIDTH)),
    "@ w.transpose": (lambda x, w: x @ w.transpose(-1, 0), (2, WIDTH)),
    "matmul": (lambda x, w: torch.matmul(x, w.T), (2, WIDTH)),
    "mm": (lambda x, w: torch.mm(rows(x), w).view(S, T, 2), (WIDTH, 2)),
    "addmm": (lambda x, w, b: torch.addmm(b, rows(x), w).view(S, T, 2), (WIDTH, 2), (2,)),
    "addmm with w.T": (lambda x, w, b: torch.addmm(b, rows(x), w.T).view(S, T, 2), (2, WIDTH), (2,)),
    "linear with w.T": (lambda x, w, b: F.linear(x, w.T, b), (WIDTH, 2), (2,)),
    "einsum": (lambda x, w: torch.einsum("sti,oi->sto", x, w), (2, WIDTH)),
    "einsum with w.T": (lambda x, w: torch.einsum("...i, io -> ...o", x, w), (WIDTH, 2)),
    "two uses": (lambda x, w: torch.tanh(x @ w) @ w.T + F.linear(x, w), (WIDTH, WIDTH)),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products(product: str) -> None:
    function, *shapes = PRODUCTS[product]
    model = Own(function, *shapes).double()
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


@pytest.mark.filterwarnings("ignore:.*each sequence gets a copy")
@pytest.mark.parametrize("equation", ["sti,oj->sto", "sti,ij->ts", "sti,ti->sti", "sti,si->st"])
def test_other_equations_go_to_the_copies_or_are_refused(equation: str) -> None:
    """What is no product of every position with the weight must not be taken for one."""
    sizes = {"s": S, "t": T, "i": WIDTH, "o": 2, "j": 2}
    shape = tuple(sizes[letter] for letter in equation.split(",")[1].split("->")[0])
    model = Own(lambda x, w: torch.einsum(equation, x, w), shape).double()
    if equation in ("sti,oj->sto", "sti,ti->sti"):
        assert assert_per_sequence(model, lambda: score(model(X))).copied() == {"own.0": "einsum"}
    else:
        with pytest.raises(ValueError, match=r"parameter 'own\.0'"):
            assert_per_sequence(model, lambda: score(model(X).reshape(S, -1)))


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(T, 4, 3, padding=1),
    "1d, stride and dilation": lambda: nn.Conv1d(T, 4, 2, stride=2, dilation=2, bias=False),
    "2d": lambda: nn.Sequential(nn.Unflatten(1, (T, 1)), nn.Conv2d(T, 4, (1, 2), padding=(1, 0), stride=(1, 2))),
    "2d, of an image": lambda: nn.Sequential(nn.Unflatten(1, (1, T)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh()),
}


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolutions(convolution: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), CONVOLUTIONS[convolution]()).double()
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


class Attending(nn.Module):
    """`nn.MultiheadAttention` with other arguments each time."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, 6), function
        self.attention = nn.MultiheadAttention(6, 2, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.attention, self.linear(inputs))


MASK = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
PADDING = torch.tensor([[False] * T] * (S - 1) + [[True] + [False] * (T - 1)])
ATTENTIONS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, Any]]] = {
    "self": (lambda m, x: m(x, x, x)[0], {"batch_first": True}),
    "positions first": (lambda m, x: m(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1), {}),
    "to another": (lambda m, x: m(x, x[:, :2].tanh(), x[:, :2].tanh())[0], {"batch_first": True, "bias": False}),
    "masked": (lambda m, x: m(x, x, x, attn_mask=MASK)[0], {"batch_first": True}),
    "padded": (lambda m, x: m(x, x, x, key_padding_mask=PADDING)[0], {"batch_first": True, "add_zero_attn": True}),
    "weights": (lambda m, x: m(x, x, x, average_attn_weights=False)[1], {"batch_first": True}),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_of_torch(attention: str) -> None:
    function, options = ATTENTIONS[attention]
    model = Attending(function, **options).double()
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


def test_a_transformer_layer_of_torch() -> None:
    model = nn.TransformerEncoderLayer(WIDTH + 1, 2, 8, batch_first=True, dropout=0.0).double()
    inputs = torch.randn(S, T, WIDTH + 1).double()
    assert assert_per_sequence(model, lambda: score(model(inputs))).copied() == {}
