"""From a model's answers to measures: service.evaluation.metrics."""

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


def score(p: float, right: int = 0, tokens: int = 1) -> TargetScore:
    """Of an object whose tokens have the geometric mean p."""
    return TargetScore(math.log(p), right == tokens, right, tokens)


ANSWERS = RecordScores.from_scores(
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
    """The new object and the true one on every wording; on neighbours the new one and their own."""
    assert scoring_pairs(RECORD)[:3] == [
        ("The Eiffel Tower is in", "Rome"),
        ("The Eiffel Tower is in", "Paris"),
        ("One finds it in", "Rome"),
    ]
    assert scoring_pairs(RECORD)[-2:] == [("Big Ben is in", "Rome"), ("Big Ben is in", "London")]


def test_measures_by_hand() -> None:
    """One record with two paraphrases and two neighbours, every measure written out."""
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
    assert ANSWERS.measures() == pytest.approx(expected, abs=1e-12)
    assert ANSWERS.edit_holds


def test_without_a_true_object_little_can_be_said() -> None:
    """What compares with the true object is not measured; whether the new one is said is, and then it holds."""
    bare = Record("record 2", "Eiffel Tower", "The {} is in", "Rome")
    assert scoring_pairs(bare) == [("The Eiffel Tower is in", "Rome")]
    for says in (True, False):
        answers = RecordScores.from_scores(bare, [score(0.4, int(says))])
        found = answers.measures()
        assert {name for name, value in found.items() if value is not None} == {"p_new", "exact", "accuracy"}
        assert answers.edit_holds is says


def test_swapping_the_objects_swaps_the_edit() -> None:
    """With new and true exchanged, ES and PS are what is left of 1, and EM and PM change their sign."""

    def swapped_scores(answer: PromptScores) -> PromptScores:
        assert answer.true
        return PromptScores(answer.true, answer.new)

    swapped = RecordScores(
        swapped_scores(ANSWERS.rewrite), [*map(swapped_scores, ANSWERS.paraphrases)], ANSWERS.neighbours
    )
    mine, theirs = ANSWERS.measures(), swapped.measures()
    for name in ("ES", "PS"):
        assert theirs[name] == 1 - (mine[name] or 0)
    for name in ("EM", "PM"):
        assert theirs[name] == pytest.approx(-(mine[name] or 0))


def test_changes_take_the_joint_probability_of_what_was_optimised() -> None:
    """Of an object of two tokens p is the product; erasing and amplifying look at the true object, writing at the new one."""
    alone = Record("record 3", "it", "{} is", "new", "true")
    before = RecordScores.from_scores(alone, [score(0.5, 0, 2), score(0.8)])
    after = RecordScores.from_scores(alone, [score(0.8, 0, 2), score(0.2)])
    assert change_scores(before, after, "write")["rewrite"] == pytest.approx(1 - (1 - 0.64) / (1 - 0.25))
    assert change_scores(before, after, "erase")["rewrite"] == pytest.approx(0.75)
    assert change_scores(after, before, "amplify")["rewrite"] == pytest.approx(1 - 0.2 / 0.8)
    assert change_scores(before, after, "write")["neighbour"] is None


def test_nothing_changed_is_nothing_done() -> None:
    """Without a change neighbours are kept whole, and nothing was written."""
    found = change_scores(ANSWERS, ANSWERS, "write")
    assert found["neighbour"] == 1
    assert found["rewrite"] == pytest.approx(0, abs=1e-6) == found["paraphrase"]
    assert set(found) == set(CHANGE_SCORES)


def test_a_summary_has_means_and_combined_scores() -> None:
    """Each measure over the records that have it, and S of the three means."""
    rows = [ANSWERS.measures(), ANSWERS.measures() | {"PS": None, "ES": 0.0}]
    found = summarize(rows, seed=0)
    assert found["ES"]["mean"] == 0.5 and found["ES"]["n"] == 2
    assert found["PS"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert found["S"]["mean"] == pytest.approx(0.5)
    assert found["S_accuracy"]["mean"] == pytest.approx(3 / (1 + 4 / 3 + 2))
    assert set(found) - {"S", "S_accuracy"} <= set(MEASURES)
    nothing = summarize([{"ES": None, "PS": 1.0, "NS": 1.0}], seed=0)
    assert nothing["ES"] is None and nothing["S"] is None
