"""Bootstrap intervals: closed forms where there are any, coverage where there are not."""

import itertools
import math

import numpy as np
import pytest

from isopo_mini.training.statistics import bootstrap_interval


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
