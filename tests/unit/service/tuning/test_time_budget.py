"""A limit of the time of a run: service.tuning.time_budget."""

from __future__ import annotations

from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.tuning.time_budget import TimeBudget, run_until_end
from tests.support.fake_trials import FakeClock


def steps(clock: FakeClock, count: int, closed: list[bool]) -> Stepper[str]:
    try:
        for i in range(count):
            clock.now += 1
            yield Progress(Phase.RUN, i, count)
        return "done"
    finally:
        closed.append(True)


def test_seconds_left_are_counted_from_the_construction() -> None:
    """The budget counts down from the moment when it is made, and does not become negative."""
    clock = FakeClock()
    clock.now = 100.0
    budget = TimeBudget(10, clock)
    clock.now = 107.0
    assert budget.seconds_left == 3 and not budget.has_ended
    clock.now = 120.0
    assert budget.seconds_left == 0 and budget.has_ended


def test_steps_stop_when_the_budget_ends() -> None:
    """No step begins after the end, the stepper is closed, and there is no result."""
    clock, closed = FakeClock(), [False]
    assert run_to_completion(run_until_end(steps(clock, 10, closed), TimeBudget(3, clock))) is None
    assert clock.now == 3 and closed[-1]


def test_result_within_the_budget_is_returned() -> None:
    """Steps that end in time return their result."""
    clock = FakeClock()
    assert run_to_completion(run_until_end(steps(clock, 3, []), TimeBudget(4, clock))) == "done"
