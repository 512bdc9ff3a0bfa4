"""Tests of the division of time between foreground and background steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.kit.time_share import TimeShare

Seconds = st.floats(0.001, 1.0)


@given(steps=st.lists(st.tuples(Seconds, Seconds), min_size=1), share=st.floats(0.1, 0.9))
def test_foreground_has_its_share(steps: list[tuple[float, float]], share: float) -> None:
    """The foreground has its share of the time up to one step, whatever the durations of the steps are."""
    time_share, used, other = TimeShare(share), 0.0, 0.0
    for seconds, seconds_of_other in steps:
        time_share.add_foreground(seconds)
        used += seconds
        if time_share.background_is_due:
            time_share.add_background(seconds_of_other)
            other += seconds_of_other
    longest = max(seconds for _, seconds in steps)
    assert used >= share / (1 - share) * (other - longest) - 1e-9


def test_background_is_due_after_a_time_without_foreground_work() -> None:
    """Without a head start, background steps beside no foreground work give the foreground no claim."""
    time_share = TimeShare(0.5)
    time_share.add_background(10.0)
    assert not time_share.background_is_due
    time_share.add_background(10.0, foreground_has_work=False)
    assert time_share.background_is_due


@given(
    steps=st.lists(st.tuples(Seconds, st.booleans()), min_size=1),
    share=st.floats(0.1, 0.9),
    head_start=st.floats(0.0, 2.0),
)
def test_background_keeps_its_share(steps: list[tuple[float, bool]], share: float, head_start: float) -> None:
    """Foreground work that comes and goes never has more than its share, the head start and the claim of one step."""
    time_share, used, other = TimeShare(share, head_start), 0.0, 0.0
    for seconds_of_other, has_work in steps:
        if has_work:
            while not time_share.background_is_due:
                time_share.add_foreground(0.01)
                used += 0.01
        time_share.add_background(seconds_of_other, has_work)
        other += seconds_of_other
    assert used <= share / (1 - share) * other + head_start + 0.01 * len(steps) + 1e-9


def test_foreground_runs_alone_for_the_head_start() -> None:
    """Foreground work that begins after a long time runs alone for the head start."""
    time_share = TimeShare(0.6, head_start=0.25)
    time_share.add_background(10.0, foreground_has_work=False)
    time_share.add_foreground(0.2)
    assert not time_share.background_is_due
    time_share.add_foreground(0.1)
    assert time_share.background_is_due


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_unused_foreground_time_is_not_saved(seconds: float) -> None:
    """Foreground time before a background step does not shorten the debt after it."""
    time_share = TimeShare(0.5)
    time_share.add_foreground(seconds)
    time_share.add_background(1.0)
    time_share.add_foreground(0.5)
    assert not time_share.background_is_due
