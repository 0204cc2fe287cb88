"""Every way we know to use the engine wrongly: none ends in silence.

Each is exact, or an error that names what is wrong, or, where nothing inside of a block could show it, found by
`verify`. What else may happen inside of a block: `test_inside_of_a_block.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from against_autograd import (
    WIDTH,
    A,
    Given,
    S,
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

from isopo_mini.engine import NTK, Isopo, verify

ORDER = torch.tensor([2, 0, 3, 1])
OUTSIDE = nn.Linear(WIDTH, WIDTH).double()
PLAIN_TENSOR = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)


class Wrong(nn.Module):
    """A layer, and what is done with it wrongly."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.table = nn.BatchNorm1d(WIDTH, affine=False), nn.Embedding(9, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(T))
        self.do = forward

    def forward(self, inputs: Tensor) -> Tensor:
        return self.do(self, inputs)


def put_back(rows: Tensor) -> Tensor:
    outputs = torch.zeros_like(rows)
    outputs[ORDER] = rows
    return outputs


def by_experts(split: bool) -> Callable[[Any, Tensor], Tensor]:
    """Each expert gets S of the S·T token rows, so that their shape gives nothing away."""
    order = torch.randperm(S * T, generator=torch.Generator().manual_seed(0))

    def forward(model: Any, inputs: Tensor) -> Tensor:
        rows = torch.tanh(model.layer(inputs)).flatten(0, 1)
        parts = rows[order].split(S) if split else [rows[chosen] for chosen in order.split(S)]
        outputs = [expert(part) for expert, part in zip(model.experts, parts, strict=True)]
        return torch.zeros_like(rows).index_add(0, order, torch.cat(outputs)).view(inputs.shape)

    return forward


def normalised(model: Any, inputs: Tensor) -> Tensor:
    return model.norm(model.layer(inputs).transpose(1, 2))


def normalised_by_hand(model: Any, inputs: Tensor) -> Tensor:
    outputs = model.layer(inputs)
    return outputs - outputs.mean(dim=0)


