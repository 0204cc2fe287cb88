"""The estimate by random signs, and `gram="fast"`, which takes it only where it saves time."""

import pytest
import torch
from torch import Tensor, nn

from isopo_mini.engine import NTK, FisherNormalized, Isopo, LayerScaled, Transform
from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.workspace import Workspace
from isopo_mini.geometry import isopo, ntk_solvers
from isopo_mini.geometry.sketches import SignProjection

S, T, WIDTH = 40, 3, 24


def model(width: int = WIDTH, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """An embedding, a norm, two linear layers."""
    torch.manual_seed(0)
    layers = [nn.Embedding(8, width), nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(2 * width, 4)).to(dtype)


def data(sequences: int = S, positions: int = T) -> tuple[Tensor, Tensor]:
    """Tokens and advantages."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 8, (sequences, positions), generator=generator)
    return tokens, torch.randn(sequences, dtype=torch.float64, generator=generator)


def gradients(path: str, transform: Transform, k: int = 8, seed: int = 0, policy: nn.Module | None = None) -> Tensor:
    """What one step leaves in `.grad`, as one vector."""
    policy = model() if policy is None else policy
    tokens, advantages = data()
    with Isopo(policy, transform, gram=path, sketch_size=k, seed=seed).microbatch(advantages):
        policy(tokens).log_softmax(-1)[..., 0].sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


class Watch:
    """Keeps what the layer that is `number`th from the end says of itself."""

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, 0

    def coefficients(self, layer: LayerGradients, advantages: Tensor, averages: object) -> Tensor:
        if self.seen == self.number:
            self.gram, self.resources, self.parameters = layer.gram(), layer.resources, dict(layer.parameters)
        self.seen += 1
        return advantages


@pytest.mark.parametrize("path", ["sketched", "signs"])
def test_the_estimate_is_that_of_weight_and_bias_as_one_matrix(path: str) -> None:
    """K̂ = ⟨P [W b]_s Q'ᵀ, P [W b]_s' Q'ᵀ⟩ with Q's own column for the bias, of expected squared length 1."""
    policy, watch = model(), Watch(1)
    tokens, advantages = data()
    with Isopo(policy, watch, gram=path, sketch_size=8).microbatch(advantages):
        policy(tokens).log_softmax(-1)[..., 0].sum().backward()
    (weight, bias), resources = watch.parameters.values(), watch.resources
    with torch.no_grad():
        whole = torch.cat([weight.form(Workspace()), bias.form()[:, :, None]], dim=2)
    sketch = resources.sketch(2 * WIDTH, WIDTH, whole)
    left, right = (side.dense() if isinstance(side, SignProjection) else side for side in (sketch.left, sketch.right))
    column = resources.bias_column(whole)
    features = (left @ whole @ torch.cat([right, column[:, None]], dim=1).T).flatten(1)
    torch.testing.assert_close(watch.gram, features @ features.T, rtol=1e-10, atol=1e-10)
    assert isinstance(sketch.left, SignProjection) == (path == "signs")
    if path == "signs":
        torch.testing.assert_close(column.square().sum().item(), 1.0)


class TwiceShifted(nn.Module):
    """A linear layer whose bias is added at every second use of its weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH, dtype=torch.float64) / 5)
        self.bias = nn.Parameter(torch.zeros(2 * WIDTH, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias) + nn.functional.linear(inputs.tanh(), self.weight)


@pytest.mark.parametrize("case", ["few inputs", "a bias of other uses"])
def test_a_bias_that_is_no_column_of_its_weight_is_projected_by_itself(case: str) -> None:
    """K̂ = ⟨P G_s Qᵀ, P G_s' Qᵀ⟩ + ⟨P b_s, P b_s'⟩, with Q = I where an input is no longer than k."""
    width = 6 if case == "few inputs" else WIDTH
    policy, watch = model(width), Watch(1)
    if case != "few inputs":
        policy[2] = TwiceShifted()
    tokens, advantages = data()
    with Isopo(policy, watch, gram="signs", sketch_size=6).microbatch(advantages):
        policy(tokens).log_softmax(-1)[..., 0].sum().backward()
    (weight, bias), resources = watch.parameters.values(), watch.resources
    with torch.no_grad():
        whole, shift = weight.form(Workspace()), bias.form()
    sketch = resources.sketch(2 * width, width, whole)
    left = sketch.left.dense()
    features = left @ whole if sketch.right is None else left @ whole @ sketch.right.dense().T
    expected = features.flatten(1) @ features.flatten(1).T + (shift @ left.T) @ (shift @ left.T).T
    torch.testing.assert_close(watch.gram, expected, rtol=1e-10, atol=1e-10)
    assert (sketch.right is None) == (case == "few inputs")


@pytest.mark.parametrize("transform", [NTK(1.0, scale="natural"), NTK(0.1), FisherNormalized()], ids=str)
def test_few_sketched_columns_are_as_good_as_their_gram_matrix(
    transform: Transform, columns_taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ĝ of 4·(4 + 1) = 20 columns for 40 sequences: ĜᵀĜ instead of ĜĜᵀ."""
    by_columns = gradients("signs", transform, k=4)
    assert columns_taken[1]  # the wide layer
    monkeypatch.setattr(LayerGradients, "few_columns", lambda self: None)
    torch.testing.assert_close(gradients("signs", transform, k=4), by_columns, rtol=1e-9, atol=1e-12)


def test_the_estimate_comes_close_with_its_size() -> None:
    exact = gradients("auto", NTK(1.0))

    def mean_cosine(k: int) -> float:
        found = [torch.cosine_similarity(exact, gradients("signs", NTK(1.0), k, seed), dim=0) for seed in range(8)]
        return float(torch.stack(found).mean())

    assert mean_cosine(3) < mean_cosine(8) < mean_cosine(24) < 1 + 1e-9
    assert mean_cosine(24) > 0.95
    torch.testing.assert_close(gradients("signs", NTK(1.0), k=48), exact, rtol=1e-9, atol=1e-12)  # no side is longer


def paths_taken(sequences: int, positions: int, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which path `"fast"` takes in every layer with a matrix, last layer first."""
    taken: list[str] = []
    actual = LayerGradients.few_columns

    def watched(self: LayerGradients) -> Tensor | None:
        columns = actual(self)
        if columns is None:
            taken.append(self.path)
        return columns

    monkeypatch.setattr(LayerGradients, "few_columns", watched)
    policy, (tokens, advantages) = model(width, torch.float32), data(sequences, positions)
    with Isopo(policy, NTK(1.0), gram="fast", sketch_size=16).microbatch(advantages.float()):
        policy(tokens).log_softmax(-1)[..., 0].sum().backward()
    return taken


def test_fast_is_exact_where_that_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single positions: products of positions. A few long sequences: all G_s. Many short ones: the estimate."""
    assert set(paths_taken(16, 1, 64, monkeypatch)) == {"auto"}
    assert set(paths_taken(4, 64, 64, monkeypatch)) == {"auto"}
    assert "signs" in paths_taken(256, 9, 64, monkeypatch)
    torch.testing.assert_close(gradients("fast", NTK(1.0), k=48), gradients("auto", NTK(1.0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 30.0])
def test_many_sequences_in_single_precision_lose_no_more_than_promised(ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(200, 60, generator=generator) * torch.logspace(0, -4, 60)
    gram, advantages = factor @ factor.T, torch.randn(200, generator=generator)
    damping = ratio * isopo.mean_eigenvalue(gram)
    assert isopo.solver_for(ratio, gram) is ntk_solvers.solve_ntk_in_single
    exact = isopo.solve_ntk(gram.double(), advantages.double(), damping.double())
    for found in (
        ntk_solvers.solve_ntk_in_single(gram, advantages, damping),
        isopo.solve_ntk_by_columns(factor, advantages, damping, single=True),
    ):
        assert ((found.double() - exact).norm() / exact.norm()).item() < 1e-4


def test_which_solver_is_taken() -> None:
    single, double = torch.eye(200), torch.eye(200, dtype=torch.float64)
    assert isopo.solver_for(1.0, double) is isopo.solve_ntk
    assert isopo.solver_for(1.0, torch.eye(20)) is isopo.solve_ntk
    assert isopo.solver_for(1e-1, single) is isopo.solve_ntk  # (1 + S/ρ) ε is more than 1e-4
    assert isopo.solver_for(1e-9, single) is isopo.solve_ntk_by_eigenvalues
    nothing = torch.zeros(200, 200)
    assert torch.equal(ntk_solvers.solve_ntk_in_single(nothing, single[0], nothing[0, 0]), single[0])


def test_the_memory_for_weighted_factors_is_that_of_one_layer() -> None:
    """Also under a transform that asks for no Gram matrix."""
    policy, (tokens, advantages) = model(), data()
    engine = Isopo(policy, LayerScaled())
    with engine.microbatch(advantages):
        policy(tokens).log_softmax(-1)[..., 0].sum().backward()
    (buffer,) = engine._workspace._buffers.values()
    assert buffer.numel() == S * T * WIDTH  # the shorter factor of the wide layer
