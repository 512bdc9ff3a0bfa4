"""Does the tracing effect say anything about an edit's success that its layer does not? (Hase et al. 2023, Section 5; methods F.4)

scores and effects (facts, layers): of every fact the success of its edit at every layer, and its tracing effect there. Three
least-squares models of all scores, each with its share of explained variance:

    layer     a mean for each layer                     score = a_l
    effect    one line through all                      score = a + b effect
    both      a line for each layer                     score = a_l + b_l effect

The gain R2(both) - R2(layer) is never negative, and noise alone makes it greater than nothing. So it is held against what it
is when the facts exchange their effects (whole rows, so that repeated measures of a fact stay together); intervals draw whole
facts again. The plain F test, which takes every row for a new fact, is told beside them because the paper tells it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import Array, percentile_interval

REGRESSION_MODELS = ("layer", "effect", "both")
PERMUTATION_ROUNDS = 1000


def least_squares(x: Array, y: Array) -> tuple[float, int]:
    """Residual sum of squares of y (n,) on the columns of x (n, p), and how many of these are independent."""
    solution, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    return float(((y - x @ solution) ** 2).sum()), int(rank)


def design_matrices(effects: Array) -> dict[str, Array]:
    """The columns of each model, a row for each fact and layer."""
    facts, layers = effects.shape
    layer = np.tile(np.eye(layers), (facts, 1))
    effect = effects.reshape(-1, 1)
    return {
        "layer": layer,
        "effect": np.hstack([np.ones_like(effect), effect]),
        "both": np.hstack([layer, layer * effect]),
    }


def compare_regressions(
    scores: Array, effects: Array, rounds: int = PERMUTATION_ROUNDS, seed: int = 0
) -> dict[str, Any] | None:
    """R2 of each model, the gain, their intervals, and what chance makes of the gain. None where no score differs."""
    y = scores.reshape(-1)
    total = float(((y - y.mean()) ** 2).sum())
    if total <= 1e-12 * len(y):
        return None
    fits = {name: least_squares(x, y) for name, x in design_matrices(effects).items()}
    point = {name: 1 - fits[name][0] / total for name in REGRESSION_MODELS}
    resampled = resampled_r2(bootstrap_counts(len(scores), rounds, seed), scores, effects)
    r2_values = {
        name: _value_with_interval(point[name], resampled[name], len(scores)) for name in REGRESSION_MODELS
    }
    gain = point["both"] - point["layer"]
    permuted_gains = permutation_gains(scores, effects, rounds, seed)
    f, p = f_test(*fits["layer"], *fits["both"], len(y))
    return {
        "facts": scores.shape[0],
        "layers": scores.shape[1],
        "r2": r2_values,
        "gain": _value_with_interval(gain, resampled["both"] - resampled["layer"], len(scores))
        | {
            "chance": float(permuted_gains.mean()),
            "p": float((1 + (permuted_gains >= gain - 1e-12).sum()) / (1 + rounds)),
        },
        "f_test": {"f": f, "p": p},
    }


def _value_with_interval(value: float, resampled: Array, facts: int) -> dict[str, float | None]:
    low, high = percentile_interval(resampled) if facts > 1 else (None, None)
    return {"value": value} | {
        k: None if x is None else float(x) for k, x in {"low": low, "high": high}.items()
    }


def resampled_r2(resample_counts: Array, scores: Array, effects: Array) -> dict[str, Array]:
    """R2 (rounds,) of each model on each draw of facts, from sums: that of `both` is a line within each layer."""
    n = resample_counts.sum(1, keepdims=True)
    y, x, yy, xx, xy = (
        resample_counts @ part for part in (scores, effects, scores**2, effects**2, effects * scores)
    )
    total, explained = _sums_of_squares(
        n * scores.shape[1], *(s.sum(1, keepdims=True) for s in (y, x, yy, xx, xy))
    )
    within, slopes = _sums_of_squares(n, y, x, yy, xx, xy)
    with np.errstate(invalid="ignore", divide="ignore"):
        inverse_total = np.where(total[:, 0] > 0, 1 / total[:, 0], np.nan)
    return {
        "layer": 1 - within.sum(1) * inverse_total,
        "effect": explained[:, 0] * inverse_total,
        "both": 1 - (within - slopes).sum(1) * inverse_total,
    }


def _sums_of_squares(n: Array, y: Array, x: Array, yy: Array, xx: Array, xy: Array) -> tuple[Array, Array]:
    """Of sums over n pairs: the squares of y about its mean, and how much of them a line in x explains."""
    of_y, of_x, shared = yy - y * y / n, xx - x * x / n, xy - x * y / n
    level = of_x > 1e-9 * np.maximum(
        xx, 1e-12
    )  # else x is the same everywhere, and no line explains anything
    return of_y, np.divide(shared**2, of_x, out=np.zeros_like(of_y), where=level)


def permutation_gains(
    scores: Array, effects: Array, rounds: int = PERMUTATION_ROUNDS, seed: int = 0
) -> Array:
    """The gain (rounds,) when facts exchange their rows of effects at random."""
    rng, unit_counts = np.random.default_rng(seed), np.ones((1, len(scores)))
    gains = np.empty(rounds)
    for i in range(rounds):
        r2 = resampled_r2(unit_counts, scores, effects[rng.permutation(len(effects))])
        gains[i] = r2["both"][0] - r2["layer"][0]
    return gains


def f_test(
    small_rss: float, small_rank: int, large_rss: float, large_rank: int, n: int
) -> tuple[float | None, float | None]:
    """F and its p: whether the richer of two nested models explains more. small, large: their squares left; few, many: their
    ranks. None where there is nothing to test."""
    extra_rank, residual_df = large_rank - small_rank, n - large_rank
    if extra_rank < 1 or residual_df < 1 or large_rss <= 0:
        return None, None
    f = max(0.0, (small_rss - large_rss) / extra_rank) / (large_rss / residual_df)
    return f, f_survival(f, extra_rank, residual_df)


def f_survival(f: float, a: float, b: float) -> float:
    """P(F > f) with a and b degrees of freedom: the regularised incomplete beta function at b / (b + a f)."""
    return incomplete_beta(b / (b + a * f), b / 2, a / 2)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8), on the side where that converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    scale = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return scale / (a * _continued_fraction(x, a, b))


def _continued_fraction(x: float, a: float, b: float, terms: int = 400) -> float:
    """1 + d1/(1 + d2/(1 + ...)), from its last term up."""
    value = 1.0
    for i in range(terms, 0, -1):
        m, odd = divmod(i, 2)
        if odd:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + d / value
    return value
