"""The scale of a layer: what the natural one is invariant to, what it equals, and what every scale is, written out."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from isopo_mini import engine
from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled
from isopo_mini.geometry import fisher, natural_gradient
from isopo_mini.policies import CausalTransformer
from isopo_mini.precision import at_least_float32

S, T, WORDS = 6, 3, 5
DECAY = 0.8

NATURAL = {f"NTK, ρ = {damping:g}": NTK(damping, "natural") for damping in (0.1, 1.0, 10.0)}
NATURAL |= {
    "layer scaled": LayerScaled(),
    "Fisher, norm": FisherNormalized(),
    "Fisher, tokens unscaled": FisherNormalized("token-unscaled"),
    "Fisher, natural": FisherNormalized(scale="natural"),
    "Fisher, tokens, natural": FisherNormalized("token", scale="natural", strength=0.2),
}
GRADIENT = {
    "NTK": NTK(1.0),
    "Fisher": FisherNormalized(scale="gradient"),
    "Fisher, regularised": FisherNormalized(scale="gradient", strength=0.2),
}


class Rewritten(nn.Module):
    """The function of a layer, whose weight W and bias b are now written as a·V and a·v, with V and v its parameters.

    a times the output of a layer (V, v) is what the layer (aV, av) gives.
    """

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.div_(factor)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor * self.layer(inputs)


class InputScaled(Rewritten):
    """The same of a weight without bias, whose input may be scaled instead."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.factor * inputs)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(WORDS, 4), nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5, bias=False), nn.Tanh(),
        nn.Linear(5, WORDS),
    )  # fmt: skip


def transformer() -> nn.Module:
    return CausalTransformer(WORDS, T, width=8, layers=1, heads=2)


PLACES: dict[str, tuple[Any, type[Rewritten]]] = {
    "0": (perceptron, Rewritten),
    "1": (perceptron, Rewritten),
    "3": (perceptron, Rewritten),
    "4": (perceptron, InputScaled),
    "6": (perceptron, Rewritten),
    "token_embedding": (transformer, Rewritten),
    "blocks.0.attention.qkv": (transformer, Rewritten),
    "final_norm": (transformer, Rewritten),
    "head": (transformer, InputScaled),
}


