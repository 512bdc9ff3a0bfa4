"""The broker inside one process: threads receive and publish, asyncio event loops listen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from service.jobs.broker import EVERYONE, CallerFilter, Delivery, Event, OutgoingEvent
from service.jobs.job_kinds import CALL_KINDS, WORK_KINDS
from service.kit.fair_queue import FairQueue
from service.kit.ids import new_id

Listener = tuple[asyncio.AbstractEventLoop, asyncio.Event]


@dataclass(eq=False)
class _Channel:
    events: deque[Event]
    listeners: set[Listener] = field(default_factory=set)
    closed: bool = False
    touched: float = 0.0


def _events_after(events: deque[Event], last_seen: int) -> list[Event]:
    """Return the events with ids above `last_seen`. Searches from the newest, so that a listener that keeps up reads
    few."""
    return list(takewhile(lambda event: int(event.id) > last_seen, reversed(events)))[::-1]


class MemoryBroker:
    """A broker in bounded memory.

    It stores the newest `channel_events` events of a channel; the newest closed channels, with at most
    `max_closed_events` events in all, for `closed_ttl_seconds`; and the newest `max_idle_channels` open channels
    without a listener, and as many cancellations.
    """

    def __init__(
        self,
        channel_events: int = 4096,
        max_closed_events: int = 50_000,
        closed_ttl_seconds: float = 300,
        max_idle_channels: int = 10_000,
    ) -> None:
        self.channel_events = channel_events
        self.max_closed_events = max_closed_events
        self.closed_ttl_seconds = closed_ttl_seconds
        self.max_idle_channels = max_idle_channels
        self._lock = threading.RLock()
        self._work_available = threading.Condition(self._lock)
        self._queues: dict[str, FairQueue[str, Delivery]] = {kind: FairQueue() for kind in WORK_KINDS}
        self._leased_calls: dict[str, Delivery] = {}
        self._enqueued_at: dict[str, float] = {}  # job or channel that waits -> time
        self._channels: OrderedDict[str, _Channel] = OrderedDict()  # the one used last comes last
        self._closed_channels: OrderedDict[str, _Channel] = OrderedDict()  # closed channels, oldest first
        self._closed_event_count = 0
        self._cancelled_channels: OrderedDict[str, None] = OrderedDict()
        self._last_id = 0
        self._wakeup_pending = False
        self._closed = False

    # deliveries

    def notify(self, job_id: str, kind: str, caller: str = "", cost: float = 1.0) -> None:
        self._enqueue(Delivery(job_id, kind, job_id, caller=caller), cost)

    def send_call(
        self,
        kind: str,
        payload: dict[str, Any],
        request_id: str = "",
        channel: str | None = None,
        caller: str = "",
        cost: float = 1.0,
    ) -> str:
        channel = channel or new_id("call")
        self._enqueue(Delivery(channel, kind, channel, payload, request_id, caller=caller, cost=cost), cost)
        return channel

    def _enqueue(self, delivery: Delivery, cost: float) -> None:
        with self._work_available:
            queue = self._queues[delivery.kind]
            if delivery.job_id not in queue:
                queue.add(delivery.job_id, delivery, delivery.caller, cost)
                self._enqueued_at[delivery.job_id] = time.monotonic()
                self._work_available.notify_all()

    def is_pending(self, channel: str) -> bool:
        with self._lock:
            return channel in self._leased_calls or any(channel in queue for queue in self._queues.values())

    def receive(
        self, kinds: Sequence[str], limit: int, timeout: float, callers: CallerFilter = EVERYONE
    ) -> list[Delivery]:
        deadline = time.monotonic() + timeout
        with self._work_available:
            while not (received := self._dequeue(kinds, limit, callers)):
                remaining = deadline - time.monotonic()
                if self._closed or self._wakeup_pending or remaining <= 0:
                    break
                self._work_available.wait(remaining)
            self._wakeup_pending = False
            return received

    def _dequeue(self, kinds: Sequence[str], limit: int, callers: CallerFilter) -> list[Delivery]:
        received: list[Delivery] = []
        for kind in () if self._closed else kinds:
            queue = self._queues[kind]
            while len(received) < limit:
                key = queue.first(callers.excluded.get(kind, ()), callers.only)
                if key is None:
                    break
                queued = queue.remove(key)
                self._enqueued_at.pop(key, None)
                received.append(replace(queued.item, position=queued.position))
            if received:
                break
        self._leased_calls |= {delivery.id: delivery for delivery in received if delivery.kind in CALL_KINDS}
        return received

    def holds_lease(self, delivery: Delivery) -> bool:
        with self._lock:
            return delivery.id in self._leased_calls

    def ack(self, delivery: Delivery) -> None:
        with self._lock:
            self._leased_calls.pop(delivery.id, None)

    def nack(self, delivery: Delivery) -> None:
        with self._work_available:
            if delivery.kind in CALL_KINDS and self._leased_calls.pop(delivery.id, None) is None:
                return
            self._queues[delivery.kind].put_back(
                delivery.job_id, delivery, delivery.caller, delivery.position
            )
            self._enqueued_at.setdefault(delivery.job_id, time.monotonic())
            self._work_available.notify_all()

    def wake(self) -> None:
        with self._work_available:
            self._wakeup_pending = True
            self._work_available.notify_all()

    def queue_depth(self, kind: str, caller: str | None = None) -> int:
        with self._lock:
            queue = self._queues[kind]
            return len(queue) if caller is None else queue.count_of(caller)

    def oldest_age(self, kind: str) -> float:
        with self._lock:
            enqueued = [self._enqueued_at[job_id] for job_id, _ in self._queues[kind]]
            return time.monotonic() - min(enqueued) if enqueued else 0.0

    # events

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        with self._lock:
            state = self._get_channel(channel)
            if state.closed:
                return
            state.events.append(Event(self._next_id(), name, data))
            state.touched = time.monotonic()
            if last:
                state.closed = True
                self._closed_channels[channel] = state
                self._closed_event_count += len(state.events)
                self._cancelled_channels.pop(channel, None)
                self._evict_closed_channels()
            _notify_listeners(state)

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        for message in messages:
            self.publish(message.channel, message.name, message.data, message.last)

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        return self._listen(channel, int(after) if after and after.isdecimal() else 0)

    async def _listen(self, name: str, last_seen: int) -> AsyncIterator[Event]:
        wakeup = asyncio.Event()
        listener = (asyncio.get_running_loop(), wakeup)
        with self._lock:
            channel = self._get_channel(name)
            channel.listeners.add(listener)
        try:
            while True:
                with self._lock:
                    wakeup.clear()
                    new_events = _events_after(channel.events, last_seen)
                    closed = channel.closed or self._closed
                for event in new_events:
                    last_seen = int(event.id)
                    yield event
                if closed:
                    return
                await wakeup.wait()
        finally:
            with self._lock:
                channel.listeners.discard(listener)
                if not (channel.events or channel.listeners) and self._channels.get(name) is channel:
                    del self._channels[name]

    def cancel(self, channel: str) -> None:
        with self._lock:
            if (state := self._channels.get(channel)) is not None and state.closed:
                return
            self._cancelled_channels[channel] = None
            while len(self._cancelled_channels) > self.max_idle_channels:
                self._cancelled_channels.popitem(last=False)

    def delete_channel(self, channel: str) -> None:
        with self._lock:
            self._cancelled_channels.pop(channel, None)
            removed = self._channels.pop(channel, None)
            if self._closed_channels.pop(channel, None) is not None and removed is not None:
                self._closed_event_count -= len(removed.events)

    def cancelled(self, channel: str) -> bool:
        with self._lock:
            return channel in self._cancelled_channels

    def close(self) -> None:
        with self._work_available:
            self._closed = True
            self._work_available.notify_all()
            for channel in self._channels.values():
                _notify_listeners(channel)

    def _get_channel(self, name: str) -> _Channel:
        state = self._channels.setdefault(name, _Channel(deque(maxlen=self.channel_events)))
        self._channels.move_to_end(name)
        if len(self._channels) > self.max_idle_channels + len(self._closed_channels):
            idle = (
                key for key, channel in self._channels.items() if not (channel.listeners or channel.closed)
            )
            if (oldest := next(idle, name)) != name:
                del self._channels[oldest]
        return state

    def _next_id(self) -> str:
        """Return the time in microseconds, increased where needed: ids increase, also across restarts."""
        self._last_id = max(self._last_id + 1, time.time_ns() // 1000)
        return str(self._last_id)

    def _evict_closed_channels(self) -> None:
        """Drop closed channels over the limits, oldest first. A listener of a dropped channel still gets all its
        events."""
        horizon = time.monotonic() - self.closed_ttl_seconds
        while self._closed_channels:
            name, oldest = next(iter(self._closed_channels.items()))
            if oldest.touched >= horizon and self._closed_event_count <= self.max_closed_events:
                return
            del self._closed_channels[name]
            self._closed_event_count -= len(oldest.events)
            self._channels.pop(name, None)


def _notify_listeners(channel: _Channel) -> None:
    for listener in list(channel.listeners):
        loop, wakeup = listener
        try:
            loop.call_soon_threadsafe(wakeup.set)
        except RuntimeError:  # the event loop is closed
            channel.listeners.discard(listener)
