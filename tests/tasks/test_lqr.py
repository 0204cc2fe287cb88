"""Linear systems: the scalar case by hand, finite differences, the Riccati equation, policy iteration, simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.tasks import LinearQuadratic


def double(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def scalar(a: float = 1.1, b: float = 0.7, q: float = 2.0, r: float = 0.5, sigma: float = 3.0) -> LinearQuadratic:
    return LinearQuadratic(*(double([number]) for number in (a, b, q, r, sigma)))


def definite(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T / size + 0.5 * torch.eye(size, dtype=torch.float64)


def random_system(states: int, controls: int, outputs: int | None, seed: int, radius: float = 0.8) -> LinearQuadratic:
    """A random system, stable by itself: the gain 0 is stable, and so are small ones. C = I when outputs is None."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(states, states, generator=generator, dtype=torch.float64)
    A *= radius / torch.linalg.eigvals(A).abs().max()
    B = torch.randn(states, controls, generator=generator, dtype=torch.float64)
    Q, R, Sigma = (definite(size, generator) for size in (states, controls, states))
    C = None if outputs is None else torch.randn(outputs, states, generator=generator, dtype=torch.float64)
    return LinearQuadratic(A, B, Q, R, Sigma, C)


def stable_gain(system: LinearQuadratic, seed: int) -> Tensor:
    """A random gain, halved until the loop is well inside the unit circle."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randn(system.num_controls, system.num_outputs, generator=generator, dtype=torch.float64)
    while system.spectral_radius(gain) > 0.9:
        gain = gain / 2
    return gain


# Numbers that make a system: a strategy that built it would draw random numbers.
instances = st.fixed_dictionaries(
    {
        "states": st.integers(1, 4),
        "controls": st.integers(1, 3),
        "outputs": st.one_of(st.none(), st.just(1)),
        "seed": st.integers(0, 1000),
    }
)
quick = settings(max_examples=40, deadline=None)


class TestScalar:
    """One state: x' = (a − bk) x, so J = σ(q + rk²) / (1 − (a − bk)²)."""

    @pytest.mark.parametrize("k", [0.5, 1.2, 2.9])
    def test_cost_and_its_parts(self, k: float) -> None:
        system, gain = scalar(), double([k])
        loop = 1.1 - 0.7 * k
        value, visits = (2 + 0.5 * k**2) / (1 - loop**2), 3 / (1 - loop**2)
        assert system.spectral_radius(gain) == pytest.approx(abs(loop))
        assert system.value_matrix(gain).item() == pytest.approx(value)
        assert system.state_covariance(gain).item() == pytest.approx(visits)
        assert system.cost(gain).item() == pytest.approx(3 * value)

    @pytest.mark.parametrize("k", [0.5, 1.2, 2.9])
    def test_gradient_is_the_derivative_of_the_quotient(self, k: float) -> None:
        loop = 1.1 - 0.7 * k
        top, bottom = 3 * (2 + 0.5 * k**2), 1 - loop**2
        expected = (3 * k * bottom - top * 2 * 0.7 * loop) / bottom**2  # (t/b)' = (t'b − tb') / b²
        assert scalar().gradient(double([k])).item() == pytest.approx(expected)

    @pytest.mark.parametrize("k", [0.5, 1.2, 2.9])
    def test_preconditioners_divide_by_visits_and_curvature(self, k: float) -> None:
        system, gain = scalar(), double([k])
        slope, visits = system.gradient(gain).item(), system.state_covariance(gain).item()
        curvature = 0.5 + 0.7**2 * system.value_matrix(gain).item()
        assert system.natural_gradient(gain).item() == pytest.approx(slope / visits)
        assert system.gauss_newton(gain).item() == pytest.approx(slope / visits / curvature)

    def test_riccati_equation_is_a_quadratic(self) -> None:
        """b²p² + (r − a²r − b²q) p − qr = 0, its positive root."""
        a, b, q, r = 1.1, 0.7, 2.0, 0.5
        half = (r - a**2 * r - b**2 * q) / 2
        value = (-half + math.sqrt(half**2 + b**2 * q * r)) / b**2
        assert scalar().optimal_cost().item() == pytest.approx(3 * value)
        assert scalar().optimal_gain().item() == pytest.approx(b * value * a / (r + b**2 * value))

    def test_measuring_in_another_unit_divides_the_gain(self) -> None:
        one = double([1.0])
        metres, feet = (LinearQuadratic(one, one, one, one, one, unit * one) for unit in (1.0, 3.0))
        torch.testing.assert_close(metres.cost(0.6 * one), feet.cost(0.2 * one))


