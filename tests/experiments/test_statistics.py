"""Intervals over seeds: closed forms where there are any, coverage where there are not, and brute force over pairs."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from isopo_mini.experiments.statistics import (
    bootstrap_interval,
    interquartile_mean,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    t_interval,
)


class TestTInterval:
    @pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
    @pytest.mark.parametrize("runs", [2, 5, 10])
    def test_is_that_of_students_test(self, runs: int, confidence: float) -> None:
        values = np.random.default_rng(runs).normal(2.0, 3.0, size=runs)
        low, middle, high = t_interval(values, confidence=confidence)
        expected = ttest_1samp(values, 0.0).confidence_interval(confidence)
        assert [low, high] == pytest.approx([expected.low, expected.high], rel=1e-12)
        assert middle == pytest.approx(values.mean(), rel=1e-15)

    @pytest.mark.parametrize("runs", [3, 5, 10])
    def test_covers_what_it_says(self, runs: int) -> None:
        """The reason for it: the percentile bootstrap covers 84 % at n = 5, as the test below measures."""
        draws = np.random.default_rng(4).normal(size=(runs, 20_000))
        low, _, high = t_interval(draws)
        covered = np.mean((low < 0) & (high > 0))
        assert covered == pytest.approx(0.95, abs=0.006)  # four standard errors of 20,000 trials

    def test_is_wider_than_the_bootstrap_where_runs_are_few(self) -> None:
        draws = np.random.default_rng(5).normal(size=(5, 200))
        one, other = t_interval(draws), bootstrap_interval(draws, resamples=500)
        ratio = (one.high - one.low).mean() / (other.high - other.low).mean()
        # t·s/√n against about 1.96·s√((n−1)/n)/√n: 2.78/(1.96·.894) = 1.58.
        assert ratio == pytest.approx(1.58, abs=0.08)

    def test_curves_along_any_axis_and_equal_runs(self) -> None:
        curves = np.random.default_rng(1).normal(size=(6, 4))
        intervals = np.array(t_interval(curves))
        assert intervals.shape == (3, 4)
        assert np.array_equal(intervals, np.array(t_interval(curves.T, axis=1)))
        assert intervals[:, 2] == pytest.approx(np.array(t_interval(curves[:, 2])), rel=1e-13)
        low, middle, high = t_interval(np.full((7, 3), 0.1))
        assert np.abs(high - low).max() < 1e-15
        assert middle == pytest.approx(0.1, rel=1e-15)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="values: expected at least 2 runs along axis 0, got 1"):
            t_interval([3.0])
        with pytest.raises(ValueError, match="values: expected finite numbers, got inf"):
            t_interval([3.0, math.inf])
        for confidence in (0.0, 1.0, 95.0):
            with pytest.raises(ValueError, match=f"confidence: expected a number between 0 and 1, got {confidence}"):
                t_interval([3.0, 4.0], confidence=confidence)


class TestPairedDifference:
    def test_is_that_of_the_paired_test(self) -> None:
        random = np.random.default_rng(6)
        one, other = random.normal(size=8), random.normal(size=8)
        low, middle, high = paired_difference(one, other, confidence=0.9)
        expected = ttest_rel(one, other).confidence_interval(0.9)
        assert [low, high] == pytest.approx([expected.low, expected.high], rel=1e-12)
        assert middle == pytest.approx(one.mean() - other.mean(), rel=1e-12)

    def test_what_a_seed_does_to_both_is_not_in_it(self) -> None:
        """Two methods .1 apart on seeds that are 10 apart: certain in pairs, hopeless from two intervals."""
        seeds = 10 * np.arange(5.0)
        noise = np.array([0.01, -0.01, 0.0, 0.01, -0.01])
        low, middle, high = paired_difference(seeds + 0.1 + noise, seeds)
        assert middle == pytest.approx(0.1)
        assert 0.08 < low < high < 0.12
        assert t_interval(seeds + 0.1 + noise).low < t_interval(seeds).middle - 15

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"other: expected one number for each of \(3,\) runs, got \(2,\)"):
            paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
        with pytest.raises(ValueError, match=r"other: expected one number for each of \(1, 2\) runs, got \(1, 2\)"):
            paired_difference([[1.0, 2.0]], [[1.0, 2.0]])
        with pytest.raises(ValueError, match="values: expected at least 2 runs along axis 0, got 1"):
            paired_difference([1.0], [2.0])


class TestProbabilityOfImprovement:
    @pytest.mark.parametrize(("ones", "others"), [(1, 1), (3, 5), (10, 10)])
    def test_is_the_share_of_pairs_with_ties_for_a_half(self, ones: int, others: int) -> None:
        random = np.random.default_rng(ones)
        for levels in (1, 2, 4, 1000):  # of one level all are equal
            one, other = random.integers(levels, size=ones) / 7, random.integers(levels, size=others) / 7
            pairs = [(x > y) + 0.5 * (x == y) for x, y in itertools.product(one, other)]
            assert probability_of_improvement(one, other) == pytest.approx(np.mean(pairs), rel=1e-12)
            assert probability_of_improvement(one, other) + probability_of_improvement(other, one) == pytest.approx(1)

    def test_by_hand(self) -> None:
        assert probability_of_improvement([2.0, 3.0], [0.0, 1.0]) == 1.0
        assert probability_of_improvement([0.0, 1.0], [2.0, 3.0]) == 0.0
        assert probability_of_improvement([1.0, 3.0], [1.0, 2.0]) == (0.5 + 0.0 + 1.0 + 1.0) / 4

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="values: expected at least 1 runs along axis 0, got 0"):
            probability_of_improvement([], [1.0])
        with pytest.raises(ValueError, match="values: expected finite numbers, got nan"):
            probability_of_improvement([1.0], [math.nan])


class TestInterquartileMean:
    def test_by_hand(self) -> None:
        ten = [9.0, 100.0, 1.0, 2.0, 3.0, 4.0, -50.0, 5.0, 8.0, 6.0]
        assert interquartile_mean(ten) == (2 + 3 + 4 + 5 + 6 + 8) / 6  # two at each end: −50, 1 and 9, 100
        assert interquartile_mean(list(range(8))) == (2 + 3 + 4 + 5) / 4
        assert interquartile_mean([1.0, 2.0, 6.0]) == 3.0  # a quarter of three runs is none
        assert interquartile_mean([1.0, 2.0, 4.0, 100.0]) == 3.0
        assert interquartile_mean([5.0]) == 5.0

    def test_one_run_that_broke_down_does_not_move_it(self) -> None:
        runs = np.random.default_rng(2).normal(size=10)
        broken = runs.copy()
        broken[runs.argmin()] = -1e6
        assert interquartile_mean(broken) == interquartile_mean(runs)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="values: expected at least 1 runs along axis 0, got 0"):
            interquartile_mean([])
        with pytest.raises(ValueError, match="values: expected finite numbers, got nan"):
            interquartile_mean([1.0, math.nan])


class TestPerformanceProfile:
    def test_by_hand(self) -> None:
        """Above, and not at: of 1, 2, 2, 4 half are above 1.5 and one is above 2."""
        profile = performance_profile([2.0, 1.0, 4.0, 2.0], [0.0, 1.0, 1.5, 2.0, 4.0])
        assert profile.tolist() == [1.0, 0.75, 0.75, 0.25, 0.0]

    def test_its_area_is_the_mean(self) -> None:
        """∫ P(X > τ) dτ over [0, 1] of scores in [0, 1]."""
        runs = np.random.default_rng(3).uniform(size=10)
        thresholds = (np.arange(10_000) + 0.5) / 10_000
        profile = performance_profile(runs, thresholds)
        assert (np.diff(profile) <= 0).all()
        assert profile.mean() == pytest.approx(runs.mean(), abs=1e-4)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="values: expected at least 1 runs along axis 0, got 0"):
            performance_profile([], [0.5])
        with pytest.raises(ValueError, match="values: expected finite numbers, got nan"):
            performance_profile([math.nan], [0.5])


def test_two_runs_by_enumeration() -> None:
    """Two runs 0 and 1 have resampled means 0, ½, 1 with chances ¼, ½, ¼, so the 95 % interval is everything."""
    low, middle, high = bootstrap_interval([0.0, 1.0])
    assert (low, middle, high) == (0.0, 0.5, 1.0)
    # 40 % in the middle lies within the half that has mean ½.
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5, 0.5)


def test_against_every_resample_of_four_runs() -> None:
    runs = np.array([0.3, -1.2, 2.0, 0.9])
    means = [np.mean(draw) for draw in itertools.product(runs, repeat=4)]
    expected = np.quantile(means, [0.1, 0.9])
    low, middle, high = bootstrap_interval(runs, confidence=0.8, resamples=20_000)
    assert middle == pytest.approx(runs.mean(), rel=1e-12)
    # Neighbouring means of the 256 resamples lie less than .1 apart around these quantiles.
    assert [low, high] == pytest.approx(expected, abs=0.1)


def test_large_samples_approach_the_normal_interval() -> None:
    runs = np.random.default_rng(0).normal(size=400)
    low, middle, high = bootstrap_interval(runs, resamples=20_000)
    half_width = 1.96 * runs.std() / math.sqrt(400)
    assert [low, high] == pytest.approx([middle - half_width, middle + half_width], abs=0.05 * half_width)


@pytest.mark.parametrize(("runs", "stated"), [(10, 0.91), (5, 0.84)])
def test_coverage_is_what_the_docstring_says(runs: int, stated: float) -> None:
    draws = np.random.default_rng(3).normal(size=(runs, 1500))
    low, _, high = bootstrap_interval(draws, resamples=1000)
    covered = np.mean((low < 0) & (high > 0))
    assert covered == pytest.approx(stated, abs=0.03)  # three standard errors of 1,500 trials


def test_identical_runs_have_width_zero() -> None:
    values = np.full((7, 3), 0.1)  # not a binary fraction: its mean is rounded
    low, middle, high = bootstrap_interval(values)
    assert np.abs(high - low).max() < 1e-15
    assert ((low <= middle) & (middle <= high)).all()
    assert middle == pytest.approx(0.1, rel=1e-15)


def test_curves_are_resampled_whole_along_any_axis() -> None:
    curves = np.random.default_rng(1).normal(size=(6, 4))
    intervals = np.array(bootstrap_interval(curves))
    assert np.array_equal(intervals, np.array(bootstrap_interval(curves.T, axis=1)))
    # The same resample of runs at every point: a shifted copy of a curve has the shifted interval.
    pair = np.array(bootstrap_interval(np.stack([curves[:, 0], curves[:, 0] + 5], axis=1)))
    assert pair[:, 1] == pytest.approx(pair[:, 0] + 5, rel=1e-12)
    assert np.array_equal(intervals, np.array(bootstrap_interval(curves)))  # the same seed, the same figure


def test_errors() -> None:
    with pytest.raises(ValueError, match="values: expected at least 2 runs along axis 0, got 1"):
        bootstrap_interval([3.0])
    with pytest.raises(ValueError, match="values: expected finite numbers, got nan"):
        bootstrap_interval([3.0, math.nan])
    with pytest.raises(ValueError, match="confidence: expected a number between 0 and 1, got 95"):
        bootstrap_interval([3.0, 4.0], confidence=95.0)
