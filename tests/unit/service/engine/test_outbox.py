"""What is owed is told in order, once, whatever is down meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from service.engine.outbox import Owed
from service.errors import Conflict, Unavailable
from service.jobs.broker import Message


class Broker:
    """Keeps what is published; `down` times it does not answer."""

    def __init__(self) -> None:
        self.down = 0
        self.told: list[list[str]] = []

    def publish_all(self, messages: Sequence[Message]) -> None:
        if self.down:
            self.down -= 1
            raise Unavailable("the queue does not answer.")
        self.told.append([message.name for message in messages])


def test_messages_between_actions_go_together() -> None:
    """Messages that follow each other are one publication, and actions keep their place between them."""
    broker = Broker()
    owed = Owed(broker)  # type: ignore[arg-type]
    owed.tell("a", "1", {})
    owed.tell("b", "2", {}, last=True)
    owed.owe(lambda: broker.told.append(["action"]))
    owed.tell("a", "3", {})
    owed.pay()
    owed.pay()
    assert broker.told == [["1", "2"], ["action"], ["3"]]


def test_an_outage_keeps_all_that_is_owed() -> None:
    """While the other side is down paying raises; afterwards everything is told, in order and once."""
    broker = Broker()
    owed = Owed(broker)  # type: ignore[arg-type]
    broker.down = 2
    owed.tell("a", "1", {})
    owed.owe(lambda: broker.told.append(["action"]))
    for _ in range(2):
        with pytest.raises(Unavailable):
            owed.pay()
    owed.pay()
    assert broker.told == [["1"], ["action"]]


@pytest.mark.parametrize("error", [Conflict("too late."), ValueError("not foreseen")])
def test_a_debt_that_cannot_be_paid_is_written_off(error: Exception) -> None:
    """A refusal, and an error that nobody foresaw, do not stand before what is owed after them."""

    def fails() -> None:
        raise error

    broker = Broker()
    owed = Owed(broker)  # type: ignore[arg-type]
    owed.owe(fails)
    owed.tell("a", "1", {})
    owed.pay()
    assert broker.told == [["1"]]
