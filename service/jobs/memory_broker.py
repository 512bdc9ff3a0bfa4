"""The broker inside one process: threads that work on one side, event loops that listen on the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from service.jobs.broker import KINDS, Delivery, Event, Message
from service.kit.ids import new_id

Listener = tuple[asyncio.AbstractEventLoop, asyncio.Event]


@dataclass(eq=False)
class _Channel:
    events: deque[Event]
    listeners: set[Listener] = field(default_factory=set)
    closed: bool = False
    touched: float = 0.0


def _after(events: deque[Event], seen: int) -> list[Event]:
    """The events with larger ids than that, from the end: a listener that keeps up looks at few."""
    return list(takewhile(lambda event: int(event.id) > seen, reversed(events)))[::-1]


class MemoryBroker:
    """Everything is kept in bounded memory: a channel's newest `channel_events` events, of closed channels the newest
    with `kept_events` events in all, and those for `kept_seconds`; of channels that nobody closed or listens to, and
    of cancels, the newest `kept_names`."""

    def __init__(
        self,
        channel_events: int = 4096,
        kept_events: int = 50_000,
        kept_seconds: float = 300,
        kept_names: int = 10_000,
    ) -> None:
        self.channel_events = channel_events
        self.kept_events = kept_events
        self.kept_seconds = kept_seconds
        self.kept_names = kept_names
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._queues: dict[str, OrderedDict[str, Delivery]] = {kind: OrderedDict() for kind in KINDS}
        self._taken: dict[str, Delivery] = {}
        self._returned: set[str] = set()  # what waits again
        self._since: dict[str, float] = {}  # what waits, and since when
        self._channels: OrderedDict[str, _Channel] = OrderedDict()  # the one touched last comes last
        self._ended: OrderedDict[str, _Channel] = OrderedDict()  # closed channels, oldest first
        self._ended_events = 0
        self._cancels: OrderedDict[str, None] = OrderedDict()
        self._last_id = 0
        self._woken = False
        self._closed = False

    # deliveries

    def announce(self, job_id: str, kind: str) -> None:
        with self._arrived:
            if job_id not in self._queues[kind]:
                self._queues[kind][job_id] = Delivery(new_id("bell"), kind, job_id)
                self._since[job_id] = time.monotonic()
                self._arrived.notify_all()

    def call(
        self, kind: str, payload: dict[str, Any], request_id: str = "", channel: str | None = None
    ) -> str:
        channel = channel or new_id("call")
        with self._arrived:
            self._queues[kind][channel] = Delivery(channel, kind, channel, payload, request_id)
            self._since[channel] = time.monotonic()
            self._arrived.notify_all()
        return channel

    def knows(self, channel: str) -> bool:
        with self._lock:
            return channel in self._taken or any(channel in queue for queue in self._queues.values())

    def take(self, kinds: Sequence[str], limit: int, timeout: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout
        with self._arrived:
            while not (self._closed or self._woken or any(self._queues[kind] for kind in kinds)):
                left = deadline - time.monotonic()
                if left <= 0 or not self._arrived.wait(left):
                    break
            self._woken = False
            queue = next((self._queues[kind] for kind in kinds if self._queues[kind]), None)
            if queue is None or self._closed:
                return []
            taken = [queue.popitem(last=False)[1] for _ in range(min(limit, len(queue)))]
            self._taken.update((delivery.id, delivery) for delivery in taken)
            for delivery in taken:
                self._since.pop(delivery.job_id, None)
                self._returned.discard(delivery.id)
            return taken

    def owns(self, delivery: Delivery) -> bool:
        with self._lock:
            return delivery.id in self._taken

    def done(self, delivery: Delivery) -> None:
        with self._lock:
            self._taken.pop(delivery.id, None)

    def give_back(self, delivery: Delivery) -> None:
        with self._arrived:
            if self._taken.pop(delivery.id, None) is None:
                return
            queue = self._queues[delivery.kind]
            queue.pop(delivery.job_id, None)
            others = [d for d in queue.values() if d.id not in self._returned]
            self._returned.add(delivery.id)
            queue[delivery.job_id] = delivery  # behind what came back before it, and before all others
            for other in others:
                queue.move_to_end(other.job_id)
            self._since[delivery.job_id] = time.monotonic()
            self._arrived.notify_all()

    def wake(self) -> None:
        with self._arrived:
            self._woken = True
            self._arrived.notify_all()

    def waiting(self, kind: str) -> int:
        with self._lock:
            return len(self._queues[kind])

    def oldest(self, kind: str) -> float:
        with self._lock:
            since = [self._since[job_id] for job_id in self._queues[kind]]
            return time.monotonic() - min(since) if since else 0.0

    # news

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        with self._lock:
            found = self._channel(channel)
            if found.closed:
                return
            found.events.append(Event(self._next_id(), name, data))
            found.touched = time.monotonic()
            if last:
                found.closed = True
                self._ended[channel] = found
                self._ended_events += len(found.events)
                self._cancels.pop(channel, None)
                self._forget_old()
            _ring(found)

    def publish_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.publish(message.channel, message.name, message.data, message.last)

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        return self._listen(channel, int(after) if after and after.isdecimal() else 0)

    async def _listen(self, name: str, seen: int) -> AsyncIterator[Event]:
        bell = asyncio.Event()
        listener = (asyncio.get_running_loop(), bell)
        with self._lock:
            channel = self._channel(name)
            channel.listeners.add(listener)
        try:
            while True:
                with self._lock:
                    bell.clear()
                    fresh = _after(channel.events, seen)
                    over = channel.closed or self._closed
                for event in fresh:
                    seen = int(event.id)
                    yield event
                if over:
                    return
                await bell.wait()
        finally:
            with self._lock:
                channel.listeners.discard(listener)
                if not (channel.events or channel.listeners) and self._channels.get(name) is channel:
                    del self._channels[name]

    def cancel(self, channel: str) -> None:
        with self._lock:
            if (found := self._channels.get(channel)) is not None and found.closed:
                return
            self._cancels[channel] = None
            while len(self._cancels) > self.kept_names:
                self._cancels.popitem(last=False)

    def forget(self, channel: str) -> None:
        with self._lock:
            self._cancels.pop(channel, None)
            found = self._channels.pop(channel, None)
            if self._ended.pop(channel, None) is not None and found is not None:
                self._ended_events -= len(found.events)

    def cancelled(self, channel: str) -> bool:
        with self._lock:
            return channel in self._cancels

    def close(self) -> None:
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
            for channel in self._channels.values():
                _ring(channel)

    def _channel(self, name: str) -> _Channel:
        found = self._channels.setdefault(name, _Channel(deque(maxlen=self.channel_events)))
        self._channels.move_to_end(name)
        if len(self._channels) > self.kept_names + len(self._ended):
            idle = (
                key for key, channel in self._channels.items() if not (channel.listeners or channel.closed)
            )
            if (oldest := next(idle, name)) != name:
                del self._channels[oldest]
        return found

    def _next_id(self) -> str:
        """Microseconds of the clock, made to grow: ids of before a restart are smaller."""
        self._last_id = max(self._last_id + 1, time.time_ns() // 1000)
        return str(self._last_id)

    def _forget_old(self) -> None:
        """Drop closed channels, oldest first, that are over the limits. Whoever listens to one still hears it out."""
        horizon = time.monotonic() - self.kept_seconds
        while self._ended:
            name, oldest = next(iter(self._ended.items()))
            if oldest.touched >= horizon and self._ended_events <= self.kept_events:
                return
            del self._ended[name]
            self._ended_events -= len(oldest.events)
            self._channels.pop(name, None)


def _ring(channel: _Channel) -> None:
    for listener in list(channel.listeners):
        loop, bell = listener
        try:
            loop.call_soon_threadsafe(bell.set)
        except RuntimeError:  # the loop is gone, and its listener with it
            channel.listeners.discard(listener)
