"""Random projections that keep inner products in the mean: Gaussian entries, and blocks summed with random signs."""

import pytest
import torch
from torch import Tensor

from isopo_mini.geometry import gram
from isopo_mini.geometry.sketches import SignProjection, columns_of, draw_projection, draw_sketch, project


def signs(blocks: int, size: int, seed: int = 0) -> SignProjection:
    """A projection of blocks · size numbers."""
    like = torch.zeros(1, dtype=torch.float64)
    drawn = draw_projection(size, blocks * size, like, torch.Generator().manual_seed(seed), "signs")
    assert isinstance(drawn, SignProjection)
    return drawn


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_sums_of_blocks_are_the_product_with_the_matrix(blocks: int) -> None:
    projection, vectors = signs(blocks, 5), draw(2, 3, 5 * blocks)
    before = vectors.clone()
    torch.testing.assert_close(project(vectors, projection), vectors @ projection.dense().T, rtol=1e-14, atol=1e-14)
    assert torch.equal(vectors, before)
    lent: list[Tensor] = []

    def memory(shape: tuple[int, ...], like: Tensor) -> Tensor:
        lent.append(torch.full(shape, torch.nan, dtype=like.dtype))
        return lent[-1]

    assert torch.equal(project(vectors, projection, memory), project(vectors, projection))
    assert [piece.isfinite().all() for piece in lent] == [True]
    indices = torch.tensor([[0, 4], [5 * blocks - 1, 2]])
    assert torch.equal(columns_of(projection, indices, torch.float64), projection.dense().T[indices])


def test_a_column_has_one_entry_and_its_length_is_one() -> None:
    matrix = signs(7, 4).dense()
    assert torch.equal((matrix != 0).sum(dim=0), torch.ones(28, dtype=torch.int64))
    assert torch.equal((matrix.T @ matrix).diagonal(), torch.ones(28, dtype=torch.float64))
    assert 0 < (matrix == 1).sum() < 28  # both signs


def test_its_mean_and_variance_are_those_of_its_docstring() -> None:
    """(Pu)·(Pv) over all 2⁶ signs of two blocks of three: the mean is u·v, and the variance the sum over pairs."""
    u, v = draw(6, seed=2), draw(6, seed=3)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    products = torch.stack(
        [(project(u, p) * project(v, p)).sum() for s in every for p in [SignProjection(s.view(2, 3))]]
    )
    variance = sum(
        (u[i] * v[j]) ** 2 + u[i] * v[i] * u[j] * v[j]
        for i in range(6)
        for j in range(6)
        if i != j and (i - j) % 3 == 0
    )
    torch.testing.assert_close(products.mean(), u @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products.var(correction=0), torch.as_tensor(variance), rtol=1e-12, atol=1e-12)


def test_all_of_a_vector_at_one_place_is_where_signs_do_badly() -> None:
    """The docstring's worst case: 2(1 − 1/m) of (v·v)², far from 2/k."""
    v = torch.zeros(2, 16, dtype=torch.float64)
    v[:, 5] = 1.0
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    squares = torch.stack(
        [project(v.flatten(), SignProjection(s[:, None].expand(2, 16))).square().sum() for s in every]
    )
    torch.testing.assert_close(squares.var(correction=0) / 2.0**2, torch.tensor(2 * (1 - 1 / 2), dtype=torch.float64))


@pytest.mark.parametrize("indexed", [False, True])
def test_the_gram_matrix_of_a_sketch_of_signs_is_unbiased(indexed: bool) -> None:
    """Mean of 1,000 sketches against K, in units of its own standard error: within 5 everywhere."""
    rows, columns, k = 9, 6, 3
    left = torch.randint(0, rows, (4, 5)) if indexed else draw(4, 5, rows)
    right = draw(4, 5, columns, seed=4)
    exact = gram.dense(left, right, rows)
    generator = torch.Generator().manual_seed(1)
    drawn = [draw_sketch(k, rows, columns, right, generator, "signs") for _ in range(1000)]
    estimates = torch.stack([gram.sketched(left, right, sketch) for sketch in drawn])
    standard_error = estimates.std(dim=0) / 1000**0.5
    assert ((estimates.mean(dim=0) - exact).abs() < 5 * standard_error + 1e-12).all()
    assert (estimates[0] - exact).norm() > 0.05 * exact.norm()


def test_signs_are_closer_than_gaussian_projections() -> None:
    """Vectors that are spread evenly, the same k: the error of K is smaller, over 60 draws each."""
    left, right = draw(6, 3, 64), draw(6, 3, 64, seed=5)
    exact = gram.dense(left, right)
    generator = torch.Generator().manual_seed(2)

    def error(kind: str) -> float:
        drawn = [draw_sketch(16, 64, 64, right, generator, kind) for _ in range(60)]
        return float(torch.stack([(gram.sketched(left, right, s) - exact).norm() for s in drawn]).mean())

    assert error("signs") < 0.95 * error("gaussian")


def test_lengths_that_do_not_divide_get_a_gaussian_projection() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert isinstance(draw_projection(4, 10, like, kind="signs"), Tensor)
    sketch = draw_sketch(4, 8, 10, like, kind="signs")
    assert isinstance(sketch.left, SignProjection)
    assert isinstance(sketch.right, Tensor)
    with pytest.raises(ValueError, match="kind: expected one of gaussian, signs, got 'sparse'"):
        draw_projection(4, 8, like, kind="sparse")


def test_half_precision_is_added_up_in_single() -> None:
    """Nine numbers of 1 and one of 256 in bfloat16: added one by one the ones would be lost."""
    vectors = torch.ones(1, 10, dtype=torch.bfloat16)
    vectors[0, 0] = 256.0
    total = project(vectors, SignProjection(torch.ones(10, 1, dtype=torch.bfloat16)))
    few = project(vectors[:, :8], SignProjection(torch.ones(8, 1, dtype=torch.bfloat16)))
    assert (total.item(), few.item()) == (264.0, 264.0)  # 265 and 263, to the nearest that bfloat16 has
