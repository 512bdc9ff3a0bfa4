"""How work and news travel between the doors and the workers: the interface, whatever carries it.

The row in the store is the truth and the broker only rings the bell: losing a bell costs time, never a job.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.errors import Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """News on a channel. Ids are decimal strings that grow, also across restarts."""

    id: str
    name: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Delivery:
    """Work handed to one worker, which owes a `done` or a `give_back`.

    `job_id` is the row of an announced job, or the channel of a call; `payload` is a call's whole request.
    """

    id: str
    kind: str
    job_id: str
    payload: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""  #: of the HTTP request behind a call; that of a job is in its row
    deliveries: int = 1  #: how often it was handed out, this time included: more than once when workers died


@dataclass(frozen=True)
class OutgoingEvent:
    """One thing to publish."""

    channel: str
    name: str
    data: dict[str, Any]
    last: bool = False


class Broker(Protocol):
    def notify(self, job_id: str, kind: str) -> None:
        """Ring the bell for a job that is a committed row. Ringing again while it waits changes nothing."""

    def send_call(
        self, kind: str, payload: dict[str, Any], request_id: str = "", channel: str | None = None
    ) -> str:
        """Ask for a generation or a comparison: the message is the whole request. Returns its channel.

        With a `channel` the same call is asked again, because the broker lost it (`knows` says so).
        """

    def is_pending(self, channel: str) -> bool:
        """Whether a call waits or is worked on. False once it has ended, or when the broker has lost it."""

    def receive(self, kinds: Sequence[str], limit: int, timeout: float) -> list[Delivery]:
        """Up to `limit` deliveries of one kind, the first of `kinds` that has any, oldest first.

        Waits at most `timeout` seconds for the first one (0: not at all) and returns nothing after `wake`.
        """

    def holds_lease(self, delivery: Delivery) -> bool:
        """Whether the delivery is still this worker's: not once its lease ran out and another may have it.

        What this broker publishes on the channel of a call that it no longer owns is dropped.
        """

    def ack(self, delivery: Delivery) -> None:
        """The delivery is dealt with. Harmless when it is no longer owned."""

    def nack(self, delivery: Delivery) -> None:
        """The delivery was not begun: it waits again, before all others of its kind but those that came back earlier.
        Harmless when not owned."""

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        """Tell the listeners of a channel; `last` closes it, and what is published after that is dropped."""

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        """Publish several things in order, in one go where that is faster."""

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        """The kept events after that id, then the live ones; ends after the last.

        A channel that nobody has published on is listened to until somebody does. A channel keeps only its
        newest events, so the last one must say everything that a late listener needs.

        When a call was taken over from a worker that died after it had spoken, an event "restart" comes first: what
        was heard before it is void, and the whole answer follows.
        """

    def delete_channel(self, channel: str) -> None:
        """Drop all that was said on a channel, its end and its cancel: a job that is tried again speaks anew."""

    def cancel(self, channel: str) -> None:
        """Ask whoever works for this channel to stop."""

    def cancelled(self, channel: str) -> bool:
        """Whether `cancel` was called for this channel."""

    def wake(self) -> None:
        """Make one `take`, waiting now or called next, return at once."""

    def queue_depth(self, kind: str) -> int:
        """How many deliveries of this kind wait to be taken."""

    def oldest_age(self, kind: str) -> float:
        """For how many seconds the oldest of them has waited; 0 when none does."""

    def close(self) -> None:
        """End every `take` and every `events`."""


@contextmanager
def ignoring_broker_outage(job_id: str) -> Iterator[None]:
    """News after a commit are never a reason to fail: whoever misses them reads the row, and a sweep rings again."""
    try:
        yield
    except Unavailable as error:
        log.warning("news lost", extra={"job": job_id, "detail": error.detail})
