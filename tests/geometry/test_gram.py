"""Three ways to one matrix: each fast Gram matrix against the gradients written out, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isopo_mini.engine.parameter_gradients import MatrixGradients
from isopo_mini.geometry import gram

sizes = st.integers(1, 5)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def literal_gram(left: Tensor, right: Tensor) -> Tensor:
    """K_ss' = Σ_oi G_s[o,i] G_s'[o,i] with G_s[o,i] = Σ_t left_sto right_sti, as one reads it."""
    gradients = torch.einsum("sto,sti->soi", left, right)
    return torch.einsum("soi,roi->sr", gradients, gradients)


@settings(max_examples=25, deadline=None)
@given(sequences=sizes, positions=sizes, rows=sizes, columns=sizes)
def test_dense_and_ghost_agree_with_the_literal_sum(sequences: int, positions: int, rows: int, columns: int) -> None:
    left, right = draw(sequences, positions, rows), draw(sequences, positions, columns)
    expected = literal_gram(left, right)
    torch.testing.assert_close(gram.dense(left, right), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.ghost(left, right), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(sequences=sizes, positions=sizes, rows=sizes, columns=sizes)
def test_indices_stand_for_one_hot_vectors(sequences: int, positions: int, rows: int, columns: int) -> None:
    indices = torch.randint(0, rows, (sequences, positions))
    right = draw(sequences, positions, columns)
    expected = literal_gram(torch.nn.functional.one_hot(indices, rows).double(), right)
    torch.testing.assert_close(gram.dense(indices, right, rows), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.ghost(indices, right), expected, rtol=1e-12, atol=1e-12)


def test_ghost_between_crosses_indices_and_vectors() -> None:
    """A tied embedding needs the inner products of a look-up's gradients with a matrix product's."""
    indices, look_up, left, right = torch.randint(0, 7, (3, 4)), draw(3, 4, 5), draw(2, 6, 7), draw(2, 6, 5)
    g = gram.per_sequence_gradients(indices, look_up, 7)
    h = gram.per_sequence_gradients(left, right)
    expected = torch.einsum("soi,roi->sr", g, h)
    torch.testing.assert_close(gram.ghost_between(indices, look_up, left, right), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.ghost_between(left, right, indices, look_up), expected.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequences", [gram.MANY_ROWS - 1, gram.MANY_ROWS, gram.MANY_ROWS + 1, gram.MANY_ROWS + 59])
@pytest.mark.parametrize("columns", [3, gram.LONG_ROWS, gram.LONG_ROWS + 1])
def test_many_rows_have_all_their_inner_products(sequences: int, columns: int) -> None:
    """Where a product is made in strips, the last of which may be lower, no entry may be left out or written wrong."""
    rows = draw(sequences, columns)
    expected = torch.stack([(rows * row).sum(dim=1) for row in rows])
    torch.testing.assert_close(gram.inner_products(rows), expected, rtol=1e-12, atol=1e-12)
    in_single = gram.inner_products(rows.float())
    torch.testing.assert_close(in_single.double(), expected, rtol=1e-5, atol=1e-4 * columns**0.5)


def test_ghost_is_the_same_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = draw(7, 3, 4), draw(7, 3, 5)
    whole = gram.ghost(left, right)
    monkeypatch.setattr(gram, "GHOST_BLOCK", 2 * 3 * 7 * 3)  # two sequences a block, and a last one of one
    torch.testing.assert_close(gram.ghost(left, right), whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("indexed", [False, True])
def test_the_sketch_is_unbiased(indexed: bool) -> None:
    """Mean of 4,000 sketches against K, in units of its own standard error: within 5 everywhere."""
    rows, columns, k = 9, 8, 3
    left = torch.randint(0, rows, (4, 5)) if indexed else draw(4, 5, rows)
    right = draw(4, 5, columns)
    exact = gram.dense(left, right, rows)
    generator = torch.Generator().manual_seed(1)
    sketches = torch.stack(
        [gram.sketched(left, right, gram.draw_sketch(k, rows, columns, right, generator)) for _ in range(4000)]
    )
    standard_error = sketches.std(dim=0) / 4000**0.5
    assert ((sketches.mean(dim=0) - exact).abs() < 5 * standard_error).all()
    # ... and the estimate is a real estimate: a single sketch is off by much more than rounding.
    assert (sketches[0] - exact).norm() > 0.05 * exact.norm()


def test_the_error_of_the_sketch_falls_with_its_size() -> None:
    left, right = draw(6, 3, 64), draw(6, 3, 64)
    exact = gram.dense(left, right)
    generator = torch.Generator().manual_seed(2)

    def error(k: int) -> float:
        draws = [gram.sketched(left, right, gram.draw_sketch(k, 64, 64, right, generator)) for _ in range(40)]
        return float(torch.stack([(draw - exact).norm() for draw in draws]).mean() / exact.norm())

    errors = {k: error(k) for k in (4, 16, 63)}
    # Each projection contributes a relative variance ~1/k, so from k=4 to k=16 the error halves at least.
    assert errors[16] < 0.6 * errors[4]
    assert errors[63] < 0.6 * errors[16]


def test_a_side_that_is_short_is_not_projected() -> None:
    sketch = gram.draw_sketch(32, 16, 100, draw(1))
    assert sketch.left is None
    assert sketch.right is not None
    assert sketch.right.shape == (32, 100)


def test_cheaper_counts_multiplications() -> None:
    """One position and a wide layer: ghost. Long sequences: dense. The rule is the smaller of the two formulas."""
    assert gram.cheaper(64, 1, 256, 256) == "ghost"
    assert gram.cheaper(8, 256, 256, 256) == "dense"
    assert gram.dense_cost(3, 5, 7, 11) == (9 + 3) * 77
    assert gram.ghost_cost(3, 5, 7, 11) == 9 * 25 * 18


def test_half_precision_is_accumulated_in_single() -> None:
    left, right = torch.randn(3, 50, 8).bfloat16(), torch.randn(3, 50, 8).bfloat16()
    assert gram.dense(left, right).dtype == torch.float32
    assert gram.ghost(left, right).dtype == torch.float32


class TestOwnProducts:
    """The diagonal of a Gram matrix, without the rest of it."""

    def factors(self, indexed: bool, positions: int) -> tuple[Tensor, Tensor]:
        left = torch.randint(0, 4, (5, positions)) if indexed else draw(5, positions, 4)
        return left, draw(5, positions, 3)

    @pytest.mark.parametrize("one", [False, True])
    @pytest.mark.parametrize("other", [False, True])
    @pytest.mark.parametrize("positions", [(1, 1), (2, 2), (2, 6)])
    def test_are_the_diagonal(self, one: bool, other: bool, positions: tuple[int, int]) -> None:
        g, h = self.factors(one, positions[0]), self.factors(other, positions[1])
        written_out = torch.einsum("soi,soi->s", gram.per_sequence_gradients(*g, 4), gram.per_sequence_gradients(*h, 4))
        found = gram.own_products(*g, *h)
        torch.testing.assert_close(found, written_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, gram.ghost_between(*g, *h).diagonal(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("block", [1, 2 * 2 * 6, 4 * 2 * 6])
    def test_are_the_same_in_small_blocks(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        """One sequence a block, two, four; the five make a last block of one in each."""
        g, h = self.factors(True, 2), self.factors(False, 6)
        whole, sizes_seen, matmul = gram.own_products(*g, *h), [], torch.Tensor.__matmul__
        monkeypatch.setattr(gram, "GHOST_BLOCK", block)

        def counted(self: Tensor, other: Tensor) -> Tensor:
            sizes_seen.append(len(self))
            return matmul(self, other)

        monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
        torch.testing.assert_close(gram.own_products(*g, *h), whole, rtol=1e-14, atol=1e-14)
        assert sizes_seen == {1: [1] * 5, 24: [2, 2, 1], 48: [4, 1]}[block]

    @pytest.mark.parametrize("indexed", [False, True])
    def test_half_precision_is_accumulated_in_single(self, indexed: bool) -> None:
        left = torch.randint(0, 4, (3, 50)) if indexed else torch.randn(3, 50, 8).bfloat16()
        right = torch.randn(3, 50, 8).bfloat16()
        for factors in ((left, right, left, right), (left, right, left.flip(1), right.flip(1))):
            found = gram.own_products(*factors)
            assert found.dtype == torch.float32
            precise = [factor.double() if factor.is_floating_point() else factor for factor in factors]
            torch.testing.assert_close(found.double(), gram.own_products(*precise), rtol=1e-5, atol=1e-4)

    def test_norms_of_a_weight_that_is_used_several_times(self) -> None:
        """As an embedding twice and as a head twice, of different lengths: G_s is the sum, and so has cross terms."""
        weight = MatrixGradients(4, 3)
        for indexed, positions in ((True, 2), (False, 3), (True, 1), (False, 2)):
            weight.add_use(*self.factors(indexed, positions))
        uses = zip(weight.lefts, weight.rights, strict=True)
        total = torch.stack([gram.per_sequence_gradients(left, right, 4) for left, right in uses]).sum(dim=0)
        torch.testing.assert_close(weight.squared_norms(), total.square().sum(dim=(1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"left: expected shape \(S=2 T=3 o\), got \(2, 4, 5\)"):
        gram.dense(draw(2, 4, 5), draw(2, 3, 5))
    with pytest.raises(ValueError, match=r"right: expected at least one entry"):
        gram.ghost(draw(0, 3, 5), draw(0, 3, 5))
    with pytest.raises(TypeError, match=r"right: expected a floating-point tensor, got torch.int64"):
        gram.ghost(draw(2, 3, 5), torch.zeros(2, 3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rows: expected the number of rows"):
        gram.dense(torch.zeros(2, 3, dtype=torch.int64), draw(2, 3, 5))
    with pytest.raises(ValueError, match=r"size: expected a finite number >= 1, got 0"):
        gram.draw_sketch(0, 3, 3, draw(1))


@pytest.mark.parametrize(
    ("size", "tolerance"), [(2**20, 1e-7), (2**20 + 2**12 - 1, 1e-7), (2**13, 1e-6), (2**13 - 1, 1e-6)]
)
def test_long_sums_in_single_precision(size: int, tolerance: float) -> None:
    """A matrix product adds a million numbers up one after another: 6e-5 off, and 8e-3 for a layer of 28 million."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, size, generator=generator) + 0.3 * torch.randn(size, generator=generator)
    exact = gradients.double() @ gradients.double().T
    found = gram.inner_products(gradients)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < tolerance * exact.norm()
    assert (gram.inner_products(gradients.bfloat16()) - exact).norm() < 1e-2 * exact.norm()
    torch.testing.assert_close(gram.inner_products(gradients.double()), exact, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("size", [7, 2 * gram.SUMMED_AT_ONCE + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_those_on_the_diagonal(dtype: torch.dtype, size: int) -> None:
    gradients = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks, whole = gram.block_products(gradients, 3), gram.inner_products(gradients)
    assert blocks.dtype == whole.dtype
    for block, place in zip(blocks, torch.arange(6).split(2), strict=True):
        torch.testing.assert_close(block, whole[place][:, place], rtol=1e-5, atol=1e-5 * size**0.5)
