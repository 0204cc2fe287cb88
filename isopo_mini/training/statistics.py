"""Intervals over seeds: a number without one is an anecdote."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, each of the shape of one run."""

    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


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
    array = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
    if array.shape[-1] < 2:
        raise ValueError(f"values: expected at least 2 runs along axis {axis}, got {array.shape[-1]}")
    if not np.isfinite(array).all():
        raise ValueError(f"values: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    middle = array.mean(axis=-1)
    resampled = bootstrap(
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
