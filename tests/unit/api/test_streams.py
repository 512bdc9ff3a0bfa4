"""Server-sent events and hanging up, over a real socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from service.jobs.broker import Event
from tests.support.application import PROMPT, TOWER, FakeWorker, House
from tests.support.local_server import until


def parse(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Events of a stream; comments are passed over."""
    event: dict[str, str] = {}
    for line in lines:
        if not line and event:
            yield event
            event = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


def test_a_job_tells_its_progress_and_its_end(served: httpx.Client, worker: FakeWorker) -> None:
    """The events of an edit are its progress with growing ids, then the end with the resource, and then no more."""
    worker.go.clear()
    edit = served.post("/edits", json=TOWER).json()
    with served.stream("GET", edit["links"]["events"]) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        heard = []
        for event in parse(answer.iter_lines()):
            heard.append(event)
            worker.go.set()
    assert [event["event"] for event in heard] == ["progress", "progress", "end"]
    ids = [int(event["id"]) for event in heard]
    assert ids == sorted(set(ids))
    assert json.loads(heard[-1]["data"]) == served.get(edit["links"]["self"]).json()


def test_a_stream_resumes_after_the_last_event(served: httpx.Client, worker: FakeWorker) -> None:
    """With Last-Event-ID what was heard is not told again, and nothing after it is lost."""
    worker.go.clear()
    edit = served.post("/edits", json=TOWER).json()
    with served.stream("GET", edit["links"]["events"]) as answer:
        first = next(parse(answer.iter_lines()))
    seen = {"last-event-id": first["id"]}
    with served.stream("GET", edit["links"]["events"], headers=seen) as answer:
        worker.go.set()
        rest = list(parse(answer.iter_lines()))
    assert [event["event"] for event in rest] == ["progress", "end"]
    assert json.loads(rest[0]["data"])["done"] == 2


@pytest.mark.parametrize("odd", ["", "x", "-1", "9" * 500, "1; drop"])
def test_a_strange_event_id_is_ignored(served: httpx.Client, worker: FakeWorker, odd: str) -> None:
    """A Last-Event-ID that cannot be one is ignored: the stream is told from its beginning."""
    edit = served.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()
    answer = served.get(edit["links"]["events"], headers={"last-event-id": odd})
    assert list(parse(iter([*answer.text.splitlines(), ""])))[-1]["event"] == "end"


def test_an_end_long_ago_is_told_at_once(served: httpx.Client, house: House) -> None:
    """A job that ended before this process began to listen tells its end from its row."""
    edit = served.post("/edits", json=TOWER).json()
    served.delete(edit["links"]["self"])
    house.broker.forget(edit["id"])  # as after a restart
    answer = served.get(edit["links"]["events"])
    (end,) = parse(iter([*answer.text.splitlines(), ""]))
    assert end["event"] == "end"
    assert json.loads(end["data"])["status"] == "cancelled"


def test_silence_is_filled_with_comments(served: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has nothing to say sends a comment now and then, so that nobody drops it."""
    from api import sse as events

    monkeypatch.setattr(events, "PING", 0.05)
    edit = served.post("/edits", json=TOWER).json()
    with served.stream("GET", edit["links"]["events"]) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(5)] == [": open", "", ": ping", "", ": ping"]


def test_hanging_up_ends_a_stream(served: httpx.Client, house: House, worker: FakeWorker) -> None:
    """When the client of a streamed generation goes, the worker is told to stop."""
    worker.go.clear()
    with served.stream("POST", "/generate", json={"prompt": PROMPT, "stream": True}) as answer:
        events = parse(answer.iter_lines())  # held: a reader that is dropped hangs up by itself
        assert next(events)["event"] == "token"
        assert not house.broker.cancelled(worker.channels[0])
    until(lambda: house.broker.cancelled(worker.channels[0]))


def test_hanging_up_ends_a_generation(served: httpx.Client, house: House, worker: FakeWorker) -> None:
    """When the client of a generation goes before its answer, the worker is told to stop."""
    for path in ("/generate", "/compare"):
        worker.go.clear()
        count = len(worker.channels)
        with asked(served, path, {"prompt": PROMPT}):
            until(lambda count=count: len(worker.channels) > count)
            assert not house.broker.cancelled(worker.channels[count])
        until(lambda count=count: house.broker.cancelled(worker.channels[count]))
        worker.go.set()


@contextmanager
def asked(served: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[None]:
    """Meanwhile a client waits for the answer to a POST. It goes at the end: it was heard by then, however busy we are."""
    request = served.build_request("POST", path, json=body)
    head = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + request.content)
        yield


def test_an_answered_call_is_not_cancelled(served: httpx.Client, house: House, worker: FakeWorker) -> None:
    """A call that was answered leaves nothing to cancel behind."""
    served.post("/generate", json={"prompt": PROMPT})
    assert not house.broker.cancelled(worker.channels[0])


def test_held_answers_hold_no_threads(
    served: httpx.Client, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More answers can be held than the pool has threads, and others are answered meanwhile."""
    edit = served.post("/edits", json=TOWER).json()
    held: list[int] = []
    listening: list[str] = []
    events = house.broker.events

    def listened(channel: str, after: str | None = None) -> AsyncIterator[Event]:
        listening.append(channel)
        return events(channel, after)

    monkeypatch.setattr(house.broker, "events", listened)

    def hold() -> None:
        answer = httpx.get(
            f"{served.base_url}{edit['links']['self']}", headers={"prefer": "wait=30"}, timeout=40
        )
        held.append(answer.status_code)

    threads = [threading.Thread(target=hold) for _ in range(60)]
    for thread in threads:
        thread.start()
    until(lambda: len(listening) == 60)
    assert served.get("/models").status_code == 200
    assert served.delete(edit["links"]["self"]).json()["status"] == "cancelled"
    for thread in threads:
        thread.join(20)
    assert held == [200] * 60
