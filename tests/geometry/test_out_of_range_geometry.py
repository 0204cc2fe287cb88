"""Geometry where numbers leave the range of their dtype: fourth powers of gradients, dampings below rounding error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.engine import NTK, FisherNormalized, Isopo
from isopo_mini.geometry import fisher, isopo
from isopo_mini.geometry.natural_gradient import solve, solve_cg, solve_dual, solve_rank_one
from isopo_mini.policies import MLP, TabularSoftmax
from isopo_mini.rules import NtkIsopo
from isopo_mini.tasks import Bandit
from isopo_mini.training.loop import train


def random_scores(sequences: int = 6, parameters: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(sequences, parameters, dtype=torch.float64), torch.randn(sequences, dtype=torch.float64)


class TestNtk:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("damping", [1e-5, 1e-8, 1e-16, 1e-30])
    @pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12])
    def test_what_lies_in_the_null_space_stays(self, unit: float, damping: float, dtype: torch.dtype) -> None:
        """Sequences that repeat, as in every tabular bandit: c = A where A sums to 0 over the copies."""
        gram = unit * torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 4.0]], dtype=dtype)
        advantages = torch.tensor([1.0, -1.0, 3.0], dtype=dtype)
        given = isopo.ntk_coefficients(gram, advantages, unit * damping)
        ratio = damping / (4 + damping)
        expected = torch.tensor([1.0, -1.0, 3 * ratio], dtype=dtype)
        # λ below the smallest normal number of single precision times K is 0, and so is the share of what λ is beside.
        torch.testing.assert_close(given, expected, rtol=1e-6 if dtype == torch.float32 else 1e-8, atol=1e-37)

    @settings(max_examples=50, deadline=None)
    @given(
        sequences=st.integers(1, 8),
        rank=st.integers(1, 8),
        exponent=st.integers(-30, 3),
        single=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_no_coefficient_is_longer_than_the_advantages(
        self, sequences: int, rank: int, exponent: int, single: bool, seed: int
    ) -> None:
        """λ/(μ + λ) ≤ 1 for every eigenvalue, those that rounding has made negative included."""
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if single else torch.float64
        scores = torch.randn(sequences, rank, generator=generator, dtype=dtype)
        advantages = torch.randn(sequences, generator=generator, dtype=dtype)
        coefficients = isopo.ntk_coefficients(scores @ scores.T, advantages, 10.0**exponent)
        assert coefficients.norm() <= (1 + 1e-5) * advantages.norm()

    def test_both_solvers_agree_where_both_can(self) -> None:
        scores, advantages = random_scores()
        gram = scores @ scores.T
        for ratio in (1e-10, 1e-3, 1.0, 1e5):
            damping = ratio * isopo.mean_eigenvalue(gram)
            direct, spectral = (
                solver(gram, advantages, damping) for solver in (isopo.solve_ntk, isopo.solve_ntk_by_eigenvalues)
            )
            # The condition number of K + λI is at most 1e3 here, of K itself.
            torch.testing.assert_close(direct, spectral, rtol=1e-10, atol=1e-14)
        zero = torch.zeros((), dtype=torch.float64)
        assert torch.equal(isopo.solve_ntk_by_eigenvalues(torch.zeros_like(gram), advantages, zero), advantages)

    def test_single_precision_solves_as_well_as_its_gram_matrix_is_known(self) -> None:
        """ρ = 1e-4 of 64 sequences: solved in single precision, a third of the digits of c would be wrong."""
        scores, advantages = random_scores(64, 40)
        gram = (scores @ scores.T).float()
        damping = 1e-4 * float(isopo.mean_eigenvalue(gram))
        given = isopo.ntk_coefficients(gram, advantages.float(), damping)
        expected = isopo.ntk_coefficients(gram.double(), advantages.float().double(), damping)
        torch.testing.assert_close(given.double(), expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("damping", [1e-8, 1e-12])
    def test_training_goes_on(self, damping: float) -> None:
        policy = TabularSoftmax(1, 3)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        table = train(policy, Bandit(torch.tensor([1.0, 0.0, 0.5])), NtkIsopo(damping), optimizer, 3, 0, progress=False)
        assert all(math.isfinite(value) for value in table["gradient_norm"])


class TestNorms:
    @pytest.mark.parametrize("exponent", [-15, -12, -11, 9, 10, 15])
    @pytest.mark.parametrize(
        "transform",
        [
            FisherNormalized(),
            FisherNormalized(strength=0.1),
            FisherNormalized(norm="token"),
            FisherNormalized(norm="token-unscaled"),
            FisherNormalized(overlap_power=0.0, ratio_power=1.0),
        ],
        ids=str,
    )
    def test_the_update_is_homogeneous(self, transform: FisherNormalized, exponent: int) -> None:
        """The engine in single precision: with gradients s times as long the update is s^degree times the old."""
        degree = {"sequence": -1, "token": 0, "token-unscaled": -1}[transform.norm] if transform.overlap_power else 0
        model, x, advantages = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5)

        def update(scale: float) -> Tensor:
            model.zero_grad()
            with Isopo(model, transform).microbatch(advantages):
                (scale * model(x).log_softmax(-1)[:, :1]).sum().backward()
            assert model.weight.grad is not None
            return model.weight.grad.double() / scale**degree

        torch.testing.assert_close(update(10.0**exponent), update(1.0), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("unit", [1e-30, 1e-18, 1e18, 1e30])
    def test_norms_follow_the_unit(self, unit: float) -> None:
        scores, _ = random_scores()
        gram, matrix = scores @ scores.T, scores.T @ scores / 6
        single, double = (unit * gram).float(), unit * gram
        close = {"rtol": 1e-5, "atol": 0.0}
        torch.testing.assert_close(isopo.fisher_norms(single).double(), isopo.fisher_norms(double), **close)
        overlaps, tokens = single[:, :4], (unit * gram.diagonal()[:4]).float()
        for token_norms in (None, tokens):
            wide = None if token_norms is None else tokens.double()
            expected = isopo.token_fisher_norms(overlaps.double(), wide)
            torch.testing.assert_close(isopo.token_fisher_norms(overlaps, token_norms).double(), expected, **close)
        # √(gᵀFg) is of degree 1 in g and ½ in F.
        expected = isopo.exact_fisher_norms(scores, matrix)
        for power in ((1.0, 0.0), (0.0, 1.0)):
            factor = unit ** power[0], unit ** power[1]
            norms = isopo.exact_fisher_norms((factor[0] * scores).float(), (factor[1] * matrix).float())
            torch.testing.assert_close(norms.double() / (factor[0] * factor[1] ** 0.5), expected, **close)

    @pytest.mark.parametrize("keep_small", [False, True])
    @pytest.mark.parametrize("unit", [1e-30, 1e-24, 1e24, 1e30])
    def test_regularised_coefficients_follow_the_unit(self, unit: float, keep_small: bool) -> None:
        norms, advantages = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([1.0, -2.0, 3.0])
        options = {"strength": 0.3, "keep_small": keep_small}
        expected = isopo.normalized_coefficients(norms, advantages, **options)  # type: ignore[arg-type]
        given = isopo.normalized_coefficients(unit * norms, advantages, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(given * (1.0 if keep_small else unit), expected)
        # Powers are taken before anything can vanish: x² is 0 in single precision from 1e-23 down.
        squared = isopo.normalized_coefficients(unit * norms, unit * advantages, power=2.0)
        torch.testing.assert_close(squared * unit, advantages / norms**2)

    @pytest.mark.usefixtures("unchecked")
    def test_a_coefficient_that_does_not_fit_is_an_error(self) -> None:
        with pytest.raises(
            ValueError, match=r"advantages / norms \*\* power: expected numbers that fit float32, got inf"
        ):
            isopo.normalized_coefficients(torch.tensor([1e-20]), torch.tensor([1.0]), power=2.0)


class TestSolvers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("damping", [1e-3, 1e-8, 1e-16, 1e-30])
    def test_one_sample_at_any_damping(self, damping: float, dtype: torch.dtype) -> None:
        """2s/(λ + ‖s‖²), which the two-term formula turns into the zero vector from λ = 1e-8 on."""
        score = torch.nn.functional.normalize(torch.randn(1000, dtype=dtype), dim=0)
        expected = 2 * score.double() / (damping + score.double().square().sum())
        tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-12, "atol": 0.0}
        given = solve_rank_one(score, 2 * score, damping)
        torch.testing.assert_close(given.double(), expected, **tolerance)
        dual = solve_dual(score[None], torch.tensor([2.0], dtype=dtype), damping)
        torch.testing.assert_close(dual.double(), expected, **tolerance)

    def test_what_lies_across_the_score_is_divided_by_the_damping(self) -> None:
        score, vector = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([4.0, -3.0, 1.0])
        torch.testing.assert_close(solve_rank_one(score, vector, 1e-9), 1e9 * vector)
        mixed = solve_rank_one(score, vector + score, 1e-9).double()
        torch.testing.assert_close(mixed, (1e9 * vector + score / 25).double(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("damping", [1e-6, 1e-12, 1e-16, 1e-30])
    def test_dual_with_samples_that_repeat(self, damping: float) -> None:
        """K is singular, and A has a part in its null space, which must not come back divided by λ."""
        scores = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
        advantages = torch.tensor([5.0, -1.0, 3.0], dtype=torch.float64)
        # The two copies act as one of their mean advantage; in the limit of λ → 0 the system is interpolated.
        expected = torch.linalg.solve(scores[1:], torch.tensor([2.0, 3.0], dtype=torch.float64))
        given = solve_dual(scores, advantages, damping)
        torch.testing.assert_close(given, expected, rtol=max(1e-9, 100 * damping), atol=0)

    def test_a_damping_too_small_to_matter_is_none(self) -> None:
        matrix, gradient = torch.ones(3, 3), torch.ones(3)
        with pytest.raises(
            ValueError, match=r"damping: expected a number > 2e-15, since fisher is singular .* got 1e-20"
        ):
            solve(matrix, gradient, 1e-20)
        # In double precision 1e-9 is enough, also for a matrix in single.
        torch.testing.assert_close(solve(matrix, gradient, 1e-9), gradient / 3)

    @pytest.mark.parametrize("unit", [1e-30, 1e-20, 1e20, 1e30])
    def test_conjugate_gradients_of_any_size(self, unit: float) -> None:
        """The norm of g in single precision would be 0, and the zero vector 'converged'; or infinite."""
        eigenvalues, gradient = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([1.0, -2.0, 1.0])
        x, convergence = solve_cg(lambda v: eigenvalues * v, unit * gradient, 0.1, 20, 1e-6)
        assert convergence.converged
        assert convergence.iterations == 3
        torch.testing.assert_close(x / unit, gradient / (eigenvalues + 0.1), rtol=1e-4, atol=0)

    @pytest.mark.usefixtures("unchecked")
    def test_an_answer_that_does_not_fit_is_an_error(self) -> None:
        score, vector = torch.tensor([0.0, 1.0]), torch.tensor([1e30, 0.0])
        message = r": expected numbers that fit float32, got inf at index \(0,\)"
        with pytest.raises(ValueError, match=r"\(score scoreᵀ \+ damping · I\)⁻¹ vector" + message):
            solve_rank_one(score, vector, 1e-30)
        with pytest.raises(ValueError, match=r"\(fisher \+ damping · I\)⁻¹ gradient" + message):
            solve(1e-30 * torch.eye(2), vector, 0.0)
        with pytest.raises(ValueError, match=r"\(fisher \+ damping · I\)⁻¹ gradient" + message):
            solve_cg(lambda v: 1e-30 * v, vector, 0.0)
        with pytest.raises(ValueError, match=r"\(fisher \+ damping · I\)⁻¹ gradient" + message):
            solve_dual(torch.tensor([[1e-30, 0.0]]), torch.tensor([1e30]), 1e-70)


class TestHalfPrecision:
    """What comes in half precision is computed in single: exact up to the rounding of the network itself."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_fisher_matrices(self, dtype: torch.dtype) -> None:
        policy, observations = TabularSoftmax(2, 4).to(dtype), torch.tensor([0, 1, 1])
        with torch.no_grad():
            policy.table.weight.copy_(torch.randn(2, 4))
        twin = TabularSoftmax(2, 4).double()
        twin.load_state_dict(policy.state_dict())
        vector, weights = torch.randn(8).to(dtype), torch.tensor([0.5, 0.25, 0.25]).to(dtype)
        actions, eps = torch.tensor([0, 3, 1]), torch.finfo(dtype).eps
        for single, double in (
            (fisher.score_matrix(policy, observations, actions), fisher.score_matrix(twin, observations, actions)),
            (
                fisher.exact_fisher(policy, observations, weights),
                fisher.exact_fisher(twin, observations, weights.double()),
            ),
            (
                fisher.fisher_vector_product(policy, observations, vector, weights),
                fisher.fisher_vector_product(twin, observations, vector.double(), weights.double()),
            ),
        ):
            assert single.dtype == torch.float32
            # Derivatives of a parameter in half precision are in half; sums over them are not.
            torch.testing.assert_close(single.double(), double, rtol=4 * eps, atol=eps)

    def test_sums_over_many_samples(self) -> None:
        """4,096 ones: bfloat16 stops at 256."""
        scores = torch.ones(4096, 1, dtype=torch.bfloat16)
        assert fisher.empirical_fisher(scores).item() == 1.0
        assert solve_dual(scores, torch.ones(4096, dtype=torch.bfloat16), 1.0).item() == pytest.approx(0.5)

    @pytest.mark.usefixtures("unchecked")
    def test_what_does_not_fit(self) -> None:
        with pytest.raises(
            ValueError, match=r"scoresᵀscores/N: expected numbers that fit float32, got inf at index \(0"
        ):
            fisher.empirical_fisher(torch.full((2, 2), 1e20))
        policy = TabularSoftmax(1, 2).half()
        with pytest.raises(ValueError, match=r"vector: expected numbers that fit float16, got inf at index \(1,\)"):
            fisher.fisher_vector_product(policy, torch.tensor([0]), torch.tensor([0.0, 1e6]))

    def test_weights_of_any_size(self) -> None:
        policy, observations = MLP(3, 4), torch.randn(5, 3)
        weights = torch.rand(5)
        expected = fisher.exact_fisher(policy, observations, weights)
        for unit in (1e-30, 1e30, 3e38):
            torch.testing.assert_close(fisher.exact_fisher(policy, observations, unit * weights), expected)


def test_transforms_know_a_damping_below_rounding_by_its_ratio() -> None:
    """A linear model on repeating inputs, ρ = 1e-9 in single precision: the engine agrees with the closed form."""
    model, x = torch.nn.Linear(3, 2, bias=False), torch.randn(1, 3).repeat(4, 1)
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.0])
    with Isopo(model, NTK(1e-9)).microbatch(advantages):
        model(x).log_softmax(-1)[:, :1].sum().backward()
    given = model.weight.grad
    scores = fisher.score_matrix(model, x, torch.zeros(4, dtype=torch.int64)).double()
    # All rows of S alike: c = A − mean(A) + mean(A) · ρ/(4·1 + ρ), of which only the last part moves anything.
    expected = (scores.sum(0) * advantages.double().mean() * 1e-9 / (4 + 1e-9)).reshape(2, 3)
    assert given is not None
    assert torch.isfinite(given).all()
    # c = A − mean(A) cancels to 1e-7 of A in single precision, a hundred times what is left.
    assert (given.double() - expected).norm() < 1e-6 * scores.norm()
