"""The coefficient transforms against the linear algebra that they abbreviate."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.geometry import isopo, ntk_solvers


def random_scores(sequences: int = 6, parameters: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sequences, parameters, dtype=torch.float64, generator=generator)
    return scores, torch.randn(sequences, dtype=torch.float64, generator=generator)


@settings(max_examples=25, deadline=None)
@given(sequences=st.integers(1, 7), parameters=st.integers(1, 7), damping=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_ntk_is_damping_times_the_natural_gradient(sequences: int, parameters: int, damping: float, seed: int) -> None:
    """Push-through: Sᵀ λ(SSᵀ+λI)⁻¹A = λ(SᵀS+λI)⁻¹SᵀA. The right side is P×P and never sees the Gram matrix."""
    scores, advantages = random_scores(sequences, parameters, seed)
    step = scores.T @ isopo.ntk_coefficients(scores @ scores.T, advantages, damping)
    identity = torch.eye(parameters, dtype=torch.float64)
    expected = damping * torch.linalg.solve(scores.T @ scores + damping * identity, scores.T @ advantages)
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-10)


def test_one_sequence_is_sherman_morrison() -> None:
    scores, advantages = random_scores(sequences=1)
    squared_norm = scores.square().sum()
    coefficient = isopo.ntk_coefficients(scores @ scores.T, advantages, 0.7)
    torch.testing.assert_close(coefficient, 0.7 * advantages / (0.7 + squared_norm), rtol=1e-14, atol=0.0)


def test_large_damping_is_reinforce() -> None:
    scores, advantages = random_scores()
    gram = scores @ scores.T
    coefficients = isopo.ntk_coefficients(gram, advantages, 1e9 * float(gram.trace()))
    torch.testing.assert_close(coefficients, advantages, rtol=1e-8, atol=0.0)


def test_small_damping_is_the_natural_gradient() -> None:
    scores, advantages = random_scores()
    gram = scores @ scores.T
    coefficients = isopo.ntk_coefficients(gram, advantages, 1e-9)
    torch.testing.assert_close(coefficients / 1e-9, torch.linalg.solve(gram, advantages), rtol=1e-6, atol=1e-9)


def test_identical_sequences_share_one_coefficient() -> None:
    """The Gram matrix is singular, and that is fine: m copies of one sequence act as one with damping λ/m."""
    scores, _ = random_scores(sequences=1)
    copies = scores.expand(4, -1)
    advantages = torch.tensor([2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    coefficients = isopo.ntk_coefficients(copies @ copies.T, advantages, 0.5)
    alone = isopo.ntk_coefficients(scores @ scores.T, advantages[:1], 0.5 / 4)
    torch.testing.assert_close(coefficients, alone.expand(4), rtol=1e-12, atol=0.0)


def test_zero_advantages_and_zero_gradients() -> None:
    scores, advantages = random_scores()
    gram = scores @ scores.T
    assert torch.equal(isopo.ntk_coefficients(gram, torch.zeros_like(advantages), 1.0), torch.zeros_like(advantages))
    # A layer without any gradient has K = 0 and so λ = 0: the advantages stay as they are.
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(isopo.solve_ntk(torch.zeros_like(gram), advantages, zero), advantages)


def test_single_precision_survives_a_wide_spectrum() -> None:
    """λ a thousandth of the mean eigenvalue, float32 in and out, against float64 throughout."""
    scores, advantages = random_scores(sequences=64, parameters=40)
    gram = scores @ scores.T
    damping = 1e-3 * float(isopo.mean_eigenvalue(gram))
    single = isopo.ntk_coefficients(gram.float(), advantages.float(), damping)
    step, expected = (scores.T @ c.double() for c in (single, isopo.ntk_coefficients(gram, advantages, damping)))
    assert (step - expected).norm() < 1e-3 * expected.norm()  # the input is only rounded once, to 6e-8 of tr K


@settings(max_examples=25, deadline=None)
@given(sequences=st.integers(1, 7), parameters=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_participation_ratio_is_that_of_the_eigenvalues(sequences: int, parameters: int, seed: int) -> None:
    scores, _ = random_scores(sequences, parameters, seed)
    eigenvalues = torch.linalg.svdvals(scores).square()  # of K, without K
    ratio = isopo.participation_ratio(scores @ scores.T)
    torch.testing.assert_close(ratio, eigenvalues.sum().square() / eigenvalues.square().sum(), rtol=1e-10, atol=0.0)
    assert 1 - 1e-12 <= ratio <= min(sequences, parameters) + 1e-12


def test_the_participation_ratio_counts_directions_and_has_no_units() -> None:
    rotation = torch.linalg.qr(random_scores(6, 6)[0])[0]
    for rank in range(1, 7):
        projector = rotation[:, :rank] @ rotation[:, :rank].T
        for size in (1e-200, 1.0, 1e200):  # a square of these entries would not fit
            torch.testing.assert_close(isopo.participation_ratio(size * projector).item(), float(rank))
    single = isopo.participation_ratio(1e-30 * projector.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.item(), 6.0, rtol=1e-5, atol=0.0)
    assert isopo.participation_ratio(torch.zeros(3, 3)) == 0


@pytest.mark.usefixtures("unchecked")
def test_the_participation_ratio_of_what_is_no_gram_matrix() -> None:
    with pytest.raises(ValueError, match=r"gram: expected shape \(S S\), got \(2, 3\)"):
        isopo.participation_ratio(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gram: expected finite numbers"):
        isopo.participation_ratio(torch.full((2, 2), torch.inf))


@settings(max_examples=25, deadline=None)
@given(sequences=st.integers(1, 7), parameters=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_damping_share_says_what_is_left_of_the_top_direction(sequences: int, parameters: int, seed: int) -> None:
    scores, _ = random_scores(sequences, parameters, seed)
    left, sizes, _ = torch.linalg.svd(scores, full_matrices=False)
    share = isopo.damping_share(scores @ scores.T, 0.3)
    torch.testing.assert_close(share, 0.3 / sizes[0].square(), rtol=1e-10, atol=0.0)
    kept = isopo.ntk_coefficients(
        scores @ scores.T, left[:, 0], 0.3
    )  # of REINFORCE's coefficients along that direction
    torch.testing.assert_close(kept, share / (1 + share) * left[:, 0], rtol=1e-8, atol=1e-10)


def test_the_damping_share_has_no_units() -> None:
    for size in (1e-200, 1.0, 1e200):
        K = size * torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
        torch.testing.assert_close(isopo.damping_share(K, size).item(), 0.25)
    single = isopo.damping_share(1e-30 * torch.eye(2), 1e-30)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.item(), 1.0)
    assert isopo.damping_share(torch.zeros(3, 3), 1.0) == torch.inf


@pytest.mark.usefixtures("unchecked")
def test_the_damping_share_of_what_is_no_gram_matrix_or_damping() -> None:
    with pytest.raises(ValueError, match=r"gram: expected shape \(S S\), got \(2, 3\)"):
        isopo.damping_share(torch.ones(2, 3), 1.0)
    with pytest.raises(ValueError, match="gram: expected finite numbers"):
        isopo.damping_share(torch.full((2, 2), torch.inf), 1.0)
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0, got -1"):
        isopo.damping_share(torch.eye(2), -1.0)


def test_fisher_norms_are_quadratic_forms_of_the_empirical_fisher() -> None:
    scores, _ = random_scores()
    fisher = scores.T @ scores / scores.shape[0]
    expected = torch.einsum("sp,pq,sq->s", scores, fisher, scores).sqrt()
    torch.testing.assert_close(isopo.fisher_norms(scores @ scores.T), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(isopo.exact_fisher_norms(scores, fisher), expected, rtol=1e-12, atol=0.0)


def test_token_norm_with_every_sequence_as_its_token_is_the_sequence_norm() -> None:
    """With T = 1 the tokens are the sequences; the public code's denominator is then √(tr K)."""
    scores, _ = random_scores()
    gram = scores @ scores.T
    torch.testing.assert_close(isopo.token_fisher_norms(gram), isopo.fisher_norms(gram), rtol=1e-12, atol=0.0)
    token_norms = gram.diagonal().sqrt()
    ratio = isopo.fisher_norms(gram) / isopo.token_fisher_norms(gram, token_norms)
    root_trace = (gram.trace() / 6).sqrt()  # √tr F̂: the same for all sequences
    torch.testing.assert_close(ratio, root_trace.expand(6), rtol=1e-12, atol=0.0)