def make(architecture: Any = perceptron, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    model = architecture().double()
    with torch.no_grad():
        for parameter in model.parameters():  # far from a start where gradients vanish by symmetry
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def rewrite(model: nn.Module, place: str, kind: type[Rewritten], factor: float) -> nn.Module:
    parent, _, child = place.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, kind(model.get_submodule(place), factor))
    return model


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (S, T), actions (S, T) and advantages (S,)."""
    generator = torch.Generator().manual_seed(seed)
    tokens, actions = torch.randint(WORDS, (2, S, T), generator=generator)
    return tokens, actions, torch.randn(S, generator=generator, dtype=torch.float64)


def step_gradients(model: nn.Module, isopo: Isopo, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """c of every layer; the step is left in `.grad`."""
    tokens, actions, advantages = batch
    model.zero_grad()
    with isopo.microbatch(advantages) as microbatch:
        log_probs = at_least_float32(model(tokens)).log_softmax(-1)
        log_probs.gather(-1, actions[..., None]).sum().backward()
    return microbatch.coefficients


def changes(model: nn.Module, transform: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """What one step of plain SGD does to the log-probabilities, and the step itself, one parameter after the other."""
    batch = make_batch()
    before = model(batch[0]).log_softmax(-1).detach()
    step_gradients(model, Isopo(model, transform, **options), batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, maximize=True)
    optimizer.step()
    steps = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return model(batch[0]).log_softmax(-1).detach() - before, steps


@cache
def as_written(architecture: Any, transform: str) -> tuple[Tensor, list[Tensor]]:
    """`changes` of a model before anything in it is rewritten."""
    return changes(make(architecture), (NATURAL | GRADIENT)[transform])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("factor", [1e-2, 0.3, 1e2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transform", NATURAL)
def test_a_layer_written_as_a_times_its_weight_takes_the_same_step(transform: str, place: str, factor: float) -> None:
    architecture, kind = PLACES[place]
    expected, steps = as_written(architecture, transform)
    rewritten = rewrite(make(architecture), place, kind, factor)
    found, found_steps = changes(rewritten, NATURAL[transform])
    assert relative_error(found, expected) < 1e-10
    # Of the rewritten layer it is a times its step that is the step of its weight; no other layer notices.
    for (name, _), one, other in zip(rewritten.named_parameters(), found_steps, steps, strict=True):
        factor_here = factor if name.startswith(f"{place}.layer.") else 1.0
        assert relative_error(factor_here * one, other) < 1e-10, name


@pytest.mark.parametrize("gram", ["dense", "ghost", "sketched", "signs"])
def test_so_it_does_however_the_gram_matrix_is_made(gram: str) -> None:
    expected, _ = changes(make(), NTK(1.0, "natural"), gram=gram, sketch_size=3)
    found, _ = changes(rewrite(make(), "1", Rewritten, 50.0), NTK(1.0, "natural"), gram=gram, sketch_size=3)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("factor", [1e-2, 1e2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transform", GRADIENT)
def test_in_the_scale_of_the_gradient_its_step_is_a_squared_times_as_long(
    transform: str, place: str, factor: float
) -> None:
    architecture, kind = PLACES[place]
    expected, steps = as_written(architecture, transform)
    rewritten = rewrite(make(architecture), place, kind, factor)
    found, found_steps = changes(rewritten, GRADIENT[transform])
    assert relative_error(found, expected) > 0.005  # how much depends on the share of this layer in the whole step
    for (name, _), one, other in zip(rewritten.named_parameters(), found_steps, steps, strict=True):
        own = name.startswith(f"{place}.layer.")
        assert relative_error(factor * one if own else one, factor**2 * other if own else other) < 1e-9, name


def test_the_token_norm_of_the_public_code_takes_a_step_a_times_as_long() -> None:
    """It divides the norm by √tr F of the layer, which grows by a: between the two scales."""
    _, steps = changes(make(), FisherNormalized("token"))
    _, found = changes(rewrite(make(), "1", Rewritten, 50.0), FisherNormalized("token"))
    assert relative_error(50.0 * found[1], 50.0 * steps[1]) < 1e-10


def test_where_only_the_weight_is_rewritten_its_bias_is_in_the_way() -> None:
    """Both have one λ: a layer is rewritten as a whole, or it is another layer."""
    expected, _ = changes(make(), NTK(1.0, "natural"))
    model = make()
    with torch.no_grad():
        model[1].bias.mul_(20.0)  # InputScaled divides it, and does not multiply it again
    found, _ = changes(rewrite(model, "1", InputScaled, 20.0), NTK(1.0, "natural"))
    assert relative_error(found, expected) > 0.01


# --- What it equals --------------------------------------------------------------------------------------------------


def scores_by_layer(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The columns of the score matrix that belong to each layer, `(S, P_ℓ)`."""
    layer_of = engine.layer_names(model)
    parameters = list(model.parameters())
    columns = fisher.score_matrix(model, *batch[:2]).split([parameter.numel() for parameter in parameters], dim=1)
    layers: dict[str, list[Tensor]] = {}
    for parameter, piece in zip(parameters, columns, strict=True):
        layers.setdefault(layer_of[parameter], []).append(piece)
    return {name: torch.cat(pieces, dim=1) for name, pieces in layers.items()}


def gradients_by_layer(model: nn.Module) -> dict[str, Tensor]:
    layer_of = engine.layer_names(model)
    layers: dict[str, list[Tensor]] = {}
    for parameter in model.parameters():
        assert parameter.grad is not None
        layers.setdefault(layer_of[parameter], []).append(parameter.grad.flatten())
    return {name: torch.cat(pieces) for name, pieces in layers.items()}


def tied_transformer() -> nn.Module:
    return CausalTransformer(WORDS, T, width=4, layers=2, heads=2, tied_head=True)


