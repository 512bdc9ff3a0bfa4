"""The events and actions that the engine owes the broker and the job store, delivered in order.

When the other side is down, a delivery raises and stays first in the queue. An item that is rejected, or that fails
with an unexpected error, is dropped: it must not block the items behind it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from service.errors import PalimpsestError, Unavailable
from service.jobs.broker import Broker, Delivery, OutgoingEvent
from service.kit import crash_points

log = logging.getLogger(__name__)


class Outbox:
    """A queue of events and actions. Consecutive events are published together."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._items: deque[OutgoingEvent | Callable[[], object]] = deque()

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        """Add an event."""
        self._items.append(OutgoingEvent(channel, name, data, last))

    def defer(self, action: Callable[..., object], *arguments: object) -> None:
        """Add an action."""
        self._items.append(partial(action, *arguments))

    def acknowledge(self, delivery: Delivery, crash_point: str = "") -> None:
        """Add the acknowledgement of a delivery, after the named crash point if there is one."""
        if crash_point:
            self.defer(crash_points.crash_point, crash_point)
        self.defer(self._broker.ack, delivery)
        self.defer(crash_points.crash_point, "done.after")

    def flush(self) -> None:
        """Deliver all items. Raises, and keeps the rest, when the other side is down."""
        while self._items:
            first = self._items[0]
            events = self._leading_events()
            try:
                first() if callable(first) else self._broker.publish_all(events)
            except (Unavailable, OSError):
                raise
            except PalimpsestError as error:
                log.warning("outbox item rejected", extra={"detail": error.detail})
            except Exception:
                log.exception("outbox item dropped")
            for _ in range(max(1, len(events))):
                self._items.popleft()

    def _leading_events(self) -> list[OutgoingEvent]:
        """Return the events that no action precedes."""
        events: list[OutgoingEvent] = []
        for item in self._items:
            if not isinstance(item, OutgoingEvent):
                break
            events.append(item)
        return events
