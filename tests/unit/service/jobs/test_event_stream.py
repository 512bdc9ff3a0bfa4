"""Listening with a look around in the silences."""

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
    """Says one thing, falls silent until `go`, and says another, or fails."""

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
    """What is heard when the channel goes on after some silences; whoever hears none of them goes."""

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
    """Between the events a None is heard after every silence, and no event is lost by it."""
    told = collect_with_idle_ticks(FakeChannel(), idle_ticks=3)
    assert [event for event in told if event] == [ONE, TWO]
    assert told.count(None) >= 3


def test_errors_come_through() -> None:
    """An error of the channel is the listener's."""
    with pytest.raises(Unavailable):
        collect_with_idle_ticks(FakeChannel(Unavailable("gone.")), idle_ticks=1)


@pytest.mark.parametrize("silences", [1, 99])
def test_the_channel_is_closed(silences: int) -> None:
    """Whoever stops listening, in the middle of a silence too, leaves no channel open."""
    channel = FakeChannel()
    collect_with_idle_ticks(channel, silences)
    assert channel.closed