@pytest.mark.parametrize("gram", ["dense", "ghost"])
@pytest.mark.parametrize("damping", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("architecture", [perceptron, transformer, tied_transformer])
def test_ntk_is_the_natural_gradient_of_every_block_of_the_empirical_fisher(
    architecture: Any, damping: float, gram: str
) -> None:
    """SᵀS/S, SᵀA/S and λ/S of the layer's columns: `solve` forms P × P matrices and sees no Gram matrix."""
    model, batch = make(architecture), make_batch()
    step_gradients(model, Isopo(model, NTK(damping, "natural"), gram=gram), batch)
    found = gradients_by_layer(model)
    blocks = scores_by_layer(model, batch)
    assert len(blocks) == len(found) > 4
    for name, scores in blocks.items():
        strength = damping * scores.square().sum().item() / S
        expected = natural_gradient.solve(scores.T @ scores / S, scores.T @ batch[2] / S, strength / S)
        assert relative_error(found[name], expected) < 1e-9, name


@pytest.mark.parametrize("architecture", [perceptron, transformer])
def test_large_damping_is_reinforce_over_the_damping_of_each_layer(architecture: Any) -> None:
    model, batch = make(architecture), make_batch()
    damping = 1e7
    step_gradients(model, Isopo(model, NTK(damping, "natural")), batch)
    found = gradients_by_layer(model)
    step_gradients(model, Isopo(model, LayerScaled()), batch)
    scaled = gradients_by_layer(model)
    divisors = set()
    for name, scores in scores_by_layer(model, batch).items():
        mean_square = scores.square().sum().item() / S
        reinforce = scores.T @ batch[2]
        divisors.add(round(mean_square, 6))
        # (K/λ + I)⁻¹ is I up to tr K/λ = S/ρ.
        assert relative_error(found[name], reinforce / (damping * mean_square)) < 2 * S / damping
        assert relative_error(scaled[name], reinforce / mean_square) < 1e-12
    assert max(divisors) > 2 * min(divisors), "each layer has a number of its own"


# --- The formulas, written out ---------------------------------------------------------------------------------------


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


@pytest.mark.parametrize("keep_small", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.4])
@pytest.mark.parametrize("scale", ["norm", "gradient", "natural"])
def test_fisher_normalised_in_every_scale(scale: str, strength: float, keep_small: bool) -> None:
    """A/o; A·rms(o)/o; A·rms(o)/o over tr K/S: with averages over the steps, but for rms(o), which is the batch's."""
    model = make()
    isopo = Isopo(model, FisherNormalized(strength=strength, keep_small=keep_small, scale=scale), decay=DECAY)
    averages: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in (1, 2):  # the second step knows the first
        batch = make_batch(seed)
        coefficients = step_gradients(model, isopo, batch)
        isopo.end_step()
        for name, scores in scores_by_layer(model, batch).items():
            gram = scores @ scores.T
            overlaps = gram.square().mean(dim=1).sqrt()
            own = (overlaps.square().mean(), gram.trace() / S)
            old = averages.get(name, own)
            averages[name] = tuple(DECAY * a + (1 - DECAY) * b for a, b in zip(old, own, strict=True))
            mean_square, eigenvalue = averages[name]
            if strength and keep_small:
                overlaps = (overlaps**2 / (strength * mean_square) + 1).sqrt()
            elif strength:
                overlaps = (overlaps**2 + strength * mean_square).sqrt()
            expected = (
                batch[2] / overlaps * {"norm": 1.0, "gradient": rms(overlaps)}.get(scale, rms(overlaps) / eigenvalue)
            )
            assert relative_error(coefficients[name], expected) < 1e-9, name


