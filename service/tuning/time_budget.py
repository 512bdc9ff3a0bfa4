"""A limit of the time of a whole run. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from service.kit.steps import Stepper, StepperResult, advance

T = TypeVar("T")
Clock = Callable[[], float]  #: seconds since a fixed moment


class TimeBudget:
    """Seconds that a run may take, counted from the construction."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._end = clock() + seconds

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the end, 0 after it."""
        return max(0.0, self._end - self.clock())

    @property
    def has_ended(self) -> bool:
        return self.seconds_left == 0


def run_until_end(stepper: Stepper[T], budget: TimeBudget) -> Stepper[T | None]:
    """Run the steps until the budget ends, and return their result; None if the budget ended before them. The last
    step may end after the budget."""
    with closing(stepper):
        while not budget.has_ended:
            outcome = advance(stepper)
            if isinstance(outcome, StepperResult):
                return outcome.result
            yield outcome
        return None
