"""Regression of edit success on layer and tracing effect: service.studies.regression."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from service.errors import Misconfigured
from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import Array
from service.studies.regression import (
    REGRESSION_MODELS,
    compare_regressions,
    design_matrices,
    f_test,
    least_squares,
    permutation_gains,
    resampled_r2,
)

RNG = np.random.default_rng(0)


def random_scores_and_effects(facts: int = 12, layers: int = 4) -> tuple[Array, Array]:
    """Return scores that depend on the layer, and on the effect with a slope that differs by layer, and the effects."""
    effects = RNG.random((facts, layers))
    slopes = np.linspace(-1, 1, layers)
    return np.arange(layers) / 4 + slopes * effects + 0.3 * RNG.normal(size=effects.shape), effects


def r2(scores: Array, effects: Array) -> dict[str, float]:
    y = scores.reshape(-1)
    total = ((y - y.mean()) ** 2).sum()
    return {name: 1 - least_squares(x, y)[0] / total for name, x in design_matrices(effects).items()}


def test_line_by_hand() -> None:
    """y = 0, 0, 3 on x = 0, 1, 2 gives the line 1.5 x - 0.5, with a residual of 1.5 of a total of 6."""
    x = np.array([[1.0, 0], [1, 1], [1, 2]])
    residual, rank = least_squares(x, np.array([0.0, 0, 3]))
    assert residual == pytest.approx(1.5)
    assert rank == 2
    found = compare_regressions(np.array([[0.0], [0], [3]]), np.array([[0.0], [1], [2]]), rounds=10)
    assert found is not None
    assert found["r2"]["effect"]["value"] == found["r2"]["both"]["value"] == pytest.approx(0.75)
    assert found["r2"]["layer"]["value"] == pytest.approx(0.0)


def test_layer_model_explains_the_variance_between_layers() -> None:
    """R2 of the layer model is the share of the sum of squares between layers."""
    scores, effects = random_scores_and_effects()
    between = len(scores) * ((scores.mean(0) - scores.mean()) ** 2).sum()
    assert r2(scores, effects)["layer"] == pytest.approx(between / ((scores - scores.mean()) ** 2).sum())


def test_larger_model_explains_no_less() -> None:
    """R2(both) is at least that of either part, and 1 if scores are lines in the effect."""
    scores, effects = random_scores_and_effects()
    found = r2(scores, effects)
    assert found["both"] >= max(found["layer"], found["effect"])
    exact = np.arange(4) + np.array([1.0, -2, 0, 3]) * effects
    assert r2(exact, effects)["both"] == pytest.approx(1)


def test_resampled_r2_matches_least_squares() -> None:
    """R2 from sums equals R2 of a least-squares fit on the resampled facts."""
    scores, effects = random_scores_and_effects()
    effects[:, 2] = 0.25  # a layer with a constant effect
    resample_counts = bootstrap_counts(len(scores), 30, seed=1)
    found = resampled_r2(resample_counts, scores, effects)
    for i, counts in enumerate(resample_counts.astype(int)):
        alone = r2(np.repeat(scores, counts, 0), np.repeat(effects, counts, 0))
        assert {name: found[name][i] for name in REGRESSION_MODELS} == pytest.approx(alone, abs=1e-9)


def test_unrelated_effects_gain_what_permutation_gains() -> None:
    """The permutation test accepts effects that determine the scores and rejects unrelated ones."""
    effects = RNG.random((40, 5))
    noise = RNG.normal(size=effects.shape)
    unrelated, related = (
        compare_regressions(noise, effects, 200),
        compare_regressions(noise + 3 * effects, effects, 200),
    )
    assert unrelated is not None and related is not None
    assert unrelated["gain"]["p"] > 0.05 and related["gain"]["p"] < 0.01
    assert unrelated["gain"]["value"] == pytest.approx(unrelated["gain"]["chance"], abs=0.04)
    assert related["f_test"]["p"] < 1e-6 < unrelated["f_test"]["p"]


def test_fact_level_offsets_are_not_evidence() -> None:
    """With independent offsets of each fact the permutation test is more careful than the F test, which counts every
    row.
    """
    level, other = RNG.normal(size=(2, 20, 1))
    scores, effects = level + np.zeros((1, 8)), other + np.zeros((1, 8))
    found = compare_regressions(scores, effects, 200)
    assert found is not None
    assert found["f_test"]["p"] < found["gain"]["p"]  # the F test treats 160 rows as 160 facts
    assert found["gain"]["p"] > 0.02


def test_constant_scores_have_no_regression() -> None:
    """Equal scores have no regression, and a single fact has no interval."""
    scores, effects = random_scores_and_effects()
    assert compare_regressions(np.full_like(scores, 0.5), effects) is None
    one = compare_regressions(scores[:1], effects[:1], 10)
    assert one is not None and one["r2"]["layer"] == {"value": pytest.approx(1), "low": None, "high": None}


def test_permutation_gains_are_reproducible() -> None:
    """The same seed gives the same permutations."""
    scores, effects = random_scores_and_effects()
    assert (permutation_gains(scores, effects, 20, 3) == permutation_gains(scores, effects, 20, 3)).all()


def test_f_test_by_hand() -> None:
    """Residual sums of squares 10 (rank 2) and 6 (rank 4) on 24 rows give F = (4 / 2) / (6 / 20). p is 0.05 at tabled
    points.
    """
    f, p = f_test(10, 2, 6, 4, 24)
    assert f == pytest.approx(2 / 0.3) and p is not None and 0 < p < 0.01
    for critical, extra, residual in ((4.9646, 1, 10), (3.3258, 5, 10), (2.0970, 8, 60), (1.9105, 10, 120)):
        small_rss = 1 + critical * extra / residual
        assert f_test(small_rss, 1, 1.0, 1 + extra, 1 + extra + residual)[1] == pytest.approx(0.05, abs=1e-4)


def test_f_test_without_degrees_of_freedom() -> None:
    """Models of equal rank, a perfect fit and too few rows have no F."""
    assert f_test(10, 2, 10, 2, 24) == f_test(10, 2, 0, 4, 24) == f_test(10, 2, 6, 4, 4) == (None, None)


def test_missing_scipy_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SciPy the error names the optional dependency to install."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(Misconfigured, match=r"pip install .*\[studies\]"):
        f_test(10, 2, 6, 4, 24)
