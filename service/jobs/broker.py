"""How work and news travel between the doors and the workers: the interface, whatever carries it.

The row in the store is the truth and the broker only rings the bell: losing a bell costs time, never a job.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: every kind of work, most urgent first
KINDS = ("generate", "compare", "edit", "trace", "evaluation")


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


class Broker(Protocol):
    def announce(self, job_id: str, kind: str) -> None:
        """Ring the bell for a job that is a committed row. Ringing again while it waits changes nothing."""

    def call(self, kind: str, payload: dict[str, Any]) -> str:
        """Ask for a generation or a comparison: the message is the whole request. Returns its channel."""

    def take(self, kinds: Sequence[str], limit: int, timeout: float) -> list[Delivery]:
        """Up to `limit` deliveries of one kind, the first of `kinds` that has any, oldest first.

        Waits at most `timeout` seconds for the first one (0: not at all) and returns nothing after `wake`.
        """

    def done(self, delivery: Delivery) -> None:
        """The delivery is dealt with."""

    def give_back(self, delivery: Delivery) -> None:
        """The delivery was not begun: it waits again, before all others of its kind."""

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        """Tell the listeners of a channel; `last` closes it, and what is published after that is dropped."""

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        """The kept events after that id, then the live ones; ends after the last.

        A channel that nobody has published on is listened to until somebody does. A channel keeps only its
        newest events, so the last one must say everything that a late listener needs.
        """

    def cancel(self, channel: str) -> None:
        """Ask whoever works for this channel to stop."""

    def cancelled(self, channel: str) -> bool:
        """Whether `cancel` was called for this channel."""

    def wake(self) -> None:
        """Make one `take`, waiting now or called next, return at once."""

    def waiting(self, kind: str) -> int:
        """How many deliveries of this kind wait to be taken."""

    def close(self) -> None:
        """End every `take` and every `events`."""
