"""Local minima: the scalar case by hand, Riccati's gain, the valley one starts in, and honest failures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from isopo_mini.tasks import LinearQuadratic, local_minimum


def double(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_system(seed: int, outputs: int = 2) -> LinearQuadratic:
    """Four states, two controls; stable when left alone, just. The systems of chapter 18."""
    draw = np.random.default_rng(seed)
    A, B, eye = draw.normal(size=(4, 4)), draw.normal(size=(4, 2)), np.eye(4)
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    C = draw.normal(size=(outputs, 4)) if outputs < 4 else eye
    return LinearQuadratic(*map(torch.from_numpy, (A, B, eye, eye[:2, :2], eye, C)))


def two_valleys() -> LinearQuadratic:
    """One gain, two intervals of stable ones: the system chapter 18 begins with."""
    eye = torch.eye(3, dtype=torch.float64)
    A = double([0, 1, 0], [0, 0, 1], [-0.2, -1.2, -1.4])
    return LinearQuadratic(A, double([0], [0], [-1]), eye, eye[:1, :1], eye, double([0.6, 0.5, 1.2]))


# 3005: Gauss–Newton steps of 0.2 leave the stable gains.
@pytest.mark.parametrize("seed", [0, 1, 8, 12, 1015, 2009, 3005])
def test_gradient_vanishes_the_hessian_is_positive_and_no_neighbour_costs_less(seed: int) -> None:
    system = random_system(seed)
    found = local_minimum(system)
    assert found.converged
    assert found.cost == system.cost(found.gain).item() < system.cost(torch.zeros(2, 2)).item()
    assert system.gradient(found.gain).abs().max() < 1e-10 * found.cost
    assert torch.linalg.eigvalsh(system.hessian(found.gain))[0] > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shift = 1e-3 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        assert system.cost(found.gain + shift) > found.cost


def test_fixed_steps_leave_the_stable_gains() -> None:
    """Why steps are shortened: what the wrong search does on one of the systems above."""
    system, gain = random_system(3005), torch.zeros(2, 2, dtype=torch.float64)
    radii = [system.spectral_radius(gain)]
    while radii[-1] < 1 and len(radii) < 60:
        gain = gain - 0.2 * system.gauss_newton(gain)
        radii.append(system.spectral_radius(gain))
    assert radii[-1] > 1


@pytest.mark.parametrize("seed", range(3))
def test_everything_seen_it_is_the_riccati_gain(seed: int) -> None:
    system = random_system(seed, outputs=4)
    torch.testing.assert_close(local_minimum(system).gain, system.optimal_gain(), rtol=0, atol=1e-10)


def test_each_valley_has_its_own() -> None:
    system = two_valleys()
    left, right = (local_minimum(system, double([start])) for start in (0.0, 1.2))
    assert left.converged
    assert right.converged
    assert left.gain.item() < 0.4 < 0.5 < right.gain.item()
    assert left.cost > 2 * right.cost
    gains = np.linspace(-0.4, 0.1, 201)  # a scan finds nothing lower in the left one
    assert left.cost <= min(system.cost(double([k])).item() for k in gains)


def test_it_starts_anywhere_stable_even_beside_the_boundary() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    system = LinearQuadratic(one, one, one, one, one)  # stable for 0 < k < 2, with the minimum at 1 / 1.618
    for start in (1e-9, 1e-3, 1.0, 1.999, 2 - 1e-9):
        found = local_minimum(system, start * one)
        assert found.converged
        assert found.gain.item() == pytest.approx((5**0.5 - 1) / 2, rel=1e-9)


def test_stopped_early_it_does_not_claim_to_have_converged() -> None:
    system = random_system(8)
    for steps in (0, 1, 5):
        found = local_minimum(system, max_steps=steps)
        assert found.steps == steps
        assert not found.converged
        assert found.predicted_fall > 1e-18
    assert local_minimum(system, max_steps=200).steps < 50


def test_where_the_gradient_is_zero_from_the_start() -> None:
    """x' = u: to do nothing is best, and the search knows it without a step."""
    one = torch.ones(1, 1, dtype=torch.float64)
    found = local_minimum(LinearQuadratic(0 * one, one, one, one, one))
    assert found.converged
    assert found.steps == 0
    assert found.gain == 0


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    system = two_valleys()
    with pytest.raises(ValueError, match=r"gain: expected a stable closed loop .* got spectral radius"):
        local_minimum(system, double([0.4]))
    with pytest.raises(ValueError, match=r"gain: expected shape \(m=1 p=1\), got \(1, 2\)"):
        local_minimum(system, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="max_steps: expected a finite number >= 0, got -1"):
        local_minimum(system, max_steps=-1)
    with pytest.raises(ValueError, match="tolerance: expected a finite number > 0, got 0"):
        local_minimum(system, tolerance=0)
