"""ES, PS, NS and S of the CounterFact benchmark, as pure functions of log-probabilities (methods E.1).

ES and PS: share of prompts on which the new object is strictly more probable than the true one. NS: share of
neighbourhood prompts on which it is strictly less probable. Ties are failures in all three. S: their harmonic mean.
Log-probabilities are means over the object's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Pair = tuple[float, float]  # log p of the new object, log p of the true one


def share_new(pairs: Sequence[Pair]) -> float | None:
    """ES or PS of one record; None without prompts."""
    return sum(new > true for new, true in pairs) / len(pairs) if pairs else None


def share_kept(pairs: Sequence[Pair]) -> float | None:
    """NS of one record; None without prompts."""
    return sum(true > new for new, true in pairs) / len(pairs) if pairs else None


def harmonic_mean(values: Sequence[float]) -> float:
    """S; 0 when any value is 0."""
    if min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / v for v in values)


def bootstrap(
    records: Sequence[float], level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over records and its percentile confidence interval, resampling records."""
    values = np.asarray(records, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def bootstrap_score(
    records: Sequence[tuple[float, float, float]], level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """S over (ES, PS, NS) records, with its confidence interval: records are resampled, then averaged, then combined."""
    values = np.asarray(records, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    scores = [harmonic_mean(row) for row in means.tolist()]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return harmonic_mean(values.mean(0).tolist()), float(low), float(high)
