"""Measures of records and their means: service.evaluation.metrics."""

from __future__ import annotations

import math

import pytest

from service.datasets.record import NeighborProbe, Record
from service.evaluation.metrics import (
    CHANGE_SCORES,
    MEASURES,
    PromptScores,
    RecordScores,
    change_scores,
    scoring_pairs,
    summarize,
)
from service.models.score import TargetScore

RECORD = Record(
    "record 1",
    "Eiffel Tower",
    "The {} is in",
    "Rome",
    "Paris",
    paraphrases=("One finds it in", "It stands in"),
    neighbours=(NeighborProbe("The Louvre is in", "Paris"), NeighborProbe("Big Ben is in", "London")),
)


def score(p: float, correct: int = 0, tokens: int = 1) -> TargetScore:
    """Return the score of an object whose token probabilities have the geometric mean p."""
    return TargetScore(math.log(p), correct == tokens, correct, tokens)


SCORES = RecordScores.from_scores(
    RECORD,
    [
        *(score(0.5, 2, 2), score(0.25)),
        *(score(0.2, 1, 2), score(0.4, 1)),
        *(score(0.3, 2, 2), score(0.1)),
        *(score(0.1), score(0.6, 1)),
        *(score(0.2), score(0.1)),
    ],
)


def test_scoring_pairs() -> None:
    """A prompt is scored on the new and the true object, a neighbour on the new object and its own."""
    assert scoring_pairs(RECORD)[:3] == [
        ("The Eiffel Tower is in", "Rome"),
        ("The Eiffel Tower is in", "Paris"),
        ("One finds it in", "Rome"),
    ]
    assert scoring_pairs(RECORD)[-2:] == [("Big Ben is in", "Rome"), ("Big Ben is in", "London")]


def test_measures_by_hand() -> None:
    """The measures of a record with two paraphrases and two neighbours equal those computed by hand."""
    expected = {
        "ES": 1.0,
        "PS": 0.5,
        "NS": 0.5,
        "EM": 0.25,
        "PM": (-0.2 + 0.2) / 2,
        "NM": (0.5 - 0.1) / 2,
        "p_new": 0.5,
        "exact": 1.0,
        "exact_paraphrase": 0.5,
        "exact_neighbour": 0.5,
        "accuracy": 1.0,
        "accuracy_paraphrase": 3 / 4,
        "accuracy_neighbour": 1 / 2,
    }
    assert SCORES.measures() == pytest.approx(expected, abs=1e-12)
    assert SCORES.edit_holds


def test_measures_without_a_true_object() -> None:
    """Comparisons with the true object are None, and the edit holds if the new object is greedy."""
    bare = Record("record 2", "Eiffel Tower", "The {} is in", "Rome")
    assert scoring_pairs(bare) == [("The Eiffel Tower is in", "Rome")]
    for greedy in (True, False):
        scores = RecordScores.from_scores(bare, [score(0.4, int(greedy))])
        measures = scores.measures()
        assert {name for name, value in measures.items() if value is not None} == {
            "p_new",
            "exact",
            "accuracy",
        }
        assert scores.edit_holds is greedy


def test_swapping_new_and_true_object_inverts_the_measures() -> None:
    """With new and true object swapped, ES and PS become 1 - ES and 1 - PS, and EM and PM change sign."""

    def swapped_scores(scores: PromptScores) -> PromptScores:
        assert scores.true
        return PromptScores(scores.true, scores.new)

    swapped = RecordScores(
        swapped_scores(SCORES.rewrite), [*map(swapped_scores, SCORES.paraphrases)], SCORES.neighbours
    )
    original, inverted = SCORES.measures(), swapped.measures()
    for name in ("ES", "PS"):
        assert inverted[name] == 1 - (original[name] or 0)
    for name in ("EM", "PM"):
        assert inverted[name] == pytest.approx(-(original[name] or 0))


def test_change_scores_use_the_joint_probability_of_the_optimised_object() -> None:
    """p of a two-token object is the product. Erase and amplify use the true object, write the new one."""
    alone = Record("record 3", "it", "{} is", "new", "true")
    before = RecordScores.from_scores(alone, [score(0.5, 0, 2), score(0.8)])
    after = RecordScores.from_scores(alone, [score(0.8, 0, 2), score(0.2)])
    assert change_scores(before, after, "write")["rewrite"] == pytest.approx(1 - (1 - 0.64) / (1 - 0.25))
    assert change_scores(before, after, "erase")["rewrite"] == pytest.approx(0.75)
    assert change_scores(after, before, "amplify")["rewrite"] == pytest.approx(1 - 0.2 / 0.8)
    assert change_scores(before, after, "write")["neighbour"] is None


def test_change_scores_without_a_change() -> None:
    """Equal scores before and after give 1 for neighbours and 0 for prompt and paraphrases."""
    changes = change_scores(SCORES, SCORES, "write")
    assert changes["neighbour"] == 1
    assert changes["rewrite"] == pytest.approx(0, abs=1e-6) == changes["paraphrase"]
    assert set(changes) == set(CHANGE_SCORES)


def test_summary_has_means_and_combined_scores() -> None:
    """Each mean is over the records that have the measure, and S is the harmonic mean of the three means."""
    rows = [SCORES.measures(), SCORES.measures() | {"PS": None, "ES": 0.0}]
    summary = summarize(rows, seed=0)
    assert summary["ES"]["mean"] == 0.5 and summary["ES"]["n"] == 2
    assert summary["PS"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert summary["S"]["mean"] == pytest.approx(0.5)
    assert summary["S_accuracy"]["mean"] == pytest.approx(3 / (1 + 4 / 3 + 2))
    assert set(summary) - {"S", "S_accuracy"} <= set(MEASURES)
    without_es = summarize([{"ES": None, "PS": 1.0, "NS": 1.0}], seed=0)
    assert without_es["ES"] is None and without_es["S"] is None
