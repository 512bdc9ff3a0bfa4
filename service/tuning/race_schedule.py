"""The rounds of a search with a time budget: which of them fit, and how long they take. Torch-free.

A round is a sequence of races. Each round measures on more facts than the round before it, and what both measure is
measured once. The order of the rounds depends on nothing but the number of facts; the budget decides how many of them
are carried out.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.tuning.time_budget import TimeBudget

FIRST_ROUND_FACTS = 4


def round_sizes(facts: int) -> list[int]:
    """Return the numbers of facts of all rounds: 4, 8, 12, 16, 24, 32, 48, 64, ..., and last all facts."""
    sizes, size = [], FIRST_ROUND_FACTS
    while size < facts:
        sizes.append(size)
        power = 1 << (
            size.bit_length() - 1
        )  # the powers of two, and the numbers half way between them from 8 on
        size = size * 2 if size < 8 else power * 3 // 2 if size == power else power * 2
    return [*sizes, facts]


class RaceSchedule:
    """The costs of all rounds in order, and the seconds that one unit of cost takes, as measured so far."""

    def __init__(self, costs: Mapping[int, float], budget: TimeBudget) -> None:
        """`costs`: the number of facts of each round -> its cost."""
        self.budget = budget
        self._later = dict(costs)  # the rounds that have not started
        self._open_cost = 0.0  # of what is left of the current round
        self._measured_cost = self._measured_seconds = 0.0

    @property
    def seconds_per_cost(self) -> float | None:
        """Return the measured seconds of one unit of cost, None before the first measurement."""
        return self._measured_seconds / self._measured_cost if self._measured_cost else None

    @property
    def sizes_left(self) -> list[int]:
        """Return the numbers of facts of the rounds that have not started."""
        return list(self._later)

    def seconds_of(self, facts: int) -> float | None:
        """Return the estimated seconds of a round that has not started."""
        rate = self.seconds_per_cost
        return None if rate is None else rate * self._later[facts]

    def fits(self, facts: int) -> bool:
        """Return whether a round is expected to end within the budget. The first round is always tried."""
        seconds = self.seconds_of(facts)
        return seconds is None or seconds <= self.budget.seconds_left

    def start_round(self, facts: int) -> None:
        self._open_cost = self._later.pop(facts)

    def add(self, planned_cost: float, measured_cost: float, seconds: float) -> None:
        """Record a measurement: its share of the cost of the round, and the cost and seconds of all that it consists
        of."""
        self._open_cost = max(0.0, self._open_cost - planned_cost)
        self._measured_cost += measured_cost
        self._measured_seconds += seconds

    def seconds_left(self) -> float | None:
        """Return the estimated seconds until the search ends: after the last round that fits, or with the budget."""
        rate, limit = self.seconds_per_cost, self.budget.seconds_left
        if rate is None:
            return None
        left = rate * self._open_cost
        for cost in self._later.values():
            if left + rate * cost > limit:
                break
            left += rate * cost
        return min(left, limit)
