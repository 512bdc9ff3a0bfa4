"""Whether the tracing effect explains an edit's success beyond its layer (Hase et al. 2023, Section 5).

scores and effects are (facts, layers): the success of the edit of every fact at every layer, and the tracing effect
there. Three least-squares models of all scores are fitted, each with its share of explained variance:

    layer     a mean for each layer                     score = a_l
    effect    one line through all                      score = a + b effect
    both      a line for each layer                     score = a_l + b_l effect

The gain R2(both) - R2(layer) is never negative, and noise alone makes it positive. It is therefore compared with its
value after permuting the facts' rows of effects, which keeps repeated measures of a fact together. Intervals resample
whole facts. The F test, which treats every row as an independent fact, is reported as well because the paper reports
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from service.errors import Misconfigured
from service.kit.extras import install_command
from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import Array, percentile_interval

REGRESSION_MODELS = ("layer", "effect", "both")
PERMUTATION_ROUNDS = 1000


def least_squares(x: Array, y: Array) -> tuple[float, int]:
    """Return the residual sum of squares of y (n,) regressed on x (n, p), and the rank of x."""
    solution, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    return float(((y - x @ solution) ** 2).sum()), int(rank)


def design_matrices(effects: Array) -> dict[str, Array]:
    """Return the design matrix of each model, with a row for each fact and layer."""
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
    """Return R2 of each model and the gain with intervals, the permutation test and the F test.

    None if all scores are equal.
    """
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
    """Return R2 (rounds,) of each model on each resample of facts, computed from sums.

    `both` fits a line within each layer.
    """
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
    """Return the sum of squares of y about its mean, and the part that a line in x explains, from sums over n pairs."""
    of_y, of_x, shared = yy - y * y / n, xx - x * x / n, xy - x * y / n
    varies = of_x > 1e-9 * np.maximum(xx, 1e-12)  # a line in a constant x explains nothing
    return of_y, np.divide(shared**2, of_x, out=np.zeros_like(of_y), where=varies)


def permutation_gains(
    scores: Array, effects: Array, rounds: int = PERMUTATION_ROUNDS, seed: int = 0
) -> Array:
    """Return the gain (rounds,) under random permutations of the facts' rows of effects."""
    rng, unit_counts = np.random.default_rng(seed), np.ones((1, len(scores)))
    gains = np.empty(rounds)
    for i in range(rounds):
        r2 = resampled_r2(unit_counts, scores, effects[rng.permutation(len(effects))])
        gains[i] = r2["both"][0] - r2["layer"][0]
    return gains


def f_test(
    small_rss: float, small_rank: int, large_rss: float, large_rank: int, n: int
) -> tuple[float | None, float | None]:
    """Return F and its p value of the hypothesis that the larger of two nested models explains no more than the
    smaller.

    Takes their residual sums of squares and ranks. Returns None if there is no degree of freedom or no residual.
    """
    extra_rank, residual_df = large_rank - small_rank, n - large_rank
    if extra_rank < 1 or residual_df < 1 or large_rss <= 0:
        return None, None
    f = max(0.0, (small_rss - large_rss) / extra_rank) / (large_rss / residual_df)
    return f, float(scipy_stats().f.sf(f, extra_rank, residual_df))


def scipy_stats() -> Any:
    """Return the module `scipy.stats`. Raise Misconfigured if SciPy, an optional dependency, is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise Misconfigured(
            f"the localization study needs SciPy: install it with `{install_command('studies')}`."
        ) from None
    return stats
