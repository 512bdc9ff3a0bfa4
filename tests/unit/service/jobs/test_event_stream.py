"""Event streams with idle ticks: service.jobs.event_stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from service.errors import Unavailable
from service.jobs.broker import Event
from service.jobs.event_stream import with_idle_ticks

ONE, TWO = Event("1", "progress", {}), Event("2", "end", {})


class FakeChannel:
    """A channel that yields one event, waits for `resume`, and then yields another event or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.resume = asyncio.Event()
        self.error = error
        self.closed = False

    async def events(self) -> AsyncIterator[Event]:
        try:
            yield ONE
            await self.resume.wait()
            if self.error:
                raise self.error
            yield TWO
        finally:
            self.closed = True


def collect_with_idle_ticks(channel: FakeChannel, idle_ticks: int) -> list[Event | None]:
    """Return the events and idle ticks. The channel resumes after `idle_ticks` ticks; the listener leaves
    after 51."""

    async def run() -> list[Event | None]:
        told: list[Event | None] = []
        async with asyncio.timeout(20), aclosing(with_idle_ticks(channel.events(), 0.01)) as every:
            async for event in every:
                told.append(event)
                if told.count(None) == idle_ticks:
                    channel.resume.set()
                if told.count(None) > 50:
                    break
        return told

    return asyncio.run(run())


def test_idle_ticks_are_yielded() -> None:
    """An idle tick (None) is yielded after each interval without an event, and no event is lost."""
    told = collect_with_idle_ticks(FakeChannel(), idle_ticks=3)
    assert [event for event in told if event] == [ONE, TWO]
    assert told.count(None) >= 3


def test_errors_come_through() -> None:
    """An error of the channel is raised in the listener."""
    with pytest.raises(Unavailable):
        collect_with_idle_ticks(FakeChannel(Unavailable("gone.")), idle_ticks=1)


@pytest.mark.parametrize("silences", [1, 99])
def test_the_channel_is_closed(silences: int) -> None:
    """The channel is closed when its stream ends and when the listener leaves during an idle interval."""
    channel = FakeChannel()
    collect_with_idle_ticks(channel, silences)
    assert channel.closed
