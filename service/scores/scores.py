"""The scores of CounterFact and zsRE, as pure functions (methods E.1, E.2).

ES and PS: share of prompts on which the new object is strictly more probable than the true one. NS: share of
neighbourhood prompts on which it is strictly less probable. Ties are failures in all three. EM, PM, NM: the mean difference of
the two probabilities, signed so that more is better. S: the harmonic mean of ES, PS and NS. Log-probabilities are means over
the object's tokens. Accuracy: share of an object's tokens that are the most probable ones, those before them given.
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
    """ES or PS of one record; None without prompts."""
    return sum(new > true for new, true in pairs) / len(pairs) if pairs else None


def share_preferring_true(pairs: Sequence[LogProbPair]) -> float | None:
    """NS of one record; None without prompts."""
    return sum(true > new for new, true in pairs) / len(pairs) if pairs else None


def probability_margin(pairs: Sequence[LogProbPair]) -> float | None:
    """EM or PM of one record, mean of p(new) - p(true), and minus NM; None without prompts."""
    return sum(math.exp(new) - math.exp(true) for new, true in pairs) / len(pairs) if pairs else None


def token_accuracy(tokens: Sequence[tuple[int, int]]) -> float | None:
    """Of (right, all) tokens of some objects: the share over (prompt, token) pairs, as zsRE counts; None without prompts."""
    return sum(right for right, _ in tokens) / sum(n for _, n in tokens) if tokens else None


def harmonic_mean(values: Sequence[float]) -> float:
    """S; 0 when any value is 0."""
    if min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / v for v in values)


def bootstrap_counts(n: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0) -> NDArray[np.float64]:
    """(rounds, n): how often each of n records occurs in a draw of as many, with replacement."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), rounds)
    return counts.astype(np.float64)


class BootstrapResampler:
    """Bootstraps over n records that share their draws: each round draws n of them again."""

    def __init__(self, n: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0) -> None:
        self._counts = bootstrap_counts(n, rounds, seed)

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean of each round over the records that have a value; NaN where none of those drawn has."""
        has_value = ~np.isnan(values)
        total, number = self._counts @ np.where(has_value, values, 0.0), self._counts @ has_value
        return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)

    def interval(self, values: Sequence[float | None], level: float = CONFIDENCE_LEVEL) -> Interval | None:
        """The mean over the records that have a value, and its percentile interval; None when none has."""
        column = np.asarray(values, dtype=np.float64)
        if np.isnan(column).all():
            return None
        low, high = _percentile_bounds(self.means(column), level)
        return float(np.nanmean(column)), low, high

    def combined_interval(
        self, columns: Sequence[Sequence[float | None]], level: float = CONFIDENCE_LEVEL
    ) -> Interval | None:
        """S, the harmonic mean of the columns' means. Records are drawn, then averaged, then combined."""
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


def bootstrap_mean(
    records: Sequence[float], level: float = CONFIDENCE_LEVEL, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> Interval:
    """Mean over records and its percentile confidence interval, resampling records."""
    interval = BootstrapResampler(len(records), rounds, seed).interval(records, level)
    assert interval is not None, "records without a value"
    return interval


def bootstrap_score(
    records: Sequence[tuple[float, float, float]],
    level: float = CONFIDENCE_LEVEL,
    rounds: int = BOOTSTRAP_ROUNDS,
    seed: int = 0,
) -> Interval:
    """S over (ES, PS, NS) records, with its confidence interval."""
    interval = BootstrapResampler(len(records), rounds, seed).combined_interval(
        list(zip(*records, strict=True)), level
    )
    assert interval is not None, "records without a value"
    return interval
