"""Calls that nobody answers, or that the queue has lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
from starlette.testclient import TestClient

from api import engine_calls
from api.engine_calls import Call
from service.errors import Unavailable
from service.jobs.broker import Event
from service.schemas import GenerateRequest
from tests.support.application import PROMPT

TOKEN = Event("1", "token", {"index": 0, "text": "x", "version": 0})
RESTART = Event("2", "restart", {})
END = Event("3", "end", {"choices": []})


class Queue:
    """A queue that tells `events`, each after some silence, and knows a call `known` times."""

    def __init__(self, *events: Event, known: list[bool] | None = None) -> None:
        self.told, self.known = events, known or []
        self.go = asyncio.Event()
        self.cancelled: list[str] = []
        self.down = False

    async def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        await self.go.wait()
        for event in self.told:
            yield event

    def knows(self, channel: str) -> bool:
        if self.down:
            raise Unavailable("the queue does not answer.")
        return self.known.pop(0) if self.known else True

    def cancel(self, channel: str) -> None:
        self.cancelled.append(channel)
        raise Unavailable("the queue does not answer.")


class House:
    """Operations that note how often a call is asked again; with a worker, unless it is `empty`."""

    def __init__(self, queue: Queue, answers_after: int = 1) -> None:
        self.asked: list[tuple[str, str]] = []
        self.empty = False
        self.queue, self.answers_after = queue, answers_after
        self.models = self.calls = self

    def ask_again(self, kind: str, channel: str, request: GenerateRequest) -> None:
        self.asked.append((kind, channel))
        if len(self.asked) == self.answers_after:
            self.queue.go.set()

    def check_attended(self, kind: str) -> None:
        if self.empty:
            raise Unavailable("no worker is alive.")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_calls, "LOOK", 0.01)
    monkeypatch.setattr(engine_calls, "PATIENCE", 0.2)


def heard(house: House) -> list[Event]:
    """What a client hears of a call in this house."""

    async def listen() -> list[Event]:
        async with asyncio.timeout(20):
            call: Any = Call("generate", "c", GenerateRequest(prompt="x"), house, house.queue)  # type: ignore[arg-type]
            async with aclosing(call.events()) as events:
                return [event async for event in events]

    return asyncio.run(listen())


def test_a_lost_call_is_asked_again() -> None:
    """A call that the queue does not know any more, and not only for a moment, is asked again on its channel."""
    house = House(Queue(TOKEN, RESTART, TOKEN, END, known=[True, False, True, False, False]))
    assert heard(house) == [TOKEN, RESTART, TOKEN, END]
    assert house.asked == [("generate", "c")]
    assert house.queue.known == []


def test_a_call_is_not_asked_for_ever() -> None:
    """A queue that loses the same call again and again is given up."""
    house = House(Queue(END, known=[False] * 100), answers_after=99)
    with pytest.raises(Unavailable, match="again and again"):
        heard(house)
    assert len(house.asked) == engine_calls.AGAIN


def test_nobody_is_there() -> None:
    """After a long silence a call ends when nobody is there who could answer, and goes on when somebody is."""
    house = House(Queue(END))
    house.empty = True
    with pytest.raises(Unavailable, match="no worker is alive"):
        heard(house)


def test_a_queue_that_is_down_is_waited_for() -> None:
    """While the queue does not answer nothing is known to be lost: its events say when it stays away."""
    house = House(Queue(END))
    house.queue.down = True

    def patient(kind: str) -> None:
        house.queue.go.set()

    house.check_attended = patient  # type: ignore[method-assign]
    assert heard(house) == [END]
    assert house.asked == []


def test_a_held_answer_outlives_the_queue(client: TestClient, house: Any) -> None:
    """A client whose request was lost by the queue before any worker saw it gets its answer."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/generate", json={"prompt": PROMPT})
        (lost,) = house.broker.take(["generate"], 1, 10)
        house.broker.done(lost)
        house.hire()
        assert answer.result(20).json()["text"] == " Paris"


def test_hanging_up_never_fails() -> None:
    """Whoever goes while the queue is down goes quietly."""
    house = House(Queue())
    call: Any = Call("generate", "c", GenerateRequest(prompt="x"), house, house.queue)  # type: ignore[arg-type]
    asyncio.run(call.hang_up())
    assert house.queue.cancelled == ["c"]
