"""What is owed is told in order, once, whatever is down meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from service.engine.outbox import Outbox
from service.errors import Conflict, Unavailable
from service.jobs.broker import OutgoingEvent


class FakeBroker:
    """Keeps what is published; `down` times it does not answer."""

    def __init__(self) -> None:
        self.down = 0
        self.published: list[list[str]] = []

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        if self.down:
            self.down -= 1
            raise Unavailable("the queue does not answer.")
        self.published.append([message.name for message in messages])


def test_messages_between_actions_go_together() -> None:
    """Messages that follow each other are one publication, and actions keep their place between them."""
    broker = FakeBroker()
    outbox = Outbox(broker)  # type: ignore[arg-type]
    outbox.publish("a", "1", {})
    outbox.publish("b", "2", {}, last=True)
    outbox.defer(lambda: broker.published.append(["action"]))
    outbox.publish("a", "3", {})
    outbox.flush()
    outbox.flush()
    assert broker.published == [["1", "2"], ["action"], ["3"]]


def test_outage_keeps_all_items() -> None:
    """While the other side is down paying raises; afterwards everything is told, in order and once."""
    broker = FakeBroker()
    outbox = Outbox(broker)  # type: ignore[arg-type]
    broker.down = 2
    outbox.publish("a", "1", {})
    outbox.defer(lambda: broker.published.append(["action"]))
    for _ in range(2):
        with pytest.raises(Unavailable):
            outbox.flush()
    outbox.flush()
    assert broker.published == [["1"], ["action"]]


@pytest.mark.parametrize("error", [Conflict("too late."), ValueError("not foreseen")])
def test_item_that_fails_permanently_is_dropped(error: Exception) -> None:
    """A refusal, and an error that nobody foresaw, do not stand before what is owed after them."""

    def fails() -> None:
        raise error

    broker = FakeBroker()
    outbox = Outbox(broker)  # type: ignore[arg-type]
    outbox.defer(fails)
    outbox.publish("a", "1", {})
    outbox.flush()
    assert broker.published == [["1"]]
