"""The scores of CounterFact (Meng et al. 2022) and zsRE (Meng et al. 2023), as pure functions.

ES and PS are the shares of prompts on which the new object is strictly more probable than the true one, NS the share
of neighbourhood prompts on which it is strictly less probable. Ties are failures in all three. EM, PM and NM are mean
differences of the two probabilities, signed so that greater is better. S is the harmonic mean of ES, PS and NS.
Log-probabilities are means over the object's tokens. Accuracy is the share of an object's tokens that are most
probable given the tokens before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LogProbPair = tuple[float, float]  # log p of the new object, log p of the true one
Interval = tuple[float, float, float]  #: mean, and the ends of its confidence interval
BOOTSTRAP_ROUNDS = 2000
CONFIDENCE_LEVEL = 0.95


def share_preferring_new(pairs: Sequence[LogProbPair]) -> float | None:
    """Return ES or PS of one record, None without prompts."""
    return sum(new > true for new, true in pairs) / len(pairs) if pairs else None


def share_preferring_true(pairs: Sequence[LogProbPair]) -> float | None:
    """Return NS of one record, None without prompts."""
    return sum(true > new for new, true in pairs) / len(pairs) if pairs else None


def probability_margin(pairs: Sequence[LogProbPair]) -> float | None:
    """Return the mean of p(new) - p(true): EM, PM or -NM of one record. None without prompts."""
    return sum(math.exp(new) - math.exp(true) for new, true in pairs) / len(pairs) if pairs else None


def token_accuracy(tokens: Sequence[tuple[int, int]]) -> float | None:
    """Return the share of correct tokens over all (prompt, token) pairs, from (correct, all) of each object.

    None without prompts.
    """
    return sum(correct for correct, _ in tokens) / sum(n for _, n in tokens) if tokens else None


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean, 0 if any value is 0 or less."""
    if min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / v for v in values)


def bootstrap_counts(n: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0) -> NDArray[np.float64]:
    """Return (rounds, n): how often each of n records occurs in a resample of n records with replacement."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), rounds)
    return counts.astype(np.float64)


class BootstrapResampler:
    """Bootstrap over n records. All statistics share the same resamples, so that they are paired."""

    def __init__(self, n: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0) -> None:
        self._counts = bootstrap_counts(n, rounds, seed)

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of each round over the records that have a value, NaN if none of the resampled ones has."""
        has_value = ~np.isnan(values)
        total, number = self._counts @ np.where(has_value, values, 0.0), self._counts @ has_value
        return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)

    def interval(self, values: Sequence[float | None], level: float = CONFIDENCE_LEVEL) -> Interval | None:
        """Return the mean over the records that have a value with its percentile interval. None if none has."""
        column = np.asarray(values, dtype=np.float64)
        if np.isnan(column).all():
            return None
        low, high = _percentile_bounds(self.means(column), level)
        return float(np.nanmean(column)), low, high

    def combined_interval(
        self, columns: Sequence[Sequence[float | None]], level: float = CONFIDENCE_LEVEL
    ) -> Interval | None:
        """Return S, the harmonic mean of the columns' means, with its interval.

        Each resample is averaged, then combined.
        """
        table = np.asarray(columns, dtype=np.float64)
        if np.isnan(table).all(1).any():
            return None
        rounds = np.stack([self.means(column) for column in table], 1)
        rounds = rounds[~np.isnan(rounds).any(1)]
        low, high = _percentile_bounds(np.asarray([harmonic_mean(row) for row in rounds.tolist()]), level)
        return harmonic_mean(np.nanmean(table, 1).tolist()), low, high


def _percentile_bounds(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    level: float = CONFIDENCE_LEVEL,
    rounds: int = BOOTSTRAP_ROUNDS,
    seed: int = 0,
) -> Interval:
    """Return the mean of second - first over records that both have, with its percentile interval. The records are
    resampled in pairs, so that what makes a record hard for both does not widen the interval."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return bootstrap_mean(differences, level, rounds, seed)


def bootstrap_mean(
    records: Sequence[float], level: float = CONFIDENCE_LEVEL, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> Interval:
    """Return the mean over records with its percentile interval."""
    interval = BootstrapResampler(len(records), rounds, seed).interval(records, level)
    assert interval is not None, "records without a value"
    return interval


def bootstrap_score(
    records: Sequence[tuple[float, float, float]],
    level: float = CONFIDENCE_LEVEL,
    rounds: int = BOOTSTRAP_ROUNDS,
    seed: int = 0,
) -> Interval:
    """Return S over (ES, PS, NS) records with its percentile interval."""
    interval = BootstrapResampler(len(records), rounds, seed).combined_interval(
        list(zip(*records, strict=True)), level
    )
    assert interval is not None, "records without a value"
    return interval
