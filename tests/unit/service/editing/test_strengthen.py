"""The policy that chooses the strength of an edit: service.editing.strengthen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from service.editing.strengthen import Assessment, choose_strengths
from service.kit.steps import Phase, Progress, Stepper, run_to_completion

ACCEPTED, WEAK = Assessment(True), Assessment(False, passed=True, effective=False)
INEFFECTIVE, HARMFUL = Assessment(False, False, False), Assessment(False, False, True)
SCHEDULE = (1.0, 1.25, 1.5, 2.0)


def choose(
    rounds: Sequence[Sequence[Assessment]], schedules: Sequence[Sequence[float]] | None = None
) -> tuple[list[float], list[list[float]]]:
    """Return the chosen strengths and the strengths of each round, when the edits are assessed as `rounds` says."""
    measured: list[list[float]] = []

    def measure(strengths: Sequence[float]) -> Stepper[list[Assessment]]:
        measured.append(list(strengths))
        yield Progress(Phase.MEASURE, 1, 1)
        return list(rounds[len(measured) - 1])

    schedules = schedules or [SCHEDULE] * len(rounds[0])
    choices = run_to_completion(choose_strengths(schedules, measure, lambda _i, _strength, m: m))
    assert len(measured) == len(rounds)
    return [c.strength for c in choices], measured


@pytest.mark.parametrize(
    ("assessments", "strength"),
    [
        ([ACCEPTED], 1.0),
        ([WEAK, ACCEPTED], 1.25),
        ([INEFFECTIVE, INEFFECTIVE, WEAK, WEAK], 2.0),
        ([INEFFECTIVE, WEAK, HARMFUL], 1.25),
        ([INEFFECTIVE, INEFFECTIVE, INEFFECTIVE, INEFFECTIVE], 1.0),
        ([INEFFECTIVE, HARMFUL], 1.0),
        ([HARMFUL], 1.0),
    ],
)
def test_single_edit_gets_the_last_strength_that_passes(
    assessments: list[Assessment], strength: float
) -> None:
    """A single edit is raised until it is accepted or harmful; without a strength that passes it gets its first."""
    assert choose([[a] for a in assessments])[0] == [strength]


def test_only_edits_that_are_too_weak_are_raised() -> None:
    """In a group, accepted and harmful edits keep their strength while the others are raised."""
    chosen, measured = choose([[ACCEPTED, WEAK, HARMFUL], [ACCEPTED, ACCEPTED, HARMFUL]])
    assert chosen == [1.0, 1.25, 1.0]
    assert measured == [[1.0, 1.0, 1.0], [1.0, 1.25, 1.0]]


def test_edit_is_not_raised_beyond_its_schedule() -> None:
    """An edit at the end of its schedule keeps its last strength while others are raised."""
    chosen, _ = choose([[WEAK, HARMFUL]] * 2, [(1.0, 2.0), (1.0,)])
    assert chosen == [2.0, 1.0]


def test_group_without_an_effective_edit_is_not_raised() -> None:
    """A group in which no edit is effective at full strength is not raised further. At partial strength it is."""
    assert choose([[INEFFECTIVE, INEFFECTIVE]])[0] == [1.0, 1.0]
    partial = [(0.5, 1.0, 2.0)] * 2
    assert choose([[INEFFECTIVE, INEFFECTIVE]] * 2, partial)[0] == [1.0, 1.0]
    assert choose([[INEFFECTIVE, INEFFECTIVE], [ACCEPTED, ACCEPTED]], partial)[0] == [1.0, 1.0]