def test_every_sequence_gets_a_step_of_fisher_length_one() -> None:
    scores, _ = random_scores()
    fisher = scores.T @ scores / 6
    ones = torch.ones(6, dtype=torch.float64)
    coefficients = isopo.normalized_coefficients(isopo.exact_fisher_norms(scores, fisher), ones)
    torch.testing.assert_close(isopo.exact_fisher_norms(coefficients[:, None] * scores, fisher), ones)


def test_powers_and_regularisers_as_written() -> None:
    norms = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.equal(isopo.normalized_coefficients(norms, advantages, power=0.0), advantages)
    torch.testing.assert_close(isopo.normalized_coefficients(norms, advantages, power=2.0), advantages / norms**2)
    floor = isopo.normalized_coefficients(norms, advantages, strength=0.1, mean_square=4.0)
    torch.testing.assert_close(floor, advantages / (norms**2 + 0.4).sqrt())
    keep = isopo.normalized_coefficients(norms, advantages, strength=0.1, mean_square=4.0, keep_small=True)
    torch.testing.assert_close(keep, advantages / (norms**2 / 0.4 + 1).sqrt())


def test_keep_small_leaves_small_gradients_alone_and_the_floor_does_not() -> None:
    """The two regularisers are easily confused: at x² ≪ ρm one divides by 1, the other by √(ρm)."""
    norms, advantages = torch.tensor([1e-6, 1.0]).double(), torch.ones(2).double()
    keep = isopo.normalized_coefficients(norms, advantages, strength=0.01, mean_square=1.0, keep_small=True)
    floor = isopo.normalized_coefficients(norms, advantages, strength=0.01, mean_square=1.0)
    assert keep[0] == pytest.approx(1.0, abs=1e-9)
    assert floor[0] == pytest.approx(10.0, abs=1e-9)


