"""Intervals that know what was drawn: whole prompts with all that was measured on them (Efron and Tibshirani 1993, ch. 8).

Tokens of one prompt, or layers of one fact, are no independent measurements. What is drawn again is therefore the cluster;
a draw is a row of counts (`scores.draws`), so that every figure of a draw is a product with it, and two figures of one draw are paired.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.scores.scores import CONFIDENCE_LEVEL

Array = NDArray[np.float64]


def pooled_means(resample_counts: Array, sums: Array, counts: Array) -> Array:
    """(rounds, ...): of each draw the mean over all measurements of its clusters; NaN where it has none.

    sums (clusters, ...), counts (clusters,): what the measurements of a cluster add up to, and how many they are.
    """
    number = (resample_counts @ counts).reshape(-1, *(1,) * (sums.ndim - 1))
    total = np.tensordot(resample_counts, sums, 1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def percentile_interval(resampled: Array, level: float = CONFIDENCE_LEVEL) -> tuple[Array, Array]:
    """The percentile interval over draws (rounds, ...): its lower and its upper ends."""
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def mean_with_interval(values: Any, resample_counts: Array) -> dict[str, Any]:
    """Mean of one measurement (or row of measurements) a cluster, with its interval: `mean`, `low`, `high`, `n`.

    A single cluster has no interval: None.
    """
    rows = np.asarray(values, dtype=np.float64)
    return cluster_mean_with_interval(rows, np.ones(len(rows)), resample_counts)


def cluster_mean_with_interval(sums: Array, counts: Array, resample_counts: Array) -> dict[str, Any]:
    """The mean over all measurements of the clusters, its interval, and `n`: the clusters that have any."""
    n = int((counts > 0).sum())
    mean = sums.sum(0) / counts.sum() if n else None
    low, high = percentile_interval(pooled_means(resample_counts, sums, counts)) if n > 1 else (None, None)
    ends = {"mean": mean, "low": low, "high": high}
    return {k: None if x is None else np.asarray(x).tolist() for k, x in ends.items()} | {"n": n}
