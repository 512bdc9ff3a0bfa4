"""The policy that chooses the strength of an edit: the factor by which its change of value is multiplied.

Each edit has an increasing schedule of strengths and starts with the first. All edits are measured together. An edit
that is not yet accepted is raised to its next strength, unless it fails although it is effective: then a greater
strength only does more damage. Edits are raised and measured again until no edit can be raised.

The caller injects how edits are measured and how a measurement is assessed, so that the service (which applies the
guard), the evaluation and the search for a recipe choose strengths by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.kit.steps import Stepper

M = TypeVar("M")


@dataclass(frozen=True)
class Assessment:
    """The judgement of one edit at one strength."""

    accepted: bool  #: the edit has its effect and fails no limit: no other strength is tried
    passed: bool = True  #: no limit is exceeded; the edit may still be too weak
    effective: bool = True  #: the edit has its effect, so that a greater strength cannot repair a failure


@dataclass(frozen=True)
class StrengthChoice(Generic[M]):
    """The strength chosen for an edit, and what was measured with it."""

    strength: float
    measurement: M


def choose_strengths(
    schedules: Sequence[Sequence[float]],
    measure: Callable[[Sequence[float]], Stepper[Sequence[M]]],
    assess: Callable[[int, float, M], Assessment],
) -> Stepper[list[StrengthChoice[M]]]:
    """Return the strength of each edit, one per schedule, and its measurement.

    `measure` receives a strength for each edit and returns a measurement for each, of one version that contains all
    of them. `assess` receives the index of an edit, its strength and its measurement.

    Several edits get the strengths of the last round. The search ends early when no edit is effective at full
    strength (1) or more: the cause is then not a lack of strength. A single edit gets the last strength that passes,
    or its first strength when none passes.
    """
    levels = [0] * len(schedules)
    choices: list[StrengthChoice[M]] = []
    while True:
        strengths = [schedule[level] for schedule, level in zip(schedules, levels, strict=True)]
        measurements = yield from measure(strengths)
        assessments = [assess(i, strengths[i], m) for i, m in enumerate(measurements)]
        if not choices or len(schedules) > 1 or assessments[0].passed:
            choices = [StrengthChoice(s, m) for s, m in zip(strengths, measurements, strict=True)]
        raised = [
            i
            for i, a in enumerate(assessments)
            if not a.accepted and (a.passed or not a.effective) and levels[i] + 1 < len(schedules[i])
        ]
        hopeless = min(strengths) >= 1 and not any(a.effective for a in assessments)
        if not raised or (len(schedules) > 1 and hopeless):
            return choices
        for i in raised:
            levels[i] += 1
