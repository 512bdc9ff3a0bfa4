"""Which rounds of a search fit into its budget: service.tuning.race_schedule."""

from __future__ import annotations

import pytest

from service.tuning.race_schedule import RaceSchedule, round_sizes
from service.tuning.time_budget import TimeBudget
from tests.support.fake_trials import FakeClock


def test_rounds_grow_to_all_facts() -> None:
    """A round has at most twice the facts of the one before, and the last one has all."""
    assert round_sizes(48) == [4, 8, 12, 16, 24, 32, 48]
    assert round_sizes(50) == [4, 8, 12, 16, 24, 32, 48, 50]
    assert round_sizes(8) == [4, 8]
    assert round_sizes(3) == [3]


def schedule_with_rate(seconds: float, clock: FakeClock) -> RaceSchedule:
    """Return a schedule of three rounds whose first one is measured at two seconds for a unit of cost."""
    schedule = RaceSchedule({4: 10.0, 8: 10.0, 16: 20.0}, TimeBudget(seconds, clock))
    schedule.start_round(4)
    schedule.add(10.0, 10.0, 20.0)
    clock.now += 20.0
    return schedule


def test_first_round_is_always_tried() -> None:
    """Before anything is measured there is no estimate, and a round fits."""
    schedule = RaceSchedule({4: 10.0}, TimeBudget(1, FakeClock()))
    assert schedule.seconds_per_cost is None and schedule.seconds_left() is None
    assert schedule.fits(4)


def test_round_fits_by_its_measured_cost() -> None:
    """A round fits if its cost at the measured rate is not more than the seconds left."""
    assert schedule_with_rate(40.0, FakeClock()).fits(8)
    schedule = schedule_with_rate(39.0, FakeClock())
    assert not schedule.fits(8) and schedule.seconds_of(8) == 20.0


def test_rate_counts_what_was_measured_and_not_what_was_planned() -> None:
    """A measurement whose facts were stored before lowers the cost that is left by its plan only."""
    schedule = RaceSchedule({4: 10.0}, TimeBudget(100, FakeClock()))
    schedule.start_round(4)
    schedule.add(planned_cost=4.0, measured_cost=8.0, seconds=24.0)
    assert schedule.seconds_per_cost == 3.0
    assert schedule.seconds_left() == pytest.approx(18.0)


@pytest.mark.parametrize(("seconds", "left"), [(20.0 + 100.0, 60.0), (20.0 + 59.0, 20.0), (20.0 + 10.0, 0.0)])
def test_seconds_left_end_with_the_last_round_that_fits(seconds: float, left: float) -> None:
    """The estimate includes the rounds that fit, one after another."""
    assert schedule_with_rate(seconds, FakeClock()).seconds_left() == left


def test_seconds_left_are_at_most_those_of_the_budget() -> None:
    """A round that takes longer than the budget ends with it."""
    clock = FakeClock()
    schedule = RaceSchedule({4: 10.0}, TimeBudget(15, clock))
    schedule.start_round(4)
    schedule.add(1.0, 1.0, 5.0)
    clock.now = 5.0
    assert schedule.seconds_left() == 10.0
