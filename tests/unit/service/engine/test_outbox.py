"""The outbox publishes messages and runs actions in order and once, also after an outage:
service.engine.outbox."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from service.engine.outbox import Outbox
from service.errors import Conflict, Unavailable
from service.jobs.broker import OutgoingEvent


class FakeBroker:
    """A broker that records publications. It raises Unavailable in the next `down` calls."""

    def __init__(self) -> None:
        self.down = 0
        self.published: list[list[str]] = []

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        if self.down:
            self.down -= 1
            raise Unavailable("the queue does not answer.")
        self.published.append([message.name for message in messages])


def test_messages_between_actions_go_together() -> None:
    """Consecutive messages are one publication, and actions keep their place between messages."""
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
    """During an outage `flush` raises Unavailable; afterwards all items are processed in order and once."""
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
    """An item that raises an error other than Unavailable is dropped, and the items after it are
    processed."""

    def fails() -> None:
        raise error

    broker = FakeBroker()
    outbox = Outbox(broker)  # type: ignore[arg-type]
    outbox.defer(fails)
    outbox.publish("a", "1", {})
    outbox.flush()
    assert broker.published == [["1"]]