@pytest.mark.parametrize("transform", [NTK(0.7, "natural"), LayerScaled()], ids=["NTK", "layer scaled"])
def test_the_second_step_uses_the_average_of_the_mean_eigenvalue(transform: Any) -> None:
    model = make()
    isopo = Isopo(model, transform, decay=DECAY)
    averages: dict[str, Tensor] = {}
    for seed in (1, 2):
        batch = make_batch(seed)
        coefficients = step_gradients(model, isopo, batch)
        isopo.end_step()
        for name, scores in scores_by_layer(model, batch).items():
            gram = scores @ scores.T
            own = gram.trace() / S
            averages[name] = DECAY * averages.get(name, own) + (1 - DECAY) * own
            if isinstance(transform, NTK):
                identity = torch.eye(S, dtype=torch.float64)
                expected = torch.linalg.solve(gram + 0.7 * averages[name] * identity, batch[2])
            else:
                expected = batch[2] / averages[name]
            assert relative_error(coefficients[name], expected) < 1e-9, name


# --- Edges -----------------------------------------------------------------------------------------------------------

SCALES = [
    NTK(1.0, "natural"),
    NTK(1e-12, "natural"),
    LayerScaled(),
    FisherNormalized(scale="gradient"),
    FisherNormalized(scale="natural"),
    FisherNormalized("token", gradient_power=0.5, scale="natural", strength=0.1),
]
EVERY_SCALE = pytest.mark.parametrize("transform", SCALES, ids=str)


class WithDeadLayer(nn.Module):
    """A layer that the output does not depend on, although it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dead, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS), nn.Linear(4, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(hidden) + 0.0 * self.dead(hidden)


@EVERY_SCALE
def test_a_layer_without_gradient_gets_the_coefficient_zero(transform: Any) -> None:
    """Its scale is 0, and 0/0 is not a number; and nothing of it is left in the averages of later steps."""
    model = make(WithDeadLayer)
    isopo = Isopo(model, transform)
    for _ in range(2):
        coefficients = step_gradients(model, isopo, make_batch())
        isopo.end_step()
        assert torch.equal(coefficients["dead"], torch.zeros(S, dtype=torch.float64))
        found = gradients_by_layer(model)
        assert torch.equal(found["dead"], torch.zeros_like(found["dead"]))
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found["head"].norm() > 0


@EVERY_SCALE
def test_the_step_is_linear_in_the_advantages(transform: Any) -> None:
    """What a mean over sequences, A/S, relies on. The scale of the layer knows nothing of the rewards."""
    model, (tokens, actions, advantages) = make(), make_batch()
    step_gradients(model, Isopo(model, transform), (tokens, actions, advantages))
    expected = gradients_by_layer(model)
    step_gradients(model, Isopo(model, transform), (tokens, actions, advantages / 1024))
    for name, found in gradients_by_layer(model).items():
        assert torch.equal(found * 1024, expected[name])  # a power of two does not round


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1e-2])
@EVERY_SCALE
def test_half_precision(transform: Any, factor: float, dtype: torch.dtype) -> None:
    """The gradients of a layer written with a = .01 are a hundred times smaller, its coefficients 10,000 times larger:

    beyond 65,504, where float16 ends.
    """
    (tokens, actions, advantages), found = make_batch(), {}
    for kind in (dtype, torch.float64):
        model = rewrite(make(), "6", Rewritten, factor).to(kind)
        batch = (tokens, actions, advantages.to(kind))
        coefficients = step_gradients(model, Isopo(model, transform), batch)
        found[kind] = gradients_by_layer(model)
    if isinstance(transform, NTK) and transform.damping < 1e-6:
        # The undamped inverse of a rounded matrix says nothing about the matrix: finite is all that can be asked.
        assert all(gradient.isfinite().all() for gradient in found[dtype].values())
        return
    for name, expected in found[torch.float64].items():
        # Eight bits of mantissa in all activations; and where a large step is left in float16, it may end there.
        assert relative_error(found[dtype][name].double(), expected) < 0.1, name
    if factor < 1 and isinstance(transform, LayerScaled):
        assert coefficients["6.layer"].abs().max() > 1000 * coefficients["1"].abs().max()


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^scale: expected one of gradient, natural, got 'norm'$"):
        NTK(1.0, "norm")
    with pytest.raises(ValueError, match=r"^scale: expected one of norm, gradient, natural, got 'layer'$"):
        FisherNormalized(scale="layer")
