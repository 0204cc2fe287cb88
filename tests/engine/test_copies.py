"""What no handler covers: a copy for each sequence, exact, announced, within its memory; or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from against_autograd import WIDTH, A, Given, S, T, X, assert_clean, score
from against_loop import Own, assert_per_sequence
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isopo_mini import engine
from isopo_mini.engine import Isopo, UnhandledParameterError

quiet = pytest.mark.filterwarnings("ignore:.*each sequence gets a copy")


def in_place(x: Tensor, w: Tensor) -> Tensor:
    result = x * 2
    result += w.exp()
    return result


USES: dict[str, tuple[Any, ...]] = {
    "Gemma's gain": (lambda x, w: x * (1.0 + w.float().double()), (WIDTH,)),
    "divided": (lambda x, w: x / w.exp(), (WIDTH,)),
    "a scalar": (lambda x, w: x / w, ()),
    "a gain of every position": (lambda x, w: x * w, (1, T, WIDTH)),
    "added in place": (in_place, (WIDTH,)),
    "where": (lambda x, w: torch.where(x > 0, x, w), (WIDTH,)),
    "a token in front": (lambda x, w: torch.cat([w.expand(len(x), -1, -1), x], dim=1), (1, 1, WIDTH)),
    "repeated": (lambda x, w: torch.cat([w.repeat(len(x), 1, 1), x], dim=1), (1, 1, WIDTH)),
    "expanded like": (lambda x, w: torch.cat([w.expand_as(x), x], dim=1), (1, 1, WIDTH)),
    "PReLU": (F.prelu, (T,)),
    "group norm": (lambda x, w, b: F.group_norm(x, 1, w, b), (T,), (T,)),
    "batch norm in evaluation": (
        lambda x, w: F.batch_norm(x, torch.zeros(T).double(), torch.ones(T).double(), w),
        (T,),
    ),
    "depthwise convolution": (lambda x, w: F.conv1d(x, w, groups=T, padding=1), (T, 1, 2)),
    "bilinear": (lambda x, w: F.bilinear(x, x.tanh(), w), (2, WIDTH, WIDTH)),
    "one parameter times another": (lambda x, v, w: x * (v * w.exp()) + v * w, (WIDTH,), (WIDTH,)),
    "halves": (lambda x, w: x * w.chunk(2)[0] + w.chunk(2)[1], (2 * WIDTH,)),
    "a matrix on the left": (lambda x, w: w @ x, (T, T)),
    "also as a matrix": (lambda x, w: F.linear(x, w) + x * w.sum(0) + F.linear(x, w), (WIDTH, WIDTH)),
    "also as a matrix, later": (lambda x, w: F.linear(x * w.sum(0), w), (WIDTH, WIDTH)),
    "relative positions": (
        lambda x, w: x + F.embedding(torch.arange(T * WIDTH).view(T, WIDTH) % 3, w).squeeze(-1),
        (3, 1),
    ),
    "a sum over all": (lambda x, w: x + w.square().sum(), (WIDTH,)),
}


@quiet
@pytest.mark.parametrize("use", USES)
def test_copies_are_exact(use: str) -> None:
    function, *shapes = USES[use]
    model = Own(function, *shapes).double()
    assert_per_sequence(model, lambda: score(model(X)))
    assert_clean(model)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "PReLU": nn.PReLU,
    "group norm": lambda: nn.GroupNorm(1, T),
    "instance norm": lambda: nn.InstanceNorm1d(T, affine=True),
    "transposed convolution": lambda: nn.ConvTranspose1d(T, 2, 3),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
}


@quiet
@pytest.mark.parametrize("module", MODULES)
def test_modules_of_torch_are_exact(module: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), MODULES[module]()).double()
    assert_per_sequence(model, lambda: score(model(X)))


class Gaussian(nn.Module):
    """A Gaussian policy with a free log σ, as most of them have."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(WIDTH, 2), nn.Parameter(torch.zeros(2))

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        normal = torch.distributions.Normal(self.mean(observations), self.log_std.exp(), validate_args=False)
        return normal.log_prob(actions).sum(dim=(1, 2))


@quiet
def test_a_gaussian_policy() -> None:
    policy, actions = Gaussian().double(), torch.randn(S, T, 2).double()
    assert_per_sequence(policy, lambda: policy.log_prob(X, actions))


