"""What the tracing effect says of an edit beyond its layer: service.studies.regression."""

from __future__ import annotations

import numpy as np
import pytest

from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import Array
from service.studies.regression import (
    REGRESSION_MODELS,
    compare_regressions,
    design_matrices,
    f_survival,
    f_test,
    incomplete_beta,
    least_squares,
    permutation_gains,
    resampled_r2,
)

RNG = np.random.default_rng(0)


def random_scores_and_effects(facts: int = 12, layers: int = 4) -> tuple[Array, Array]:
    """Scores that depend on the layer, and on the effect with a slope of each layer's own."""
    effects = RNG.random((facts, layers))
    slopes = np.linspace(-1, 1, layers)
    return np.arange(layers) / 4 + slopes * effects + 0.3 * RNG.normal(size=effects.shape), effects


def r2(scores: Array, effects: Array) -> dict[str, float]:
    y = scores.reshape(-1)
    total = ((y - y.mean()) ** 2).sum()
    return {name: 1 - least_squares(x, y)[0] / total for name, x in design_matrices(effects).items()}


def test_a_line_by_hand() -> None:
    """y = 0, 0, 3 on x = 0, 1, 2: the line is 1.5 x - 0.5, and 1.5 of 6 squares are left."""
    x = np.array([[1.0, 0], [1, 1], [1, 2]])
    left, rank = least_squares(x, np.array([0.0, 0, 3]))
    assert (left, rank) == (pytest.approx(1.5), 2)
    found = compare_regressions(np.array([[0.0], [0], [3]]), np.array([[0.0], [1], [2]]), rounds=10)
    assert found is not None
    assert found["r2"]["effect"]["value"] == found["r2"]["both"]["value"] == pytest.approx(0.75)
    assert found["r2"]["layer"]["value"] == pytest.approx(0.0)


def test_a_factor_explains_the_variance_between_its_groups() -> None:
    """R2 of the layer alone is the between-layer share of the sum of squares."""
    scores, effects = random_scores_and_effects()
    between = len(scores) * ((scores.mean(0) - scores.mean()) ** 2).sum()
    assert r2(scores, effects)["layer"] == pytest.approx(between / ((scores - scores.mean()) ** 2).sum())


def test_a_richer_model_explains_no_less() -> None:
    """R2(both) is at least that of either part, and all of it when scores are lines in the effect."""
    scores, effects = random_scores_and_effects()
    found = r2(scores, effects)
    assert found["both"] >= max(found["layer"], found["effect"])
    exact = np.arange(4) + np.array([1.0, -2, 0, 3]) * effects
    assert r2(exact, effects)["both"] == pytest.approx(1)


def test_draws_are_regressions_on_the_facts_drawn() -> None:
    """The sums give for every draw what least squares give on its facts, written down as often as they were drawn."""
    scores, effects = random_scores_and_effects()
    effects[:, 2] = 0.25  # a layer where the effect never differs
    resample_counts = bootstrap_counts(len(scores), 30, seed=1)
    found = resampled_r2(resample_counts, scores, effects)
    for i, counts in enumerate(resample_counts.astype(int)):
        alone = r2(np.repeat(scores, counts, 0), np.repeat(effects, counts, 0))
        assert {name: found[name][i] for name in REGRESSION_MODELS} == pytest.approx(alone, abs=1e-9)


def test_unrelated_effects_gain_what_permutation_gains() -> None:
    """Effects that have nothing to do with the scores are not told from exchanged ones; those that make the scores are."""
    effects = RNG.random((40, 5))
    noise = RNG.normal(size=effects.shape)
    nothing, something = (
        compare_regressions(noise, effects, 200),
        compare_regressions(noise + 3 * effects, effects, 200),
    )
    assert nothing is not None and something is not None
    assert nothing["gain"]["p"] > 0.05 and something["gain"]["p"] < 0.01
    assert nothing["gain"]["value"] == pytest.approx(nothing["gain"]["chance"], abs=0.04)
    assert something["f_test"]["p"] < 1e-6 < nothing["f_test"]["p"]


def test_fact_level_offsets_are_no_evidence() -> None:
    """Facts differ in both scores and effects, in all layers alike and independently: the rows of one fact are no new facts."""
    level, other = RNG.normal(size=(2, 20, 1))
    scores, effects = level + np.zeros((1, 8)), other + np.zeros((1, 8))
    found = compare_regressions(scores, effects, 200)
    assert found is not None
    assert found["f_test"]["p"] < found["gain"]["p"]  # the F test takes 160 rows for 160 facts
    assert found["gain"]["p"] > 0.02


def test_scores_that_never_differ_explain_nothing() -> None:
    """Where every edit did the same there is nothing to explain; one fact has no interval."""
    scores, effects = random_scores_and_effects()
    assert compare_regressions(np.full_like(scores, 0.5), effects) is None
    one = compare_regressions(scores[:1], effects[:1], 10)
    assert one is not None and one["r2"]["layer"] == {"value": pytest.approx(1), "low": None, "high": None}


def test_permutation_gains_are_reproducible() -> None:
    """A seed gives the same exchanges again."""
    scores, effects = random_scores_and_effects()
    assert (permutation_gains(scores, effects, 20, 3) == permutation_gains(scores, effects, 20, 3)).all()


def test_known_tails() -> None:
    """I_x(1, b) = 1 - (1 - x)^b; I_x(a, b) = 1 - I_1-x(b, a); 5 % points of F from tables."""
    assert incomplete_beta(0.3, 1, 7) == pytest.approx(1 - 0.7**7)
    assert incomplete_beta(0.9, 2.5, 4) == pytest.approx(1 - incomplete_beta(0.1, 4, 2.5))
    assert (incomplete_beta(0, 2, 3), incomplete_beta(1, 2, 3)) == (0, 1)
    for f, a, b in ((4.9646, 1, 10), (3.3258, 5, 10), (2.0970, 8, 60), (1.9105, 10, 120)):
        assert f_survival(f, a, b) == pytest.approx(0.05, abs=1e-4)
    assert f_survival(0, 3, 5) == 1


def test_the_f_test_by_hand() -> None:
    """10 squares left of 2 columns, 6 of 4, 24 rows: F = (4 / 2) / (6 / 20). Nothing to test is not tested."""
    f, p = f_test(10, 2, 6, 4, 24)
    assert f == pytest.approx(2 / 0.3) and p == pytest.approx(f_survival(2 / 0.3, 2, 20))
    assert f_test(10, 2, 10, 2, 24) == f_test(10, 2, 0, 4, 24) == f_test(10, 2, 6, 4, 4) == (None, None)
