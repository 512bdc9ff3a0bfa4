"""Strengths in an evaluation: service.evaluation.strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from service.datasets.record import Record
from service.editing.strengthen import Assessment
from service.evaluation import strengths
from service.evaluation.metrics import PromptScores
from service.evaluation.strengths import assess_rewrite, choose_group_strengths
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.models.score import TargetScore, TokenScore
from service.recipes.strength_schedule import StrengthSchedule

RECORD = Record("record 1", "Eiffel Tower", "The {} is in", "Rome", "Paris")


def score(p: float, greedy: bool = False, token: int = 1) -> TargetScore:
    log_p = math.log(p)
    return TargetScore(log_p, greedy, int(greedy), 1, (TokenScore(token, log_p, greedy),))


@pytest.mark.parametrize(
    ("p_new", "p_true", "greedy", "margin", "expected"),
    [
        (0.6, 0.3, True, math.log(2) - 1e-9, Assessment(True, True, True)),
        (0.6, 0.3, True, math.log(2) + 1e-6, Assessment(False, True, False)),  # lacks the margin
        (1.0, math.exp(-1), True, 1.0, Assessment(True, True, True)),  # exactly the margin is enough
        (0.4, 0.3, False, 0.0, Assessment(False, True, True)),  # another continuation is greedy
        (0.2, 0.1, True, 0.0, Assessment(False, False, False)),  # below the guard's min_probability
        (0.3, 0.4, False, 0.0, Assessment(False, False, False)),  # the true object is more probable
    ],
)
def test_assessment_is_that_of_the_default_guard(
    p_new: float, p_true: float, greedy: bool, margin: float, expected: Assessment
) -> None:
    """Efficacy, probability, margin and greedy continuation decide as in the service."""
    assert (
        assess_rewrite(RECORD, PromptScores(score(p_new, greedy), score(p_true, token=2)), margin) == expected
    )


@pytest.mark.parametrize("greedy", [True, False])
def test_assessment_without_a_true_object(greedy: bool) -> None:
    """Without a true object an edit is accepted if the new object is greedy and probable enough."""
    record = Record("record 2", "Eiffel Tower", "The {} is in", "Rome")
    assessment = assess_rewrite(record, PromptScores(score(0.6, greedy), None), 5.0)
    assert assessment == Assessment(greedy, greedy, greedy)


def choose(
    monkeypatch: pytest.MonkeyPatch, needed: dict[str, float], names: str
) -> tuple[list[float], list[str]]:
    """Choose strengths of edits that are accepted from a strength on; return them, and the members of each
    measurement.
    """
    records = [Record(name, "it", "{} is", "new", "true") for name in names]
    measured: list[str] = []

    def score_with_strengths(
        _replica: Any, members: Sequence[Record], _groups: Any, active: Sequence[Any], levels: Sequence[float]
    ) -> Stepper[list[Any]]:
        measured.append("".join(r.name for r in members))
        yield Progress(Phase.MEASURE, 1, 1)
        return [level >= needed[r.name] for r, level in zip(members, levels, strict=True)]

    def assess_member(_records: Any, _schedule: Any, _i: int, _strength: float, accepted: bool) -> Assessment:
        return Assessment(accepted, accepted, accepted)

    monkeypatch.setattr(strengths, "_score_with_strengths", score_with_strengths)
    monkeypatch.setattr(strengths, "_assess_member", assess_member)
    replica: Any = None
    chosen = run_to_completion(
        choose_group_strengths(
            replica, records, [[]] * len(records), [], 0, lambda _: StrengthSchedule((1.0, 2.0), 0.0, 0.0)
        )
    )
    return chosen, measured


def test_group_is_raised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with an effective edit raises the others to their next strength."""
    assert choose(monkeypatch, {"a": 1.0, "b": 2.0}, "ab") == ([1.0, 2.0], ["ab", "ab"])


def test_edits_that_are_not_accepted_follow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted edits are tried again without the others, which are then tried one by one and get their first
    strength.
    """
    chosen, measured = choose(monkeypatch, {"a": 1.0, "b": 9.0, "c": 1.0}, "abc")
    assert chosen == [1.0, 1.0, 1.0]
    assert measured == ["abc", "abc", "ac", "b", "b"]


def test_group_without_an_accepted_edit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no edit of a group is effective at full strength, its halves are tried."""
    chosen, measured = choose(monkeypatch, {"a": 2.0, "b": 2.0}, "ab")
    assert chosen == [2.0, 2.0]
    assert measured == ["ab", "a", "a", "b", "b"]
