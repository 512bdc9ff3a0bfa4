"""Tests of the division of time between callers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.kit.virtual_times import VirtualTimes

CALLERS = ("a", "b", "c")
Seconds = st.floats(0.01, 0.5)


def test_time_is_in_proportion_to_the_weights() -> None:
    """Callers that always have work get time in proportion to the weights of their steps."""
    times, used = VirtualTimes(0.0), {"a": 0.0, "b": 0.0}
    for caller in used:
        times.activate(caller)
    for _ in range(300):
        used[caller := times.first()] += 0.1
        times.add(caller, 0.1, weight=2.0 if caller == "b" else 1.0)
    assert used["b"] == pytest.approx(2 * used["a"], abs=0.31)


def test_a_caller_that_was_idle_runs_first_for_the_head_start() -> None:
    """A new caller has the head start, and half of the time after it."""
    times, order = VirtualTimes(1.0), []
    times.activate("a")
    times.add("a", 10.0)
    times.activate("b")
    for _ in range(10):
        order.append(times.first())
        times.add(order[-1], 0.25)
    assert order[:4] == ["b"] * 4
    assert order[4:].count("a") == 3


@given(
    steps=st.lists(st.tuples(Seconds, st.booleans()), min_size=20, max_size=200),
    head_start=st.floats(0.0, 2.0),
)
def test_no_caller_gains_by_becoming_idle(steps: list[tuple[float, bool]], head_start: float) -> None:
    """A caller that ends its work and begins again has at most half of the time, the head start and one step."""
    times, used = VirtualTimes(head_start), {"a": 0.0, "b": 0.0}
    times.activate("a")
    times.activate("b")
    for seconds, interrupts in steps:
        used[caller := times.first()] += seconds
        times.add(caller, seconds)
        if interrupts and caller == "b":
            times.deactivate("b")
            times.activate("b")
    assert used["b"] <= used["a"] + head_start + 0.5 + 1e-9


@given(calls=st.lists(st.sampled_from(CALLERS), max_size=60))
def test_memory_is_bounded(calls: list[str]) -> None:
    """Only callers that are ahead of their start are remembered, and none while nobody is active."""
    times = VirtualTimes(0.0)
    for number, caller in enumerate(calls):
        times.activate(caller)
        times.add(caller, 1.0)
        if number % 2:
            times.deactivate(caller)
    for caller in CALLERS:
        times.deactivate(caller)
    assert times._inactive == {}
