"""The memory bounds of the in-process broker: service.jobs.memory_broker."""

from __future__ import annotations

import asyncio
from typing import Any

from service.jobs.broker import Broker
from service.jobs.memory_broker import MemoryBroker


async def collect(broker: Broker, channel: str) -> Any:
    async with asyncio.timeout(20):
        return [event async for event in broker.events(channel)]


def test_channel_is_bounded() -> None:
    """A channel keeps its newest events, including the last one."""
    broker = MemoryBroker(channel_events=10)
    for n in range(1000):
        broker.publish("c", "n", {"n": n}, last=n == 999)
    events = asyncio.run(collect(broker, "c"))
    assert [event.data["n"] for event in events] == list(range(990, 1000))


def test_closed_channels_are_bounded() -> None:
    """The newest closed channels are kept, up to a limit on the number of their events."""
    broker = MemoryBroker(max_closed_events=10)
    for n in range(100):
        broker.publish(f"c{n}", "n", {})
        broker.publish(f"c{n}", "end", {}, last=True)
    assert sorted(broker._channels) == [f"c{n}" for n in range(95, 100)]
    assert broker._closed_event_count == 10


def test_closed_channels_expire() -> None:
    """A closed channel is dropped after `closed_ttl_seconds`."""
    broker = MemoryBroker(closed_ttl_seconds=0)
    broker.publish("a", "end", {}, last=True)
    broker.publish("b", "end", {}, last=True)
    assert "a" not in broker._channels


def test_channels_that_nobody_closes() -> None:
    """The numbers of open channels and of cancellations are bounded; a channel with a listener is kept."""
    broker = MemoryBroker(max_idle_channels=10)

    async def listen() -> Any:
        listener = asyncio.ensure_future(collect(broker, "heard"))
        await asyncio.sleep(0)
        for n in range(100):
            broker.publish(f"c{n}", "n", {})
            broker.cancel(f"c{n}")
        broker.publish("heard", "end", {}, last=True)
        return await listener

    assert len(asyncio.run(listen())) == 1
    assert len(broker._channels) <= 11
    assert len(broker._cancelled_channels) == 10


def test_channel_without_events_is_removed_with_its_listener() -> None:
    """A channel without events is removed when its listener leaves."""
    broker = MemoryBroker()

    async def listen() -> None:
        listener = asyncio.ensure_future(collect(broker, "c"))
        await asyncio.sleep(0)
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)

    asyncio.run(listen())
    assert not broker._channels
