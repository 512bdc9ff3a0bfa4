"""An estimate of the time that is left, from the share of the work that is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

from service.kit.steps import Phase, Stepper, StepperResult, advance

T = TypeVar("T")
MIN_SECONDS, MIN_SHARE = 2.0, 0.02  # of the work: before that there is no estimate


class TimeEstimate:
    """Assumes that the rest takes as long per share as what was done since the first update."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None  # time and share of the first update

    def seconds_left(self, share: float, now: float | None = None) -> float | None:
        """Return the estimate at a share of the work from 0 to 1, or None while too little is done."""
        now = time.monotonic() if now is None else now
        if self._start is None:
            self._start = now, share
        started, first = self._start
        if now - started < MIN_SECONDS or share - first < MIN_SHARE:
            return None
        return (now - started) / (share - first) * max(0.0, 1 - share)


def with_estimate(stepper: Stepper[T], costs: Mapping[Phase, float]) -> Stepper[T]:
    """Run the same steps with an estimate of the time that all of them take. `costs` are relative, in the order of the
    phases; a phase that is not named costs nothing."""
    estimate, total = TimeEstimate(), sum(costs.values())
    phases = list(costs)
    with closing(stepper):
        while True:
            outcome = advance(stepper)
            if isinstance(outcome, StepperResult):
                return outcome.result
            if outcome.phase in costs and total and not outcome.waiting:
                done = sum(costs[phase] for phase in phases[: phases.index(outcome.phase)])
                done += costs[outcome.phase] * outcome.done / max(1, outcome.total)
                outcome = replace(outcome, seconds_left=estimate.seconds_left(done / total))
            yield outcome
