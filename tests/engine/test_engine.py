"""The engine against a dense float64 reference: gradients by `torch.func`, then the formulas as written."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from isopo_mini.engine import NTK, FisherNormalized, Isopo, layer_names
from isopo_mini.policies.transformer import CausalTransformer

SEQUENCES, POSITIONS, WIDTH, WORDS = 5, 4, 6, 7
TOLERANCE = 1e-10  # relative, in float64; measured errors are near 1e-15


class Tied(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


class CalledTwice(nn.Module):
    """One module twice in one forward, and a gain and a bias written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.offset = nn.Parameter(torch.randn(WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.tanh(self.shared(features))
        return self.gain * torch.tanh(self.shared(hidden)) + self.offset


def shared_in_two_places() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), layer, nn.Linear(WIDTH, WORDS))


def transformer(tied_head: bool = False) -> CausalTransformer:
    return CausalTransformer(WORDS, POSITIONS, width=8, layers=2, heads=2, tied_head=tied_head)


def norm_between(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, WORDS))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear with bias": lambda: nn.Linear(WIDTH, WORDS),
    "linear without bias": lambda: nn.Linear(WIDTH, WORDS, bias=False),
    "embedding": lambda: nn.Embedding(WORDS, WIDTH),
    "embedding with padding": lambda: nn.Sequential(nn.Embedding(WORDS, WIDTH, padding_idx=-1), nn.Linear(WIDTH, 3)),
    "layer norm": lambda: norm_between(nn.LayerNorm(WIDTH)),
    "layer norm without bias": lambda: norm_between(nn.LayerNorm(WIDTH, bias=False)),
    "RMS norm": lambda: norm_between(nn.RMSNorm(WIDTH)),
    "tied embeddings": Tied,
    "MLP": lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, WORDS)),
    "called twice": CalledTwice,
    "shared module": shared_in_two_places,
    "transformer": transformer,
    "transformer with tied head": lambda: transformer(tied_head=True),
}
TRANSFORMS = {
    "NTK": NTK(damping=0.3),
    "Fisher": FisherNormalized(),
    "Fisher, tokens": FisherNormalized(norm="token"),
    "Fisher, tokens unscaled": FisherNormalized(norm="token-unscaled"),
    "Fisher, three powers": FisherNormalized(gradient_power=0.5, ratio_power=0.3, strength=0.1),
}