class TestCostAndGradient:
    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_gradient_agrees_with_finite_differences(self, instance: dict[str, int], seed: int) -> None:
        system = random_system(**instance)
        gain, step = stable_gain(system, seed), 1e-5
        for index, closed_form in enumerate(system.gradient(gain).flatten()):
            shift = torch.zeros_like(gain).flatten()
            shift[index] = step
            high, low = (system.cost(gain + sign * shift.reshape(gain.shape)).item() for sign in (1, -1))
            # Truncation: step² times a third derivative of order J; rounding: 1e-16 J / step.
            scale = 1 + system.cost(gain).item() + system.gradient(gain).abs().max().item()
            assert (high - low) / (2 * step) == pytest.approx(closed_form.item(), abs=1e-5 * scale)

    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_hessian_agrees_with_finite_differences_of_the_gradient(self, instance: dict[str, int], seed: int) -> None:
        system = random_system(**instance)
        gain, step = stable_gain(system, seed), 1e-5
        matrix = system.hessian(gain)
        assert torch.equal(matrix, matrix.T)
        for row, shift in zip(matrix, step * torch.eye(gain.numel(), dtype=torch.float64), strict=True):
            high, low = (system.gradient(gain + sign * shift.reshape(gain.shape)).flatten() for sign in (1, -1))
            # Truncation: step² times a third derivative; rounding: 1e-16 ‖∇J‖ / step. Both far below.
            scale = 1 + matrix.abs().max() + system.gradient(gain).abs().max()
            torch.testing.assert_close((high - low) / (2 * step) / scale, row / scale, rtol=0, atol=1e-5)

    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_cost_is_the_sum_over_the_path_from_every_direction(self, instance: dict[str, int], seed: int) -> None:
        """E over x_0 is a sum over the columns of a root of Σ; 0.9^(2·200) is 5e-19."""
        system = random_system(**instance)
        gain = stable_gain(system, seed)
        x, total, visits = torch.linalg.cholesky(system.Sigma), 0.0, torch.zeros_like(system.Sigma)
        for _ in range(400):
            u = -gain @ system.C @ x
            total += ((x * (system.Q @ x)).sum() + (u * (system.R @ u)).sum()).item()
            visits += x @ x.T
            x = system.A @ x + system.B @ u
        assert system.cost(gain).item() == pytest.approx(total, rel=1e-9)
        torch.testing.assert_close(system.state_covariance(gain), visits, rtol=1e-9, atol=1e-9)

    def test_cost_is_what_sampled_paths_cost(self) -> None:
        """4000 paths: the standard error of their mean is computed, and four of them allowed."""
        system = random_system(3, 2, 2, seed=4)
        gain = stable_gain(system, 0)
        generator = torch.Generator().manual_seed(0)
        x = torch.linalg.cholesky(system.Sigma) @ torch.randn(3, 4000, generator=generator, dtype=torch.float64)
        total = torch.zeros(4000, dtype=torch.float64)
        for _ in range(300):
            u = -gain @ system.C @ x
            total += (x * (system.Q @ x)).sum(dim=0) + (u * (system.R @ u)).sum(dim=0)
            x = system.A @ x + system.B @ u
        assert abs(total.mean() - system.cost(gain)) < 4 * total.std() / math.sqrt(4000)

    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_cost_is_both_traces(self, instance: dict[str, int], seed: int) -> None:
        """tr(PΣ) = tr((Q + CᵀKᵀRKC) Σ_K): from the start on, or summed over the visits."""
        system = random_system(**instance)
        gain = stable_gain(system, seed)
        seen = gain @ system.C
        over_visits = ((system.Q + seen.T @ system.R @ seen) @ system.state_covariance(gain)).trace()
        torch.testing.assert_close(system.cost(gain), over_visits, rtol=1e-9, atol=1e-9)

    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_natural_gradient_does_not_see_the_units_of_the_measurement(
        self, instance: dict[str, int], seed: int
    ) -> None:
        """y → Ty makes K → KT⁻¹. The natural step makes the same step of KC, the plain one does not in general."""
        system = random_system(**instance)
        gain = stable_gain(system, seed)
        T = definite(system.num_outputs, torch.Generator().manual_seed(seed))
        other = LinearQuadratic(system.A, system.B, system.Q, system.R, system.Sigma, T @ system.C)
        moved = gain @ torch.linalg.inv(T)
        for step, other_step in (
            (system.natural_gradient(gain), other.natural_gradient(moved)),
            (system.gauss_newton(gain), other.gauss_newton(moved)),
        ):
            torch.testing.assert_close(step @ system.C, other_step @ other.C, rtol=1e-6, atol=1e-8)


