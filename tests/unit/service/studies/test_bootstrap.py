"""Intervals over clusters: service.studies.bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import (
    cluster_mean_with_interval,
    mean_with_interval,
    percentile_interval,
    pooled_means,
)


def test_counts_sum_to_the_number_of_clusters() -> None:
    """Every row of counts sums to the number of clusters, and a seed gives the same counts again."""
    drawn = bootstrap_counts(7, 50, seed=3)
    assert drawn.shape == (50, 7) and (drawn.sum(1) == 7).all()
    assert (bootstrap_counts(7, 50, seed=3) == drawn).all() and not (
        bootstrap_counts(7, 50, seed=4) == drawn
    ).all()


def test_pooled_means_by_hand() -> None:
    """Clusters with 1, 2 and 0 measurements, resampled (2, 1, 0) and (0, 0, 3): the second resample has no mean."""
    drawn = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    found = pooled_means(drawn, np.array([[4.0], [6.0], [0.0]]), np.array([1.0, 2.0, 0.0]))
    assert found[0, 0] == (2 * 4 + 6) / (2 * 1 + 2)
    assert np.isnan(found[1, 0])


def test_pooled_means_match_resampled_clusters() -> None:
    """Products with counts equal means over the concatenated measurements of the resampled clusters."""
    rng = np.random.default_rng(0)
    clusters = [rng.normal(size=n) for n in (1, 3, 2, 5)]
    drawn = bootstrap_counts(4, 20)
    sums, counts = np.array([[c.sum()] for c in clusters]), np.array([float(len(c)) for c in clusters])
    for row, found in zip(drawn.astype(int), pooled_means(drawn, sums, counts)[:, 0], strict=True):
        every = np.concatenate([c for c, times in zip(clusters, row, strict=True) for _ in range(times)])
        assert found == pytest.approx(every.mean())


def test_repeated_measurements_do_not_narrow_the_interval() -> None:
    """Ten equal measurements in a cluster give the same interval as one, because clusters are resampled."""
    rng = np.random.default_rng(1)
    values, drawn = rng.normal(size=30), bootstrap_counts(30)
    one = mean_with_interval(values, drawn)
    ten = cluster_mean_with_interval(10 * values, np.full(30, 10.0), drawn)
    assert ten["low"] == pytest.approx(one["low"]) and ten["high"] == pytest.approx(one["high"])
    assert one["n"] == ten["n"] == 30
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * values.std() / 30**0.5, rel=0.1)


def test_one_cluster_has_no_interval() -> None:
    """One cluster has a mean and no interval, no measurement has neither."""
    drawn = bootstrap_counts(2, 100)
    alone = cluster_mean_with_interval(np.array([3.0, 0.0]), np.array([2.0, 0.0]), drawn)
    assert alone == {"mean": 1.5, "low": None, "high": None, "n": 1}
    assert cluster_mean_with_interval(np.zeros(2), np.zeros(2), drawn) == {
        "mean": None,
        "low": None,
        "high": None,
        "n": 0,
    }


def test_interval_has_percentile_bounds() -> None:
    """The 90 % interval of 0 .. 100 is 5 to 95."""
    low, high = percentile_interval(np.arange(101.0), 0.9)
    assert (low, high) == pytest.approx((5, 95))
