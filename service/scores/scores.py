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

Pair = tuple[float, float]  # log p of the new object, log p of the true one
Interval = tuple[float, float, float]  #: mean, and the ends of its confidence interval
ROUNDS = 2000
LEVEL = 0.95


def share_new(pairs: Sequence[Pair]) -> float | None:
    """ES or PS of one record; None without prompts."""
    return sum(new > true for new, true in pairs) / len(pairs) if pairs else None


def share_kept(pairs: Sequence[Pair]) -> float | None:
    """NS of one record; None without prompts."""
    return sum(true > new for new, true in pairs) / len(pairs) if pairs else None


def margin(pairs: Sequence[Pair]) -> float | None:
    """EM or PM of one record, mean of p(new) - p(true), and minus NM; None without prompts."""
    return sum(math.exp(new) - math.exp(true) for new, true in pairs) / len(pairs) if pairs else None


def accuracy(tokens: Sequence[tuple[int, int]]) -> float | None:
    """Of (right, all) tokens of some objects: the share over (prompt, token) pairs, as zsRE counts; None without prompts."""
    return sum(right for right, _ in tokens) / sum(n for _, n in tokens) if tokens else None


def harmonic_mean(values: Sequence[float]) -> float:
    """S; 0 when any value is 0."""
    if min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / v for v in values)


def draws(n: int, rounds: int = ROUNDS, seed: int = 0) -> NDArray[np.float64]:
    """(rounds, n): how often each of n records occurs in a draw of as many, with replacement."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), rounds)
    return drawn.astype(np.float64)


class Resampling:
    """Bootstraps over n records that share their draws: each round draws n of them again."""

    def __init__(self, n: int, rounds: int = ROUNDS, seed: int = 0) -> None:
        self._counts = draws(n, rounds, seed)

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean of each round over the records that have a value; NaN where none of those drawn has."""
        known = ~np.isnan(values)
        total, number = self._counts @ np.where(known, values, 0.0), self._counts @ known
        return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)

    def interval(self, values: Sequence[float | None], level: float = LEVEL) -> Interval | None:
        """The mean over the records that have a value, and its percentile interval; None when none has."""
        column = np.asarray(values, dtype=np.float64)
        if np.isnan(column).all():
            return None
        low, high = _ends(self.means(column), level)
        return float(np.nanmean(column)), low, high

    def score(self, columns: Sequence[Sequence[float | None]], level: float = LEVEL) -> Interval | None:
        """S, the harmonic mean of the columns' means. Records are drawn, then averaged, then combined."""
        table = np.asarray(columns, dtype=np.float64)
        if np.isnan(table).all(1).any():
            return None
        rounds = np.stack([self.means(column) for column in table], 1)
        rounds = rounds[~np.isnan(rounds).any(1)]
        low, high = _ends(np.asarray([harmonic_mean(row) for row in rounds.tolist()]), level)
        return harmonic_mean(np.nanmean(table, 1).tolist()), low, high


def _ends(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    records: Sequence[float], level: float = LEVEL, rounds: int = ROUNDS, seed: int = 0
) -> Interval:
    """Mean over records and its percentile confidence interval, resampling records."""
    found = Resampling(len(records), rounds, seed).interval(records, level)
    assert found is not None, "records without a value"
    return found


def bootstrap_score(
    records: Sequence[tuple[float, float, float]], level: float = LEVEL, rounds: int = ROUNDS, seed: int = 0
) -> Interval:
    """S over (ES, PS, NS) records, with its confidence interval."""
    found = Resampling(len(records), rounds, seed).score(list(zip(*records, strict=True)), level)
    assert found is not None, "records without a value"
    return found
