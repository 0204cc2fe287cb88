"""Loops that are stable, unstable, badly scaled, or ill-conditioned: each told from the others, against exact sums."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from isopo_mini.tasks import LinearQuadratic

METHODS = ["cost", "gradient", "value_matrix", "state_covariance", "natural_gradient", "gauss_newton", "hessian"]


def loop_system(A: Tensor, sigma: Tensor | None = None) -> LinearQuadratic:
    """A system that is A when left alone."""
    eye = torch.eye(len(A), dtype=torch.float64)
    return LinearQuadratic(A, eye[:, :1], eye, eye[:1, :1], eye if sigma is None else sigma)


def idle(system: LinearQuadratic) -> Tensor:
    return torch.zeros(1, system.num_states, dtype=torch.float64)


def double(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def cost_by_the_sum(A: Tensor, steps: int) -> float:
    """Σ_t ‖A^t‖² in integers over a power of 2, without rounding."""
    unit = 2**80
    exact = np.array([[int(Fraction(entry) * unit) for entry in row] for row in A.tolist()], dtype=object)
    assert all(
        Fraction(int(entry), unit) == Fraction(x) for entry, x in zip(exact.flat, A.flatten().tolist(), strict=True)
    )
    power, total = np.eye(len(A), dtype=int).astype(object), Fraction(0)
    for t in range(steps):
        total += Fraction(int((power * power).sum()), unit ** (2 * t))
        power = power @ exact
    return float(total)


def jordan_in_integers(eigenvalue: float, size: int, seed: int) -> Tensor:
    """A Jordan block S J S⁻¹ with an integer S of determinant 1, its entries exact in float64."""
    draw = np.random.default_rng(seed)
    lower, upper = (np.eye(size) + np.tril(draw.integers(-1, 2, (size, size)), -1) for _ in range(2))
    S = lower @ upper.T
    inverse = np.linalg.inv(S).round()
    assert (inverse @ S == np.eye(size)).all()
    block = eigenvalue * np.eye(size) + np.eye(size, k=1)
    return torch.from_numpy(S @ block @ inverse)


class TestUnits:
    """State 1 in kilometres, state 2 in nanometres: the Kronecker form has condition 1e24, the system is harmless."""

    @pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6, 1e9, 1e12, 1e-12])
    def test_cost_of_two_states_by_hand(self, ratio: float) -> None:
        """A^t = ½^t (1, 2t·ratio; 0, 1), so J = Σ_t ¼^t (2 + 4 t² ratio²), with Σ ¼^t = 4/3 and Σ t² ¼^t = 20/27."""
        system = loop_system(double([0.5, ratio], [0.0, 0.5]))
        assert system.cost(idle(system)).item() == pytest.approx(8 / 3 + 80 / 27 * ratio**2, rel=1e-14)

    @pytest.mark.parametrize("size", [4, 12])  # SciPy has one method for fewer than ten states and another for more
    @pytest.mark.parametrize("seed", range(3))
    def test_everything_follows_the_units(self, size: int, seed: int) -> None:
        """x → Dx makes A → DAD⁻¹, Q → D⁻¹QD⁻¹, Σ → DΣD and K → KD⁻¹, and leaves J as it is. Powers of 2 are exact."""
        draw = np.random.default_rng(seed)
        A, B, eye = draw.normal(size=(size, size)), draw.normal(size=(size, 2)), np.eye(size)
        A *= 0.9 / np.abs(np.linalg.eigvals(A)).max()
        D, gain = 2.0 ** draw.integers(-30, 31, size), np.zeros((2, size))
        plain = LinearQuadratic(*map(torch.from_numpy, (A, B, eye, eye[:2, :2], eye)))
        parts = (A * D[:, None] / D, B * D[:, None], np.diag(D**-2), eye[:2, :2], np.diag(D**2))
        scaled, K, units = LinearQuadratic(*map(torch.from_numpy, parts)), torch.from_numpy(gain), torch.from_numpy(D)
        torch.testing.assert_close(scaled.cost(K), plain.cost(K), rtol=1e-10, atol=0)
        for name in ("gradient", "natural_gradient", "gauss_newton"):
            power = 1 if name == "gradient" else -1
            expected = getattr(plain, name)(K) * units**power
            torch.testing.assert_close(getattr(scaled, name)(K), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(scaled.optimal_cost(), plain.optimal_cost(), rtol=1e-6, atol=0)

    def test_weights_and_measurements_in_units_far_apart(self) -> None:
        """A positive definite Σ stays one: rounding of the large entries is larger than the small eigenvalues."""
        draw = np.random.default_rng(0)
        root, D = draw.normal(size=(4, 4)), np.diag(10.0 ** np.array([-8, 0, 4, 8]))
        sigma = torch.from_numpy(D @ (root @ root.T + np.eye(4)) @ D)
        eye = torch.eye(4, dtype=torch.float64)
        system = LinearQuadratic(
            0.5 * eye, eye[:, :1], eye, eye[:1, :1], (sigma + sigma.T) / 2, eye[:2] * sigma[:2, :1]
        )
        assert system.cost(torch.zeros(1, 2)).item() == pytest.approx(sigma.trace().item() / 0.75)


class TestIllConditioned:
    @pytest.mark.parametrize("size", [4, 12])
    def test_accepted_ones_have_three_digits(self, size: int) -> None:
        """Jordan blocks, rotated: paths grow by ever more before they shrink, until the library says so."""
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
        accepted = []
        for growth in (0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4, 1e6):
            A = torch.from_numpy(rotation @ (0.5 * np.eye(size) + growth * np.eye(size, k=1)) @ rotation.T)
            system = loop_system(A)
            try:
                found = system.cost(idle(system)).item()
            except ValueError:
                accepted.append(False)
                continue
            accepted.append(True)
            assert found == pytest.approx(cost_by_the_sum(A, 80), rel=1e-3), growth
        assert accepted == sorted(accepted, reverse=True)
        assert 3 <= sum(accepted) < len(accepted)

    @pytest.mark.parametrize("method", METHODS)
    def test_stable_one_is_not_called_unstable(self, method: str) -> None:
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
        system = loop_system(torch.from_numpy(rotation @ np.array([[0.5, 1e6], [0.0, 0.5]]) @ rotation.T))
        assert system.spectral_radius(idle(system)) < 0.6
        with pytest.raises(ValueError, match=r"gain: .* spectral radius 0\.5\d*, stable, but paths grow far before"):
            getattr(system, method)(idle(system))

    def test_eigenvalues_that_rounding_moved_across_the_boundary(self) -> None:
        """All eigenvalues are 15/16, exactly; those computed are not. The error does not claim to know."""
        A = jordan_in_integers(15 / 16, 12, seed=0)
        radius = loop_system(A).spectral_radius(torch.zeros(1, 12))
        assert radius > 1
        with pytest.raises(
            ValueError, match=rf"spectral radius {radius:.6g} ± .*, which rounding cannot tell from a sta"
        ):
            loop_system(A).cost(torch.zeros(1, 12))

    def test_plainly_unstable_one_is_called_just_that(self) -> None:
        with pytest.raises(ValueError, match=r"gain: expected a stable closed loop .* got spectral radius 1\.5$"):
            loop_system(double([0.5, 1e9], [0.0, 1.5])).cost(torch.zeros(1, 2))

    def test_near_the_boundary_digits_go_one_by_one(self) -> None:
        """A turn shortened by g: J = 2/(1 − (1−g)²)."""
        turn = double([0.0, 1.0], [-1.0, 0.0])
        for gap in (1e-3, 1e-6, 1e-9, 1e-11):
            kept = (1 - gap) ** 2
            expected = float(2 / (1 - Fraction(1 - gap) ** 2))
            assert loop_system(turn * (1 - gap)).cost(torch.zeros(1, 2)).item() == pytest.approx(expected, rel=1e-3)
            assert kept < 1
        with pytest.raises(ValueError, match=r"spectral radius 0\.99999999999999\d*, 1 up to rounding \(condition"):
            loop_system(turn * (1 - 1e-15)).cost(torch.zeros(1, 2))

    def test_cost_beyond_float64(self) -> None:
        with pytest.raises(ValueError, match="gain: "):
            loop_system(double([0.5, 1e200], [0.0, 0.5])).cost(torch.zeros(1, 2))
        assert math.isfinite(loop_system(double([0.5, 1e100], [0.0, 0.5])).cost(torch.zeros(1, 2)).item())
