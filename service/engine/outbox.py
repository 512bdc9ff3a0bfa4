"""What a loop has to tell the broker and the desk: owed in order, and paid as soon as they answer.

When the other side is down a payment raises and all of it stays owed. A refusal is final, and so is an error that nobody
foresaw: a debt that can never be paid must not stand before all others for ever.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from service.errors import PalimpsestError, Unavailable
from service.jobs.broker import Broker, OutgoingEvent

log = logging.getLogger(__name__)


class Outbox:
    """Messages and actions. Messages that follow each other are told in one go."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._items: deque[OutgoingEvent | Callable[[], object]] = deque()

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        """A message to publish."""
        self._items.append(OutgoingEvent(channel, name, data, last))

    def defer(self, action: Callable[..., object], *arguments: object) -> None:
        """Anything else to do, after what was owed before."""
        self._items.append(partial(action, *arguments))

    def flush(self) -> None:
        """Do all of it. Raises, and keeps what is left, when the other side is down."""
        while self._items:
            first = self._items[0]
            messages = self._leading_messages()
            try:
                first() if callable(first) else self._broker.publish_all(messages)
            except (Unavailable, OSError):
                raise
            except PalimpsestError as error:
                log.warning("refused", extra={"detail": error.detail})
            except Exception:
                log.exception("could not be told")
            for _ in range(max(1, len(messages))):
                self._items.popleft()

    def _leading_messages(self) -> list[OutgoingEvent]:
        """Those that stand first."""
        messages: list[OutgoingEvent] = []
        for item in self._items:
            if not isinstance(item, OutgoingEvent):
                break
            messages.append(item)
        return messages