def test_a_sequence_without_gradient_gets_coefficient_zero() -> None:
    coefficients = isopo.normalized_coefficients(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 5.0]))
    assert coefficients.tolist() == [0.0, 2.5]


class TestNaturalScale:
    """c = (K + λI)⁻¹A."""

    @pytest.mark.parametrize("damping", [1e-3, 0.3, 1e3])
    @pytest.mark.parametrize(("sequences", "parameters"), [(1, 3), (6, 9), (6, 2)])  # the last K is singular
    def test_is_the_dense_solve(self, sequences: int, parameters: int, damping: float) -> None:
        scores, advantages = random_scores(sequences, parameters)
        gram = scores @ scores.T
        natural = isopo.ntk_coefficients(gram, advantages, damping, scale="natural")
        identity = torch.eye(sequences, dtype=torch.float64)
        torch.testing.assert_close(
            natural, torch.linalg.solve(gram + damping * identity, advantages), rtol=1e-10, atol=1e-12
        )
        in_scale_of_gradient = isopo.ntk_coefficients(gram, advantages, damping, scale="gradient")
        torch.testing.assert_close(natural, in_scale_of_gradient / damping, rtol=1e-14, atol=0.0)
        assert torch.equal(isopo.ntk_coefficients(gram, advantages, damping), in_scale_of_gradient)  # the default

    @settings(max_examples=25, deadline=None)
    @given(damping=st.floats(1e-3, 1e3), factor=st.floats(1e-2, 1e2), seed=st.integers(0, 99))
    def test_step_in_function_space_does_not_depend_on_the_units_of_the_layer(
        self, damping: float, factor: float, seed: int
    ) -> None:
        """W = aV: scores a·S, K and λ a² as large, and a times the step of V is the step of W."""
        scores, advantages = random_scores(seed=seed)

        def step(factor: float, scale: str) -> Tensor:
            scaled = factor * scores
            coefficients = isopo.ntk_coefficients(scaled @ scaled.T, advantages, factor**2 * damping, scale)
            return factor * scaled.T @ coefficients

        torch.testing.assert_close(step(factor, "natural"), step(1.0, "natural"), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(step(factor, "gradient"), factor**2 * step(1.0, "gradient"), rtol=1e-9, atol=1e-10)

    def test_small_damping_is_the_undamped_natural_gradient(self) -> None:
        """Of a K that can be inverted, down to a λ that its solver by eigenvalues takes over."""
        scores, advantages = random_scores()
        gram = scores @ scores.T
        expected = torch.linalg.solve(gram, advantages)
        for damping in (1e-9, 1e-14):
            found = isopo.ntk_coefficients(gram, advantages, damping, scale="natural")
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    def test_singular_gram_matrix(self) -> None:
        """Copies of one sequence: A in the range of K is divided by m‖g‖² + λ, A in its null space by λ."""
        gram = torch.full((4, 4), 3.0, dtype=torch.float64)
        alike, against = torch.ones(4).double(), torch.tensor([1.0, -1.0, 0.0, 0.0]).double()
        for damping in (0.5, 1e-13):
            found = isopo.ntk_coefficients(gram, alike, damping, scale="natural")
            torch.testing.assert_close(found.mean().item(), 1 / (12 + damping), rtol=1e-12, atol=0.0)
            # What rounding puts into the null space is divided by λ too, and Σ_s c_s g_s does not see it.
            assert (found - found.mean()).abs().max() < 1e-15 / damping
            found = isopo.ntk_coefficients(gram, against, damping, scale="natural")
            torch.testing.assert_close(found, against / damping, rtol=1e-12, atol=1e-14 / damping)

    def test_without_gradient(self) -> None:
        """K = 0 with a λ > 0 is A/λ; the engine's λ = ρ·tr K/S = 0 stands for no step at all."""
        zero, advantages = torch.zeros(3, 3), torch.tensor([1.0, -2.0, 0.5])
        assert torch.equal(isopo.ntk_coefficients(zero, advantages, 0.25, scale="natural"), 4 * advantages)
        assert torch.equal(isopo.over_scale(advantages, torch.tensor(0.0)), torch.zeros(3))
        for scale in (torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            halved = isopo.over_scale(advantages, scale)
            assert torch.equal(halved, 2 * advantages)
            assert halved.dtype == torch.float32

    @pytest.mark.usefixtures("unchecked")
    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"^scale: expected one of gradient, natural, got 'fisher'$"):
            isopo.ntk_coefficients(torch.eye(3), torch.ones(3), 1.0, scale="fisher")
        with pytest.raises(ValueError, match=r"^c/λ: expected numbers that fit float32, got inf at index \(1,\)$"):
            isopo.ntk_coefficients(torch.zeros(2, 2), torch.tensor([0.0, 1.0]), 1e-39, scale="natural")


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    gram, advantages = torch.eye(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"gram: expected shape \(S S\), got \(3, 4\)"):
        isopo.ntk_coefficients(torch.ones(3, 4), advantages, 1.0)
    with pytest.raises(ValueError, match=r"advantages: expected shape \(S=3\), got \(4,\)"):
        isopo.ntk_coefficients(gram, torch.ones(4), 1.0)
    with pytest.raises(ValueError, match=r"damping: expected a finite number > 0, got -1"):
        isopo.ntk_coefficients(gram, advantages, -1.0)
    with pytest.raises(ValueError, match=r"gram: expected finite numbers, got nan at index \(0, 1\)"):
        isopo.ntk_coefficients(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), advantages[:2], 1.0)
    with pytest.raises(TypeError, match=r"advantages: expected a floating-point tensor, got torch.int64"):
        isopo.ntk_coefficients(gram, torch.ones(3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"norms: expected numbers >= 0, got -1"):
        isopo.normalized_coefficients(torch.tensor([-1.0]), torch.ones(1))
    with pytest.raises(ValueError, match=r"strength: expected a finite number >= 0, got -0.1"):
        isopo.normalized_coefficients(torch.ones(1), torch.ones(1), strength=-0.1)
    with pytest.raises(ValueError, match=r"gram: expected at least one entry"):
        isopo.fisher_norms(torch.ones(0, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "solver", [ntk_solvers.solve_ntk, ntk_solvers.solve_ntk_in_single, ntk_solvers.solve_ntk_by_eigenvalues]
)
def test_several_systems_are_solved_as_one_by_one(solver: Callable[..., Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).to(dtype)
    grams, advantages = rows @ rows.mT, torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype)
    damping = torch.tensor([0.1, 1.0, 10.0], dtype=dtype)
    one_by_one = [solver(*system) for system in zip(grams, advantages, damping, strict=True)]
    torch.testing.assert_close(solver(grams, advantages, damping), torch.stack(one_by_one))
