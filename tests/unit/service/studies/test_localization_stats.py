"""Statistics of the localization study: service.studies.localization_stats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.studies.localization_stats import (
    EFFECT_READINGS,
    analyze_runs,
    compare_layer_choices,
    mean_effects_by_layer,
    restored_fractions,
    trace_effects,
)

GREATEST, LAST = EFFECT_READINGS


def trace(high: float, low: float, scores: list[list[float]], subject: tuple[int, int] = (1, 3)) -> Any:
    return {
        "high": high,
        "low": low,
        "subject": {"tokens": list(subject)},
        "kinds": {"mlp": {"scores": scores}},
    }


def test_restored_fractions_by_hand() -> None:
    """With high .9 and low .1, a score of .5 is one half and scores below .1 are 0.

    Without a total effect all are 0.
    """
    assert restored_fractions(trace(0.9, 0.1, [[0.5, 0.05, 0.9]])) == pytest.approx(np.array([[0.5, 0, 1]]))
    assert restored_fractions(trace(0.1, 0.9, [[1.0, 0.8]])) == pytest.approx(np.array([[0.125, 0]]))
    assert (restored_fractions(trace(0.5, 0.5, [[0.7]])) == 0).all()


def test_both_readings_of_the_effect() -> None:
    """One reading is the greatest effect over tokens from the subject's first on, the other that of the subject's
    last token.
    """
    found = trace_effects(trace(1.0, 0.0, [[0.9, 0.9], [0.1, 0.2], [0.3, 0.1], [0.2, 0.8]]))
    assert found == {GREATEST: pytest.approx([0.3, 0.8]), LAST: pytest.approx([0.3, 0.1])}


def test_layer_choices_by_hand() -> None:
    """For three facts and two layers the best layers of the others are 0, 1 and 1, and the strongest traces 1, 0 and
    0.
    """
    scores = np.array(
        [[0.0, 1.0], [0.4, 0.6], [1.0, 0.6]]
    )  # others' sums: (1.4, 1.2), (1.0, 1.6), (0.4, 1.6)
    effects = np.array([[0.1, 0.2], [0.5, 0.3], [0.9, 0.1]])
    found = compare_layer_choices(scores, effects, [4, 7])
    assert found is not None
    means = {name: way["mean"] for name, way in found["ways"].items()}
    assert found["best_layer"] == 7
    assert means == {
        "best_for_others": pytest.approx((0.0 + 0.6 + 0.6) / 3),
        "strongest_trace": pytest.approx((1.0 + 0.4 + 1.0) / 3),
        "random": pytest.approx(3.6 / 6),
    }
    assert found["gain"]["mean"] == pytest.approx((1.0 - 0.2 + 0.4) / 3)
    assert compare_layer_choices(scores[:1], effects[:1], [4, 7]) is None


def test_facts_without_prompts_for_a_score_are_left_out() -> None:
    """A score is over the facts that have prompts for it, with the effects of those facts at the edited layers."""
    effects = [{GREATEST: [0.1 * i, 0.2, 0.3], LAST: [0.0, 0.1 * i, 0.2]} for i in range(3)]
    runs = [
        [{"rewrite": 0.5, "paraphrase": None if i == 1 else 0.25, "neighbour": None}, {"rewrite": 0.1 * i, "paraphrase": 0.5, "neighbour": None}]
        for i in range(3)
    ]  # fmt: skip
    found = analyze_runs(runs, effects, [0, 2])
    assert found["neighbour"] is None
    assert found["rewrite"]["by_layer"]["mean"] == pytest.approx([0.5, 0.1])
    assert found["rewrite"]["by_layer"]["n"] == 3
    assert found["paraphrase"]["by_layer"]["mean"] == pytest.approx([0.25, 0.5])
    assert found["paraphrase"]["by_layer"]["n"] == found["paraphrase"]["regression"][LAST]["facts"] == 2
    assert mean_effects_by_layer(effects)[GREATEST]["mean"] == pytest.approx([0.1, 0.2, 0.3])