class TestOptimum:
    @quick
    @given(instance=instances)
    def test_gradient_vanishes_at_the_riccati_gain(self, instance: dict[str, int]) -> None:
        system = random_system(**(instance | {"outputs": None}))
        best = system.optimal_gain()
        scale = system.cost(torch.zeros_like(best)).item()
        assert system.gradient(best).abs().max() < 1e-9 * scale
        torch.testing.assert_close(system.cost(best), system.optimal_cost(), rtol=1e-9, atol=0)

    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_no_gain_costs_less_than_the_riccati_gain(self, instance: dict[str, int], seed: int) -> None:
        system = random_system(**instance)
        assert system.cost(stable_gain(system, seed)) >= system.optimal_cost() * (1 - 1e-12)

    @quick
    @given(instance=instances, seed=st.integers(0, 100))
    def test_half_a_gauss_newton_step_is_policy_iteration(self, instance: dict[str, int], seed: int) -> None:
        """K − ½ GN is the gain that is greedy for the value matrix of K."""
        system = random_system(**(instance | {"outputs": None}))
        gain = stable_gain(system, seed)
        values = system.value_matrix(gain)
        greedy = torch.linalg.solve(system.R + system.B.T @ values @ system.B, system.B.T @ values @ system.A)
        torch.testing.assert_close(gain - system.gauss_newton(gain) / 2, greedy, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("seed", range(3))
    def test_policy_iteration_ends_at_the_riccati_gain(self, seed: int) -> None:
        system = random_system(4, 2, None, seed, radius=0.95)
        gain = torch.zeros(2, 4, dtype=torch.float64)
        for _ in range(8):
            gain = gain - system.gauss_newton(gain) / 2
        torch.testing.assert_close(gain, system.optimal_gain(), rtol=0, atol=1e-11)

    def test_an_unstable_system_is_stabilised(self) -> None:
        system = LinearQuadratic(
            A=double([1.2, 1.0], [0.0, 1.1]),
            B=double([0.0], [1.0]),
            Q=torch.eye(2).double(),
            R=double([1.0]),
            Sigma=torch.eye(2).double(),
        )
        assert system.spectral_radius(torch.zeros(1, 2)) == pytest.approx(1.2)
        assert system.spectral_radius(system.optimal_gain()) < 1


def test_single_precision_comes_out_as_double() -> None:
    one = torch.ones(1, 1)
    system = LinearQuadratic(one, one, one, one, one)
    for result in (system.cost(one), system.gradient(one), system.gauss_newton(one), system.optimal_gain()):
        assert result.dtype == torch.float64


def test_gain_may_be_a_parameter() -> None:
    gain = torch.nn.Parameter(double([0.9]))
    assert not scalar().cost(gain).requires_grad
    assert not scalar().gradient(gain).requires_grad


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def parts(self) -> dict[str, Tensor]:
        """Two states, one control, one output."""
        eye = torch.eye(2, dtype=torch.float64)
        return {"A": 0.5 * eye, "B": eye[:, :1], "Q": eye, "R": eye[:1, :1], "Sigma": eye, "C": eye[:1]}

    @pytest.mark.parametrize(
        ("name", "matrix", "message"),
        [
            ("A", torch.ones(2, 3), r"A: expected shape \(n n\), got \(2, 3\)"),
            ("A", torch.zeros(0, 0), "A: expected at least one entry"),
            ("A", [[1.0]], "A: expected a tensor"),
            ("B", torch.ones(3, 1), r"B: expected shape \(n=2 m\), got \(3, 1\)"),
            ("B", torch.ones(2), r"B: expected shape \(n=2 m\), got \(2,\)"),
            ("R", torch.eye(2), r"R: expected shape \(m=1 m=1\), got \(2, 2\)"),
            ("C", torch.ones(1, 3), r"C: expected shape \(p n=2\), got \(1, 3\)"),
            ("C", torch.ones(2, 2), "C: expected 2 independent rows, got rank 1"),
            ("A", torch.eye(2, dtype=torch.int64), "A: expected a floating-point"),
            ("B", double([1.0], [math.nan]), r"B: expected finite numbers, got nan at index \(1, 0\)"),
            (
                "Q",
                double([1.0, 0.5], [0.0, 1.0]),
                "Q: expected a symmetric matrix, got mirrored entries that differ by 0.5",
            ),
            ("Q", double([1.0, 0.0], [0.0, -2.0]), "Q: expected a positive semidefinite .* eigenvalue -2"),
            ("R", double([0.0]), "R: expected a positive definite matrix, got smallest eigenvalue 0"),
            ("R", double([-1.0]), "R: expected a positive definite matrix, got smallest eigenvalue -1"),
            ("Sigma", double([1.0, 0.0], [0.0, 0.0]), "Sigma: expected a positive definite"),
            ("Sigma", double([1.0, 0.5], [0.0, 1.0]), "Sigma: expected a symmetric"),
        ],
    )
    def test_matrix_is_named(self, name: str, matrix: object, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            LinearQuadratic(**(self.parts() | {name: matrix}))

    @pytest.mark.parametrize(
        "method",
        ["cost", "gradient", "value_matrix", "state_covariance", "natural_gradient", "gauss_newton"],
    )
    def test_unstable_gain_says_its_spectral_radius(self, method: str) -> None:
        system = LinearQuadratic(**self.parts())
        with pytest.raises(ValueError, match=r"gain: expected a stable closed loop .* got spectral radius 2\.5$"):
            getattr(system, method)(double([-2.0]))
        assert system.spectral_radius(double([-2.0])) == 2.5  # which itself may be asked for

    def test_gain_on_the_boundary_is_unstable(self) -> None:
        with pytest.raises(ValueError, match=r"spectral radius 1$"):
            LinearQuadratic(**self.parts()).cost(double([-0.5]))

    def test_gain_a_rounding_error_inside_the_boundary(self) -> None:
        """A quarter turn, shortened: the Lyapunov equation itself is singular to working precision."""
        turn, idle = double([0.0, 1.0], [-1.0, 0.0]), double([0.0])
        inside, too_close = (LinearQuadratic(**(self.parts() | {"A": turn * (1 - gap)})) for gap in (1e-9, 2**-53))
        assert inside.cost(idle).isfinite()
        with pytest.raises(ValueError, match=r"spectral radius 0\.9999999999999\d+, 1 up to rounding"):
            too_close.cost(idle)

    @pytest.mark.parametrize(
        ("gain", "message"),
        [
            (torch.zeros(1, 2), r"gain: expected shape \(m=1 p=1\), got \(1, 2\)"),
            (torch.zeros(1, 1, dtype=torch.int64), "gain: expected a floating-point"),
            (double([math.inf]), "gain: expected finite numbers"),
        ],
    )
    def test_gain_of_another_kind(self, gain: Tensor, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            LinearQuadratic(**self.parts()).cost(gain)

    def test_system_that_nothing_stabilises(self) -> None:
        unreachable = self.parts() | {"A": double([0.5, 0.0], [0.0, 2.0])}
        with pytest.raises(ValueError, match="A, B, Q: expected a system that some gain on the whole state stabilises"):
            LinearQuadratic(**unreachable).optimal_gain()

    @pytest.mark.parametrize("seed", range(30))
    def test_what_nothing_reaches_on_the_boundary(self, seed: int) -> None:
        """State 0 stays as it is. For every fourth such system SciPy finds a solution, which stabilises nothing."""
        draw = np.random.default_rng(seed)
        size = int(draw.integers(2, 7))
        A, B, eye = 3 * draw.normal(size=(size, size)), draw.normal(size=(size, 1)), np.eye(size)
        A[0], B[0] = eye[0], 0
        system = LinearQuadratic(*map(torch.from_numpy, (A, B, eye, eye[:1, :1], eye)))
        for method in (system.optimal_gain, system.optimal_cost):
            with pytest.raises(ValueError, match="A, B, Q: expected a system that some gain on the whole state stabil"):
                method()
