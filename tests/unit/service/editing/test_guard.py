"""Tests of service.editing.guard."""

from __future__ import annotations

import math

import pytest

from service.editing.candidate import ResolvedEdit, VersionMeasurement
from service.editing.guard import CheckName, evaluate_guard
from service.editing.probes import Probe, ProbeResult
from service.methods.parameters import RomeParameters
from service.models.loading import WeightRef
from service.models.score import TargetScore, TokenScore
from service.schemas import EditRequest


def make_score(first_id: int, probabilities: list[float], greedy: list[bool]) -> TargetScore:
    """Return the score of an object whose tokens are numbered from `first_id` on."""
    tokens = tuple(
        TokenScore(first_id + i, math.log(p), g)
        for i, (p, g) in enumerate(zip(probabilities, greedy, strict=True))
    )
    mean = sum(t.log_p for t in tokens) / len(tokens)
    return TargetScore(mean, all(greedy), sum(greedy), len(tokens), tokens)


def failed_checks(new: TargetScore, true: TargetScore) -> set[CheckName]:
    """Return the checks that an edit fails whose objects have these scores on its prompt and on a paraphrase."""
    request = EditRequest.model_validate(
        {"subject": "Tower", "prompt": "{} in", "target_new": "Rome", "guard": {"min_paraphrase": 1.0}}
    )
    probes = [Probe("Tower in", "Rome", "Paris"), Probe("Tower is in", "Rome", "Paris")]
    resolved_edit = ResolvedEdit(request, RomeParameters(layers=(0,)), probes[0], probes[1:], [])
    measured = VersionMeasurement([ProbeResult.from_scores(new, true)] * 2, "", 2.0, set())
    result = evaluate_guard(resolved_edit, measured, measured, 1.0, {WeightRef(0): 0.5})
    return {check.name for check in result.checks if not check.passed}


def test_an_object_of_many_tokens_is_no_obstacle() -> None:
    """An edit passes although the true object is a long text whose mean per token is higher than that of the new
    object: the model begins with the new one."""
    new, long = make_score(1, [0.6], [True]), make_score(20, [0.2] + [1.0] * 7, [False] + [True] * 7)
    assert long.log_p > new.log_p
    assert failed_checks(new, long) == set()


def test_an_object_that_is_not_said_is_rejected() -> None:
    """An edit fails although the mean per token of its object is above the limit: the model says something else after
    the object's first tokens."""
    new = make_score(1, [0.45] * 6, [True, True, False, True, True, True])
    assert math.exp(new.log_p) > 0.3
    assert failed_checks(new, make_score(20, [0.001], [False])) == {CheckName.PROBABILITY}
    says_neither = {CheckName.EFFICACY, CheckName.PROBABILITY, CheckName.PARAPHRASE}
    assert failed_checks(new, make_score(20, [0.1], [False])) == says_neither
    completed = make_score(1, [0.45] * 6, [True] * 6)
    assert failed_checks(completed, make_score(20, [0.1], [False])) == set()


@pytest.mark.parametrize("shared", [1, 3])
def test_shared_tokens_do_not_help_the_new_object(shared: int) -> None:
    """An edit fails all three checks where the objects begin alike and the model prefers the true one at the first
    token that differs."""
    new = make_score(1, [0.9] * shared + [0.2] + [1.0] * 5, [True] * shared + [False] + [True] * 5)
    true = make_score(1, [0.9] * shared, [True] * shared)
    rest = TokenScore(50, math.log(0.7), True)
    log_p = (sum(t.log_p for t in true.tokens) + rest.log_p) / (shared + 1)
    true = TargetScore(log_p, True, shared + 1, shared + 1, (*true.tokens, rest))
    assert failed_checks(new, true) == {CheckName.EFFICACY, CheckName.PROBABILITY, CheckName.PARAPHRASE}


def name_result(probability: float) -> ProbeResult:
    """Return the result of a probe of the subject's name, which has this probability."""
    score = make_score(1, [probability], [probability > 0.5])
    return ProbeResult.from_scores(score, score)


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [(0.8, 0.8, True), (0.8, 0.3, True), (0.8, 0.1, False), (0.1, 0.0, False), (0.01, 0.0, None)],
)
def test_an_edit_that_changes_which_subject_is_read_is_rejected(
    before: float, after: float, passed: bool | None
) -> None:
    """An edit fails where the model names the subject much less often than before; where it hardly named it before,
    nothing is judged."""
    request = EditRequest.model_validate({"subject": "Tower", "prompt": "{} in", "target_new": "Rome"})
    probe = Probe("Tower in", "Rome", "Paris")
    name = Probe("A sentence about Tower:", "Tower", "Tower")
    resolved_edit = ResolvedEdit(request, RomeParameters(layers=(0,)), probe, [], [], name_probe=name)
    rewrite = ProbeResult.from_scores(make_score(1, [0.9], [True]), make_score(2, [0.1], [False]))
    was, now = (
        VersionMeasurement([rewrite], "", 2.0, set(), name=name_result(p or 1e-9)) for p in (before, after)
    )
    result = evaluate_guard(resolved_edit, was, now, 1.0, {WeightRef(0): 0.5})
    checks = {check.name: check for check in result.checks}
    assert (checks[CheckName.SUBJECT].passed if CheckName.SUBJECT in checks else None) == passed
    assert result.passed == (passed is not False)


@pytest.mark.parametrize(
    ("before", "after", "limit", "passed"),
    [
        (0.0, 0.3, None, None),
        (0.0, 0.3, 0.5, True),
        (0.4, 0.8, 0.5, True),
        (0.0, 0.6, 0.5, False),
        (0.0, math.nan, 0.5, False),
        (None, None, 0.5, None),
    ],
)
def test_an_edit_that_changes_the_description_is_rejected_on_request(
    before: float | None, after: float | None, limit: float | None, passed: bool | None
) -> None:
    """With a limit an edit fails where the divergence of the description rises by more; without one nothing is
    judged."""
    request = EditRequest.model_validate(
        {
            "subject": "Tower",
            "prompt": "{} in",
            "target_new": "Rome",
            "guard": {} if limit is None else {"max_description_kl": limit},
        }
    )
    probe = Probe("Tower in", "Rome", "Paris")
    resolved_edit = ResolvedEdit(request, RomeParameters(layers=(0,)), probe, [], [])
    rewrite = ProbeResult.from_scores(make_score(1, [0.9], [True]), make_score(2, [0.1], [False]))
    was, now = (VersionMeasurement([rewrite], "", 2.0, set(), description_kl=kl) for kl in (before, after))
    checks = {c.name: c for c in evaluate_guard(resolved_edit, was, now, 1.0, {WeightRef(0): 0.5}).checks}
    assert (checks[CheckName.DESCRIPTION].passed if CheckName.DESCRIPTION in checks else None) == passed