# What is done, and what is said: an error inside of the block, or None where only `verify` can see it.
MIXED = r"^parameter 'layer\.\w+': .* got a batch normalisation in training mode .* call eval\(\) on that module"
REORDERED = r"^parameter 'layer\.\w+': expected the S=4 sequences in the order of .* sort the batch, and the advantages"
STRANGER = r"^model: expected every trainable parameter .* shape \(5,( 5)?\) outside of it.* put both into one module"
MODELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str | None]] = {
    "batch sorted inside": (lambda m, x: m.layer(x[ORDER])[ORDER.argsort()], REORDERED),
    "sorted, by index_select": (lambda m, x: m.layer(x[ORDER]).index_select(0, ORDER.argsort()), REORDERED),
    "sorted, and put back by assignment": (lambda m, x: put_back(m.layer(x[ORDER])), REORDERED),
    "sorted, by flip": (lambda m, x: m.layer(x.flip(0)).flip(0), None),
    "batch norm": (normalised, MIXED),
    "batch norm as a function": (lambda m, x: F.batch_norm(m.layer(x)[:, 0], None, None, training=True), MIXED),
    "normalised by hand": (normalised_by_hand, None),
    "time first, T = S": (lambda m, x: m.layer(x.repeat(1, 2, 1)[:, :S].transpose(0, 1)).transpose(0, 1), None),
    "a parameter outside of the model": (lambda m, x: OUTSIDE(m.layer(x)), STRANGER),
    "a tensor outside of the model": (lambda m, x: m.layer(x) * PLAIN_TENSOR, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_right(name: str) -> None:
    forward, message = MODELS[name]
    model = Wrong(forward).double()
    if message is not None:
        with pytest.raises(ValueError, match=message):
            engine_gradients(model, lambda: score(model(X)))
        assert all(parameter.grad is None for parameter in (*model.parameters(), *OUTSIDE.parameters()))
    with pytest.raises(ValueError, match=r"^parameter '|^model: expected|^log_probs: expected nothing trainable but"):
        verify(model, lambda n: score(model(X[:n])), S)
    assert_clean(model)


RIGHT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "experts with S tokens each": by_experts(split=False),
    "experts, tokens sorted first": by_experts(split=True),
    "batch norm in evaluation": lambda m, x: F.batch_norm(
        m.layer(x)[:, 0], torch.zeros(5).double(), torch.ones(5).double()
    ),
    "batch norm of data": lambda m, x: m.layer(m.norm(x.transpose(1, 2)).transpose(1, 2)),
    "instance norm": lambda m, x: F.instance_norm(m.layer(x).transpose(1, 2)),
    "a position chosen for each sequence": lambda m, x: m.layer(torch.tanh(m.first(x))[range(S), ORDER % T]),
    "the same, of flat rows": lambda m, x: m.layer(torch.tanh(m.first(x)).flatten(0, 1)[torch.arange(S) * T + 1]),
    "the same, by a mask": lambda m, x: m.layer(torch.tanh(m.first(x))[F.one_hot(ORDER % T, T).bool()]),
    "positions in another order": lambda m, x: m.layer(torch.tanh(m.first(x))[:, [2, 0, 1]]),
    "frozen batch order": lambda m, x: m.layer(x[ORDER][ORDER.argsort()]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_like_it_and_is_right(name: str) -> None:
    model = Wrong(RIGHT[name]).double()
    with torch.no_grad():
        model.norm(X.transpose(1, 2))
    expected = autograd_gradients(model, lambda: score(model(X)))
    assert_exact(engine_gradients(model, lambda: score(model(X))), expected)


# --- The loss -----------------------------------------------------------------------------------------------------


def log_probs_of(model: nn.Module) -> Callable[[int], Tensor]:
    return lambda n: model(X[:n]).log_softmax(-1)


def chosen(logs: Tensor) -> Tensor:
    return logs[..., 0]


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "an entropy bonus": (lambda logs: -chosen(logs).sum() + 0.1 * (logs.exp() * logs).sum(), "any other term"),
    "a KL penalty": (lambda logs: -chosen(logs).sum() + 0.1 * chosen(logs).square().sum(), "a KL penalty"),
    "advantages": (lambda logs: -(A[: len(logs), None] * chosen(logs)).sum(), "advantages enter through the coefficie"),
    "a mean": (lambda logs: -chosen(logs).mean(), r"got -0\.0833333 times it with S=4 .* loss_scale=0\.0833333"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_the_sum_of_the_log_probabilities(name: str) -> None:
    """All of it is multiplied by c, and no layer can see what of its gradient comes from where."""
    (loss, message), model = LOSSES[name], perceptron()
    log_probs = log_probs_of(model)
    with pytest.raises(ValueError, match=rf"^loss: expected plus or minus .*{message}"):
        verify(model, lambda n: chosen(log_probs(n)), S, loss=lambda n: loss(log_probs(n)))


def test_a_loss_that_is() -> None:
    model = perceptron()
    log_probs = log_probs_of(model)
    for scale in (1.0, -1.0, 0.25):
        errors = verify(
            model,
            lambda n: chosen(log_probs(n)),
            S,
            loss=lambda n, scale=scale: scale * chosen(log_probs(n)).sum(),  # type: ignore[misc]
            loss_scale=abs(scale),
        )
        assert len(errors) == 4
    with pytest.raises(ValueError, match=r"^loss: expected a tensor without axes, got \(4, 3\)$"):
        verify(model, lambda n: chosen(log_probs(n)), S, loss=lambda n: chosen(log_probs(n)))
    with pytest.raises(ValueError, match=r"^loss_scale: expected a finite number > 0, got 0"):
        verify(model, lambda n: chosen(log_probs(n)), S, loss_scale=0.0)


def test_one_loss_in_two_backward_passes_is_named() -> None:
    """Each would be transformed by itself: 17 % off for two halves of this one."""
    model = perceptron()

    def halves() -> None:
        outputs = torch.tanh(model(X))
        outputs[:, 0].sum().backward(retain_graph=True)
        outputs[:, 1:].sum().backward()

    message = r"^parameter '2\.weight': expected one backward pass .* call backward\(\) once"
    with pytest.raises(RuntimeError, match=message), Isopo(model, NTK(1.0)).microbatch(A):
        halves()
    assert_clean(model)


def test_a_backward_pass_after_the_block_is_named() -> None:
    model = perceptron()
    with Isopo(model, NTK(1.0)).microbatch(A):
        total = score(model(X)).sum()
    with pytest.raises(
        RuntimeError, match=r"^parameter '2\.weight': expected the backward pass inside of the microbatch"
    ):
        total.backward()


def test_another_loss_may_be_differentiated_inside_of_the_block() -> None:
    """A critic's, which no layer of the model has a part in."""
    model, critic = perceptron(), nn.Linear(WIDTH, 1).double()
    with Isopo(model, Given()).microbatch(A):
        score(model(X)).sum().backward()
        critic(X).square().mean().backward()
    expected = autograd_gradients(model, lambda: score(model(X)))
    assert_exact({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    assert critic.weight.grad is not None
