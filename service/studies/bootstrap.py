"""Cluster bootstrap: intervals that resample whole prompts with all their measurements (Efron and Tibshirani 1993,
ch. 8).

Tokens of one prompt, or layers of one fact, are not independent. A resample is a row of counts of clusters
(`bootstrap_counts`), so that every statistic is a product with it, and statistics of one resample are paired.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.scores.scores import CONFIDENCE_LEVEL

Array = NDArray[np.float64]


def pooled_means(resample_counts: Array, sums: Array, counts: Array) -> Array:
    """Return (rounds, ...): the mean over all measurements of each resample, NaN if it has none.

    sums (clusters, ...) and counts (clusters,) are the sum and the number of the measurements of each cluster.
    """
    number = (resample_counts @ counts).reshape(-1, *(1,) * (sums.ndim - 1))
    total = np.tensordot(resample_counts, sums, 1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def percentile_interval(resampled: Array, level: float = CONFIDENCE_LEVEL) -> tuple[Array, Array]:
    """Return lower and upper bounds of the percentile interval over resamples (rounds, ...)."""
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def mean_with_interval(values: Any, resample_counts: Array) -> dict[str, Any]:
    """Return `mean`, `low`, `high` and `n` of one measurement, or one row of measurements, per cluster.

    The interval of a single cluster is None.
    """
    rows = np.asarray(values, dtype=np.float64)
    return cluster_mean_with_interval(rows, np.ones(len(rows)), resample_counts)


def cluster_mean_with_interval(sums: Array, counts: Array, resample_counts: Array) -> dict[str, Any]:
    """Return the mean over all measurements of the clusters, its interval, and `n`, the number of clusters with
    measurements.
    """
    n = int((counts > 0).sum())
    mean = sums.sum(0) / counts.sum() if n else None
    low, high = percentile_interval(pooled_means(resample_counts, sums, counts)) if n > 1 else (None, None)
    ends = {"mean": mean, "low": low, "high": high}
    return {k: None if x is None else np.asarray(x).tolist() for k, x in ends.items()} | {"n": n}