@quiet
def test_recomputed_activations() -> None:
    model = Own(lambda x, w: x * (1 + w), (WIDTH,)).double()
    assert_per_sequence(model, lambda: score(checkpoint(lambda x: model(x * 1.0), X, use_reentrant=False)))


REFUSED: dict[str, tuple[Any, ...]] = {
    "batch norm": (lambda x, w: F.batch_norm(x, None, None, w, None, True), r"got batch_norm, which gives all", (T,)),
    "positions first": (lambda x, w: F.prelu(x.transpose(0, 1), w), r"got prelu with an activation", (S,)),
    "mean": (lambda x, w: x.mean(0) * w.exp(), r"got mul with an activation", (WIDTH,)),
    "beside the sequences": (lambda x, w: x.sum() + w.square().sum() + x, r"got add with an activation", (WIDTH,)),
    "a row a sequence": (lambda x, w: x[:, 0] * w.exp(), r"got mul with an activation of 2 axes", (S, WIDTH)),
    "changed in place": (lambda x, w: (x * 1).copy_(w), r"got copy_, which changes it in place", (WIDTH,)),
}


@quiet
@pytest.mark.parametrize("use", REFUSED)
def test_what_copies_cannot_do_is_refused(use: str) -> None:
    function, match, *shapes = REFUSED[use]
    model = Own(function, *shapes).double()
    with pytest.raises(UnhandledParameterError, match=rf"parameter 'own\.0': .*{match}"), _opened(model):
        score(model(X)).sum().backward()
    assert_clean(model)


def _opened(model: nn.Module, **options: Any) -> Any:
    return Isopo(model, Given(), **options).microbatch(A)


def test_a_loss_of_parameters_alone_is_refused() -> None:
    model = Own(lambda x, w: x * w, (WIDTH,)).double()
    with pytest.raises(UnhandledParameterError, match=r"parameter 'own\.0'"), _opened(model):
        model.own[0].square().sum().backward()


def test_the_copies_have_a_cap() -> None:
    model = Own(lambda x, w: x * (1 + w), (WIDTH,)).double()
    needed = S * WIDTH * 8
    with (
        pytest.raises(
            UnhandledParameterError, match=rf"got add, for which 4 copies take {needed} bytes of {needed - 1}"
        ),
        _opened(model, copy_bytes=needed - 1),
    ):
        score(model(X)).sum().backward()
    with pytest.warns(UserWarning, match=r"own\.0 \(add\)"), _opened(model, copy_bytes=needed):
        score(model(X)).sum().backward()


def test_copies_are_announced_once_and_listed(recwarn: pytest.WarningsRecorder) -> None:
    model = Own(lambda x, w: x * (1 + w), (WIDTH,)).double()
    isopo = Isopo(model, Given())
    for _ in range(2):
        with isopo.microbatch(A):
            score(model(X)).sum().backward()
    (warning,) = recwarn.list
    assert "own.0 (add): no handler covers" in str(warning.message)
    assert isopo.copied() == {"own.0": "add"}


def test_nothing_is_copied_where_a_handler_knows(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)).double()
    isopo = Isopo(model, Given())
    with isopo.microbatch(A):
        score(model(torch.randint(7, (S, T)))).sum().backward()
    assert isopo.copied() == {}
    assert not recwarn.list


def test_what_changes_nothing_needs_no_copies() -> None:
    model = Own(lambda x, w: x * w.double().to(x.dtype).to(x).contiguous(), (WIDTH,)).double()
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {}


@quiet
def test_a_change_of_precision_is_exact() -> None:
    """The gain in single precision, the rest in double: what is rounded is the same both ways."""
    model = Own(lambda x, w: x * w.float().double(), (WIDTH,)).double()
    assert assert_per_sequence(model, lambda: score(model(X))).copied() == {"own.0": "float"}


@quiet
def test_verify_covers_copies() -> None:
    model = Own(lambda x, w: x * (1 + w), (WIDTH,)).double()
    errors = engine.verify(model, lambda count: score(model(X[:count])), S)
    assert max(errors.values()) < 1e-14


@quiet
def test_without_gradient_parameters_are_themselves() -> None:
    model = Own(lambda x, w: x * (1 + w), (WIDTH,)).double()
    with _opened(model):
        with torch.no_grad():
            inside = model(X[:2])
            assert type(model.own[0].exp()) is Tensor
        score(model(X)).sum().backward()
    assert torch.equal(inside, model(X[:2]).detach())
