"""Calls without a worker, and calls that the broker has lost: api.engine_calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
from starlette.testclient import TestClient

from api import engine_calls
from api.engine_calls import EngineCall
from service.application.caller import Caller
from service.errors import Unavailable
from service.jobs.broker import Event
from service.schemas import GenerateRequest
from tests.support.application import PROMPT, TestApp

TOKEN = Event("1", "token", {"index": 0, "text": "x", "version": 0})
RESTART = Event("2", "reset", {})
END = Event("3", "end", {"choices": []})


class FakeBroker:
    """A broker that sends `events` once `may_send` is set, and answers `is_pending` from a list."""

    def __init__(self, *events: Event, is_pending_replies: list[bool] | None = None) -> None:
        self.pending_events, self.is_pending_replies = events, is_pending_replies or []
        self.may_send = asyncio.Event()
        self.cancelled: list[str] = []
        self.down = False

    async def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        await self.may_send.wait()
        for event in self.pending_events:
            yield event

    def is_pending(self, channel: str) -> bool:
        if self.down:
            raise Unavailable("the queue does not answer.")
        return self.is_pending_replies.pop(0) if self.is_pending_replies else True

    def cancel(self, channel: str) -> None:
        self.cancelled.append(channel)
        raise Unavailable("the queue does not answer.")


class FakeServices:
    """Services that count resubmissions and let the broker send its events after `answers_after` of them."""

    def __init__(self, broker: FakeBroker, answers_after: int = 1) -> None:
        self.resubmitted: list[tuple[str, str]] = []
        self.no_worker = False
        self.broker, self.answers_after = broker, answers_after
        self.models = self.generation = self

    def resubmit(self, kind: str, channel: str, request: GenerateRequest, caller: Caller) -> None:
        self.resubmitted.append((kind, channel))
        if len(self.resubmitted) == self.answers_after:
            self.broker.may_send.set()

    def require_worker_for(self, kind: str) -> None:
        if self.no_worker:
            raise Unavailable("no worker is alive.")


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_calls, "SILENCE_CHECK_INTERVAL", 0.01)
    monkeypatch.setattr(engine_calls, "WORKER_CHECK_INTERVAL", 0.2)


def new_call(services: Any) -> EngineCall:
    return EngineCall(
        "generate", "c", GenerateRequest(prompt="x"), services, services.broker, Caller("local")
    )


def collect_call_events(services: FakeServices) -> list[Event]:
    """Return the events that a client receives for a call."""

    async def listen() -> list[Event]:
        async with asyncio.timeout(20):
            call = new_call(services)
            async with aclosing(call.events()) as events:
                return [event async for event in events]

    return asyncio.run(listen())


def test_a_lost_call_is_resubmitted() -> None:
    """A call that the broker has lost is resubmitted on its channel."""
    services = FakeServices(
        FakeBroker(TOKEN, RESTART, TOKEN, END, is_pending_replies=[True, False, True, False, False])
    )
    assert collect_call_events(services) == [TOKEN, RESTART, TOKEN, END]
    assert services.resubmitted == [("generate", "c")]
    assert services.broker.is_pending_replies == []


def test_resubmissions_are_limited() -> None:
    """A call that the broker loses repeatedly fails after `MAX_RESUBMISSIONS` resubmissions."""
    services = FakeServices(FakeBroker(END, is_pending_replies=[False] * 100), answers_after=99)
    with pytest.raises(Unavailable, match="repeatedly"):
        collect_call_events(services)
    assert len(services.resubmitted) == engine_calls.MAX_RESUBMISSIONS


def test_a_call_fails_without_an_alive_worker() -> None:
    """A call without events fails if no worker is alive."""
    services = FakeServices(FakeBroker(END))
    services.no_worker = True
    with pytest.raises(Unavailable, match="no worker is alive"):
        collect_call_events(services)


def test_a_queue_that_is_down_is_waited_for() -> None:
    """While the broker is unavailable, a call is not treated as lost and is not resubmitted."""
    services = FakeServices(FakeBroker(END))
    services.broker.down = True

    def patient(kind: str) -> None:
        services.broker.may_send.set()

    services.require_worker_for = patient  # type: ignore[method-assign]
    assert collect_call_events(services) == [END]
    assert services.resubmitted == []


def test_a_waiting_request_survives_a_lost_call(client: TestClient, test_app: TestApp) -> None:
    """A request whose call the broker lost before any worker received it is resubmitted and answered."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/generate", json={"prompt": PROMPT})
        (lost,) = test_app.broker.receive(["generate"], 1, 10)
        test_app.broker.ack(lost)
        test_app.start_fake_worker()
        assert answer.result(20).json()["text"] == " Paris"


def test_cancel_ignores_a_broker_outage() -> None:
    """Cancelling a call raises no error while the broker is unavailable."""
    services = FakeServices(FakeBroker())
    call = new_call(services)
    asyncio.run(call.cancel())
    assert services.broker.cancelled == ["c"]
