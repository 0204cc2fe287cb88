"""Intervals over seeds: a number without one is an anecdote."""

from typing import NamedTuple

import numpy as np
import scipy  # its parts load themselves when they are used: they take half a second
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, each of the shape of one run."""

    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def t_interval(values: ArrayLike, axis: int = 0, *, confidence: float = 0.95) -> Interval:
    """Mean over `axis` with Student's interval: mean ± t·s/√n.

    Of few Gaussian runs it holds the truth as often as it says, where a percentile bootstrap of ten runs for "95 %"
    does so 91 % of the time, and of five 84 %.

    Args:
        values: one number a run, or one array (a learning curve) a run.
        axis: the axis of the runs; at least two.
        confidence: share of such intervals that hold the truth.

    Returns:
        `(low, middle, high)`, each `values` without `axis`. Identical runs give an interval of width zero.

    Raises:
        ValueError: there are fewer than two runs, a value is not finite, or `confidence` is not in (0, 1).

    Source: Student, *The probable error of a mean*, Biometrika 6 (1908).
    """
    array = _runs_last(values, axis, confidence)
    count = array.shape[-1]
    middle = array.mean(axis=-1)
    half = scipy.stats.t.ppf((1 + confidence) / 2, count - 1) * array.std(axis=-1, ddof=1) / np.sqrt(count)
    return Interval(middle - half, middle, middle + half)


def paired_difference(one: ArrayLike, other: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean of one − other with its t interval, where both are runs of the same seeds in the same order.

    What a seed does to both, such as its prompts, is not a part of the interval.

    Raises:
        ValueError: the two are not as many, or see `t_interval`.
    """
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(f"other: expected one number for each of {one.shape} runs, got {other.shape}")
    return t_interval(one - other, confidence=confidence)


def probability_of_improvement(one: ArrayLike, other: ArrayLike) -> float:
    """P(X > Y) + ½ P(X = Y) for a run X of the one and a run Y of the other: the Mann–Whitney U over all pairs.

    Raises:
        ValueError: one of them has no run, or a value is not finite.

    Source: Agarwal et al., *Deep reinforcement learning at the edge of the statistical precipice*, arXiv 2108.13264.
    """
    one, other = _runs_last(one, 0, least=1), _runs_last(other, 0, least=1)
    return float(scipy.stats.mannwhitneyu(one, other, method="asymptotic").statistic / (one.size * other.size))


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of the runs: neither one lucky seed nor one that broke down moves it.

    A quarter, rounded down to whole runs, is left out at each end.

    Raises:
        ValueError: there is no run, or a value is not finite.

    Source: as `probability_of_improvement`.
    """
    return float(scipy.stats.trim_mean(_runs_last(values, 0, least=1), 0.25))


def performance_profile(values: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """The share of runs above each threshold.

    Raises:
        ValueError: there is no run, or a value is not finite.

    Source: as `probability_of_improvement`.
    """
    runs = _runs_last(values, 0, least=1)
    return (runs[None, :] > np.asarray(thresholds, dtype=np.float64)[:, None]).mean(axis=1)


def bootstrap_interval(
    values: ArrayLike, axis: int = 0, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over `axis` with its percentile bootstrap interval.

    The runs are resampled with replacement `resamples` times; the interval holds the middle share `confidence` of
    the means. Whole runs are resampled, so the points of a curve stay together. With few runs it is somewhat too
    narrow: at ten Gaussian runs, a 95 % interval covers the truth about 91 % of the time, at five about 84 %.

    Args:
        values: one number a run, or one array (a learning curve) a run.
        axis: the axis of the runs; at least two.
        confidence: share of resampled means inside the interval.
        resamples: number of resamples.
        seed: of the resampling, so that a figure is the same every time it is built.

    Returns:
        `(low, middle, high)`, each `values` without `axis`. Identical runs give an interval of width zero.

    Raises:
        ValueError: there are fewer than two runs, a value is not finite, or `confidence` is not in (0, 1).
    """
    array = _runs_last(values, axis, confidence)
    middle = array.mean(axis=-1)
    resampled = scipy.stats.bootstrap(
        (array,),
        np.mean,
        axis=-1,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // array.size),  # at most 80 MB of resampled runs at a time
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    # Equal runs have equal means, but rounding moves the last digit: keep the middle inside.
    return Interval(np.minimum(resampled.low, middle), middle, np.maximum(resampled.high, middle))


def _runs_last(values: ArrayLike, axis: int, confidence: float = 0.5, least: int = 2) -> np.ndarray:
    """The values with the axis of the runs at the end, once it is sure that something can be said of them."""
    array = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
    if array.shape[-1] < least:
        raise ValueError(f"values: expected at least {least} runs along axis {axis}, got {array.shape[-1]}")
    if not np.isfinite(array).all():
        raise ValueError(f"values: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    return array
