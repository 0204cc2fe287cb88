"""c of many sequences from a few products with their gradients, without K: what it loses, when it is taken, by whom."""

import math

import pytest
import torch
from torch import Tensor, nn

from isopo_mini.engine import NTK, Isopo
from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.path_costs import products_pay
from isopo_mini.geometry import isopo, ntk_solvers

S, T = 300, 3


def problem(sequences: int, columns: int, decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """G whose singular values fall with a power of their number, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    rows = torch.randn(sequences, columns, dtype=torch.float64, generator=generator) * scales
    return rows, torch.randn(sequences, dtype=torch.float64, generator=generator)


def test_enough_products_are_the_solution() -> None:
    rows, advantages = problem(30, 50, 0.5)
    damping = 0.5 * isopo.mean_eigenvalue(rows @ rows.T)
    exact = torch.linalg.solve((rows @ rows.T) / damping + torch.eye(30, dtype=torch.float64), advantages)
    found = ntk_solvers.solve_ntk_by_products(rows, advantages, damping, 30)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)
    few = ntk_solvers.solve_ntk_by_products(rows, advantages, damping, 3)
    assert ((few - exact).norm() / exact.norm()).item() > 1e-2


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("sequences", [128, 512])
def test_the_promised_number_of_products_leaves_little_of_the_error(sequences: int, ratio: float, decay: float) -> None:
    """For many equal eigenvalues as for a few that hold all, c is off by no more than a hundredth."""
    rows, advantages = problem(sequences, 1024, decay)
    damping = ratio * isopo.mean_eigenvalue(rows @ rows.T)
    exact = isopo.solve_ntk(rows @ rows.T, advantages, damping)
    iterations = ntk_solvers.iterations_for(ratio, sequences)
    found = ntk_solvers.solve_ntk_by_products(rows, advantages, damping, iterations)
    assert ((found - exact).norm() / exact.norm()).item() < 1 / 100


def test_the_number_of_products_is_a_cube_root() -> None:
    counts = [ntk_solvers.iterations_for(ratio, 256) for ratio in (256.0, 4.0, 1.0, 0.1, 1e-3)]
    assert counts == [2, 8, 13, 28, 127]
    assert ntk_solvers.iterations_for(1.0, 1000) == math.ceil(10 * ntk_solvers.ITERATIONS)


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])  # which no rounding depends on
def test_it_has_the_size_of_the_advantages_whatever_that_is(unit: float) -> None:
    rows, advantages = (part.float() for part in problem(40, 60, 1.0))
    damping = rows.square().sum() / 40
    plain = ntk_solvers.solve_ntk_by_products(rows, advantages, damping, 6)
    scaled = ntk_solvers.solve_ntk_by_products(rows, unit * advantages, damping, 6)
    torch.testing.assert_close(scaled.double() / unit, plain.double(), rtol=1e-6, atol=0)


def test_nothing_comes_of_nothing() -> None:
    rows, advantages = torch.zeros(6, 20), torch.arange(6.0)
    torch.testing.assert_close(ntk_solvers.solve_ntk_by_products(rows, advantages, torch.tensor(0.0), 5), advantages)
    rows = torch.randn(6, 20)
    assert ntk_solvers.solve_ntk_by_products(rows, torch.zeros(6), torch.tensor(1.0), 5).tolist() == [0.0] * 6
    found = ntk_solvers.solve_ntk_by_products(rows[:1].expand(6, 20), advantages, torch.tensor(1e-3), 20)
    assert found.isfinite().all(), "of one direction the second product finds nothing more"
    small = 1e-24 * rows  # whose squares are nothing in single precision
    underflown = small.square().sum()
    assert underflown == 0
    torch.testing.assert_close(ntk_solvers.solve_ntk_by_products(small, advantages, underflown, 5), advantages)
    assert ntk_solvers.iterations_for(1e-310, 256) > 10**4, "a damping next to nothing is no overflow"


def test_many_sequences_and_few_products_pay() -> None:
    assert products_pay(512, 1024, ntk_solvers.iterations_for(1.0, 512))
    assert not products_pay(256, 1024, ntk_solvers.iterations_for(1.0, 256))
    assert not products_pay(64, 1024, ntk_solvers.iterations_for(1.0, 64))
    assert not products_pay(256, 1024, ntk_solvers.iterations_for(0.01, 256))
    assert products_pay(2048, 1024, ntk_solvers.iterations_for(0.01, 2048))


# --- In the engine ---------------------------------------------------------------------------------------------------


def model(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def step(gram: str, transform: NTK, sequences: int = S, positions: int = T, **options: object) -> dict[str, Tensor]:
    """What two steps leave in `.grad`; the second knows the first's averages."""
    policy, generator = model(), torch.Generator().manual_seed(1)
    engine = Isopo(policy, transform, gram=gram, sketch_size=16)
    for _ in range(2):
        policy.zero_grad()
        inputs = torch.randn(sequences, positions, 6, generator=generator)
        with engine.microbatch(torch.randn(sequences, generator=generator), **options):  # type: ignore[arg-type]
            policy(inputs).log_softmax(-1)[..., 0].sum().backward()
        engine.end_step()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


@pytest.fixture
def paths() -> list[str]:
    """How K would have been made in the layers that gave rows in its place."""
    return []


@pytest.fixture
def products(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer that was asked, last layer first, whether it gave rows in place of K."""
    taken: list[bool] = []
    actual = LayerGradients.rows_for_products

    def watched(self: LayerGradients, iterations: int) -> Tensor | None:
        rows = actual(self, iterations)
        taken.append(rows is not None)
        if rows is not None:
            paths.append(self.path)
        return rows

    monkeypatch.setattr(LayerGradients, "rows_for_products", watched)
    return taken


@pytest.mark.parametrize("positions", [T, 40], ids=["sketches", "all G_s"])
@pytest.mark.parametrize("scale", ["gradient", "natural"])
def test_fast_is_near_what_it_replaces(
    scale: str, positions: int, products: list[bool], paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_products = step("fast", NTK(1.0, scale=scale), positions=positions)
    assert any(products)
    assert ("signs" if positions == T else "auto") in paths
    monkeypatch.setattr(LayerGradients, "rows_for_products", lambda self, iterations: None)
    by_gram = step("fast", NTK(1.0, scale=scale), positions=positions)
    for name, expected in by_gram.items():
        off = ((by_products[name] - expected).norm() / expected.norm()).item()
        assert off < 0.05, (name, off)
    assert any(not torch.equal(by_products[name], by_gram[name]) for name in by_gram)


@pytest.mark.parametrize("gram", ["auto", "dense", "ghost", "sketched", "signs"])
def test_a_path_by_its_own_name_is_that_path(gram: str, products: list[bool]) -> None:
    step(gram, NTK(1.0))
    assert not any(products)


def test_small_damping_few_sequences_and_spectra_ask_for_the_gram_matrix(products: list[bool]) -> None:
    for transform, sequences in ((NTK(1e-3), S), (NTK(1e-9), S), (NTK(1.0), 20), (NTK(1.0, spectra=True), S)):
        step("fast", transform, sequences)
    assert not any(products)


def test_a_scaled_loss_scales_the_step(products: list[bool]) -> None:
    policy, inputs, advantages = model(), torch.randn(S, T, 6), torch.randn(S)
    found = []
    for scale in (1.0, 1024.0):
        policy.zero_grad()
        with Isopo(policy, NTK(1.0, scale="natural"), gram="fast").microbatch(advantages, loss_scale=scale):
            (scale * policy(inputs).log_softmax(-1)[..., 0].sum()).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    assert any(products)
    torch.testing.assert_close(found[1], 1024 * found[0], rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))