def make(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A float64 model, its input, random output directions (any scalar of the output will do) and advantages."""
    torch.manual_seed(3)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at exactly 1 and 0, which hides mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    takes_tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    inputs = (
        torch.randint(0, WORDS, (SEQUENCES, POSITIONS))
        if takes_tokens
        else torch.randn(SEQUENCES, POSITIONS, WIDTH).double()
    )
    directions = torch.randn_like(model(inputs))
    return model, inputs, directions, torch.randn(SEQUENCES).double()


def reference_gradients(model: nn.Module, inputs: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """Every G_s, by differentiating one sequence at a time."""
    model = copy.deepcopy(model)  # functional_call does not give a module that occurs twice its parameters back
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def objective(parameters: dict[str, Tensor], one: Tensor, direction: Tensor) -> Tensor:
        return (functional_call(model, parameters, (one[None],))[0] * direction).sum()

    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(objective), (None, 0, 0))(parameters, inputs, directions)


def reference_coefficients(
    transform: NTK | FisherNormalized, gradients: Tensor, tokens: Tensor, advantages: Tensor
) -> Tensor:
    """The formulas of the book, from a layer's gradients (S, P) and those of its single tokens (N, P)."""
    gram = gradients @ gradients.T
    if isinstance(transform, NTK):
        damping = transform.damping * gram.trace() / len(gram)
        return damping * torch.linalg.solve(gram + damping * torch.eye(len(gram)).double(), advantages)
    overlap = gram.square().mean(1).sqrt()
    if transform.norm != "sequence":
        overlap = (gradients @ tokens.T).square().sum(1).sqrt()
        overlap = overlap / (tokens.square().sum().sqrt() if transform.norm == "token" else len(tokens) ** 0.5)
    if not transform.gradient_power:
        return advantages / overlap

    def floored(norms: Tensor) -> Tensor:
        return (norms**2 + transform.strength * (norms**2).mean()).sqrt()

    norm = gram.diagonal().sqrt()
    return advantages / (
        floored(overlap) * floored(norm) ** transform.gradient_power * floored(overlap / norm) ** transform.ratio_power
    )


Own = Callable[[Tensor | None], Tensor]


class OneParameterAPosition(TorchFunctionMode):
    """Evaluates layers as if every position had parameters of its own: `copies` holds them, `(S, T, *shape)`."""

    def __init__(self, copies: dict[int, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(id(a) in self.copies for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)

        if func in BY_POSITION:
            return BY_POSITION[func](lambda a: None if a is None else self.copies[id(a)], *args, **kwargs)
        return func(*[self.copies.get(id(a), a) for a in args], **kwargs)  # a gain or bias written out by hand


def linear_by_position(own: Own, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs = torch.einsum("stoi,sti->sto", own(weight), input)
    return outputs if bias is None else outputs + own(bias)


def embedding_by_position(own: Own, input: Tensor, weight: Tensor, padding_idx: int | None = None, **_: Any) -> Tensor:
    rows = own(weight).gather(2, input[..., None, None].expand(-1, -1, 1, weight.shape[1]))[:, :, 0]
    return rows if padding_idx is None else torch.where((input == padding_idx)[..., None], rows.detach(), rows)


def layer_norm_by_position(
    own: Own, input: Tensor, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    outputs = F.layer_norm(input, shape, None, None, eps) * own(weight)
    return outputs if bias is None else outputs + own(bias)


def rms_norm_by_position(own: Own, input: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return F.rms_norm(input, shape, None, eps) * own(weight)


BY_POSITION = {
    F.linear: linear_by_position,
    F.embedding: embedding_by_position,
    F.layer_norm: layer_norm_by_position,
    F.rms_norm: rms_norm_by_position,
}


def token_gradients(model: nn.Module, inputs: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """The gradient of every single token, `(S·T, parameter)`: what its own copy of the parameter would get."""
    model = copy.deepcopy(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    copies = {
        name: parameter.expand(SEQUENCES, POSITIONS, *parameter.shape).clone().requires_grad_()
        for name, parameter in parameters.items()
    }
    with OneParameterAPosition({id(parameters[name]): copies[name] for name in copies}):
        output = functional_call(model, parameters, (inputs,))
    (output * directions).sum().backward()
    return {name: copy.grad.flatten(0, 1).flatten(1) for name, copy in copies.items() if copy.grad is not None}


@pytest.mark.parametrize("path", ["dense", "ghost", "auto"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model_name", MODELS)
def test_exact_against_the_dense_reference(model_name: str, transform: str, path: str) -> None:
    model, inputs, directions, advantages = make(model_name)
    isopo = Isopo(model, TRANSFORMS[transform], gram=path)
    with isopo.microbatch(advantages):
        (model(inputs) * directions).sum().backward()
    gradients = reference_gradients(model, inputs, directions)
    of_tokens = token_gradients(model, inputs, directions)
    layer_of = layer_names(model)
    parameters = dict(model.named_parameters())
    for layer in set(layer_of.values()):
        names = [name for name, parameter in parameters.items() if layer_of[parameter] == layer]
        stacked = torch.cat([gradients[name].flatten(1) for name in names], dim=1)
        tokens = torch.cat([of_tokens[name] for name in names], dim=1)
        # The two references agree with each other: a sequence's gradient is the sum of its tokens'.
        torch.testing.assert_close(tokens.view(SEQUENCES, POSITIONS, -1).sum(1), stacked, rtol=1e-10, atol=1e-12)
        expected = reference_coefficients(TRANSFORMS[transform], stacked, tokens, advantages) @ stacked
        computed = torch.cat([parameters[name].grad.flatten() for name in names])  # type: ignore[union-attr]
        error = (computed - expected).norm() / expected.norm()
        assert error < TOLERANCE, f"{layer}: relative error {error:.1e}"
