"""The interface of a broker: it carries notifications of jobs, calls, and events between the API and the workers.

A job is a row in the database, which is authoritative: the broker only delivers the job's id, and a lost notification
costs time, never a job. A call has no row: its message is the whole request, and the broker leases it to a worker.

Waiting work of one kind is fair between callers (`service/kit/fair_queue.py`). A caller is the actor that submitted it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.errors import Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """An event on a channel. Ids are decimal strings that increase, also across restarts."""

    id: str
    name: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Delivery:
    """A unit of work that one worker received.

    A call is leased to the worker until `ack` or `nack`. A job is only named: its id has left the queue, and the worker
    claims the row in SQL.
    """

    id: str
    kind: str
    job_id: str  #: the id of a job's row, or the channel of a call
    payload: dict[str, Any] = field(default_factory=dict)  #: the whole request of a call
    request_id: str = ""  #: of the HTTP request behind a call; that of a job is in its row
    deliveries: int = 1  #: deliveries of a call including this one; more than 1 when workers died
    caller: str = ""
    position: float = 0.0  #: in the queue of its kind
    cost: float = 1.0  #: of a call, see `Broker.send_call`


@dataclass(frozen=True)
class OutgoingEvent:
    """An event to publish; `last` closes its channel."""

    channel: str
    name: str
    data: dict[str, Any]
    last: bool = False


@dataclass(frozen=True)
class CallerFilter:
    """Whose work is received."""

    excluded: Mapping[str, Collection[str]] = field(default_factory=dict)  #: callers by kind of work
    only: str | None = None  #: a caller


EVERYONE = CallerFilter()


class Broker(Protocol):
    def notify(self, job_id: str, kind: str, caller: str = "", cost: float = 1.0) -> None:
        """Queue the id of a job whose row is committed. Has no effect while the id waits.

        `cost` is the service that the job needs, divided by the weight of its caller.
        """

    def send_call(
        self,
        kind: str,
        payload: dict[str, Any],
        request_id: str = "",
        channel: str | None = None,
        caller: str = "",
        cost: float = 1.0,
    ) -> str:
        """Queue a generation or a comparison and return its channel.

        `cost` is the number of its tokens, divided by the weight of its caller.

        With a `channel` the same call is sent again after the broker lost it, which `is_pending` shows. This has no
        effect on a call that waits, is leased or has ended.
        """

    def is_pending(self, channel: str) -> bool:
        """Return whether a call waits or is leased. False once it has ended or when the broker has lost it."""

    def receive(
        self, kinds: Sequence[str], limit: int, timeout: float, callers: CallerFilter = EVERYONE
    ) -> list[Delivery]:
        """Return up to `limit` deliveries of one kind, the first of `kinds` with any, in the order that is fair.

        Waits at most `timeout` seconds for the first one (0: not at all). Returns an empty list after `wake`.
        """

    def holds_lease(self, delivery: Delivery) -> bool:
        """Return whether this broker still holds the lease of a call.

        A lease is lost when it expires and another worker may have received the call. Events that this broker
        publishes on the channel of a call whose lease it lost are dropped.
        """

    def ack(self, delivery: Delivery) -> None:
        """Remove a call that was answered. Has no effect when the lease is lost, or on a job."""

    def nack(self, delivery: Delivery) -> None:
        """Return a delivery that was not begun: it waits again, in its old place.

        Has no effect on a call whose lease is lost.
        """

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        """Append an event to a channel; `last` closes it, and later events are dropped."""

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        """Append events in order, in one round trip where possible."""

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        """Yield the stored events after that id, then new ones; end after the last event.

        A channel stores only its newest events, so the last event must be complete by itself.

        An event "reset" precedes the events of a worker that took a call over after another had published: the events
        before it are void, and the whole answer follows.
        """

    def delete_channel(self, channel: str) -> None:
        """Delete the events of a channel, its end and its cancellation, so that it can be used again for a retry."""

    def cancel(self, channel: str) -> None:
        """Request that the work for this channel stops."""

    def cancelled(self, channel: str) -> bool:
        """Return whether `cancel` was called for this channel. The answer may be some milliseconds old."""

    def wake(self) -> None:
        """Make one `receive`, blocked now or called next, return at once."""

    def queue_depth(self, kind: str, caller: str | None = None) -> int:
        """Return the number of deliveries of this kind that wait, of one caller or of all."""

    def oldest_age(self, kind: str) -> float:
        """Return the seconds for which the oldest of them has waited; 0 when none waits."""

    def close(self) -> None:
        """End every `receive` and every `events`."""


@contextmanager
def ignoring_broker_outage(job_id: str) -> Iterator[None]:
    """Log Unavailable instead of raising it, for events and notifications after a commit.

    The row holds the state that a client missed, and the sweep repeats a lost notification.
    """
    try:
        yield
    except Unavailable as error:
        log.warning("event publish failed", extra={"job": job_id, "detail": error.detail})
