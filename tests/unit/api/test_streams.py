"""Server-sent events and client disconnects, tested over a real socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest

from service.jobs.broker import Event
from tests.support.application import PROMPT, TOWER, FakeWorker, TestApp
from tests.support.local_server import wait_until


def parse_events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Yield the events of a stream without its comments."""
    event: dict[str, str] = {}
    for line in lines:
        if not line and event:
            yield event
            event = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


def test_a_job_stream_has_progress_and_an_end(http_client: httpx.Client, worker: FakeWorker) -> None:
    """The event stream of an edit has progress events with increasing ids, then `end` with the resource."""
    worker.may_finish.clear()
    edit = http_client.post("/edits", json=TOWER).json()
    with http_client.stream("GET", edit["links"]["events"]) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        received = []
        for event in parse_events(answer.iter_lines()):
            received.append(event)
            worker.may_finish.set()
    assert [event["event"] for event in received] == ["progress", "progress", "end"]
    ids = [int(event["id"]) for event in received]
    assert ids == sorted(set(ids))
    assert json.loads(received[-1]["data"]) == http_client.get(edit["links"]["self"]).json()


def test_a_stream_resumes_after_the_last_event(http_client: httpx.Client, worker: FakeWorker) -> None:
    """With Last-Event-ID the stream continues after that event."""
    worker.may_finish.clear()
    edit = http_client.post("/edits", json=TOWER).json()
    with http_client.stream("GET", edit["links"]["events"]) as answer:
        first = next(parse_events(answer.iter_lines()))
    resume_headers = {"last-event-id": first["id"]}
    with http_client.stream("GET", edit["links"]["events"], headers=resume_headers) as answer:
        worker.may_finish.set()
        rest = list(parse_events(answer.iter_lines()))
    assert [event["event"] for event in rest] == ["progress", "end"]
    assert json.loads(rest[0]["data"])["done"] == 2


@pytest.mark.parametrize("odd", ["", "x", "-1", "9" * 500, "1; drop"])
def test_an_invalid_last_event_id_is_ignored(http_client: httpx.Client, worker: FakeWorker, odd: str) -> None:
    """A malformed Last-Event-ID is ignored, and the stream still has the `end` event."""
    edit = http_client.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()
    answer = http_client.get(edit["links"]["events"], headers={"last-event-id": odd})
    assert list(parse_events(iter([*answer.text.splitlines(), ""])))[-1]["event"] == "end"


def test_a_finished_job_streams_its_end_at_once(http_client: httpx.Client, test_app: TestApp) -> None:
    """A job whose channel no longer exists streams its `end` event from its row."""
    edit = http_client.post("/edits", json=TOWER).json()
    http_client.delete(edit["links"]["self"])
    test_app.broker.delete_channel(edit["id"])  # as after a restart of the API
    answer = http_client.get(edit["links"]["events"])
    (end,) = parse_events(iter([*answer.text.splitlines(), ""]))
    assert end["event"] == "end"
    assert json.loads(end["data"])["status"] == "cancelled"


def test_silence_is_filled_with_comments(http_client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle stream sends comments as keep-alive."""
    from api import sse as events

    monkeypatch.setattr(events, "KEEPALIVE_INTERVAL", 0.05)
    edit = http_client.post("/edits", json=TOWER).json()
    with http_client.stream("GET", edit["links"]["events"]) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(5)] == [": open", "", ": ping", "", ": ping"]


def test_a_client_disconnect_cancels_a_stream(
    http_client: httpx.Client, test_app: TestApp, worker: FakeWorker
) -> None:
    """A client that disconnects cancels its streamed generation."""
    worker.may_finish.clear()
    with http_client.stream("POST", "/generate", json={"prompt": PROMPT, "stream": True}) as answer:
        events = parse_events(answer.iter_lines())  # kept referenced: garbage collection closes the stream
        assert next(events)["event"] == "token"
        assert not test_app.broker.cancelled(worker.channels[0])
    wait_until(lambda: test_app.broker.cancelled(worker.channels[0]))


def test_a_client_disconnect_cancels_a_generation(
    http_client: httpx.Client, test_app: TestApp, worker: FakeWorker
) -> None:
    """A client that disconnects before the response cancels its generation."""

    def called_more_than(count: int) -> bool:
        return len(worker.channels) > count

    for path in ("/generate", "/compare"):
        worker.may_finish.clear()
        count = len(worker.channels)
        with open_request(http_client, path, {"prompt": PROMPT}):
            wait_until(partial(called_more_than, count))
            assert not test_app.broker.cancelled(worker.channels[count])
        wait_until(partial(test_app.broker.cancelled, worker.channels[count]))
        worker.may_finish.set()


@contextmanager
def open_request(http_client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[None]:
    """Send a POST, and disconnect on exit without reading the response."""
    request = http_client.build_request("POST", path, json=body)
    head = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + request.content)
        yield


def test_an_answered_call_is_not_cancelled(
    http_client: httpx.Client, test_app: TestApp, worker: FakeWorker
) -> None:
    """A call whose response was sent is not cancelled."""
    http_client.post("/generate", json={"prompt": PROMPT})
    assert not test_app.broker.cancelled(worker.channels[0])


def test_waiting_requests_use_no_threads(
    http_client: httpx.Client, test_app: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests can wait than the thread pool has threads, and other requests are still answered."""
    edit = http_client.post("/edits", json=TOWER).json()
    statuses: list[int] = []
    listening: list[str] = []
    events = test_app.broker.events

    def record_and_subscribe(channel: str, after: str | None = None) -> AsyncIterator[Event]:
        listening.append(channel)
        return events(channel, after)

    monkeypatch.setattr(test_app.broker, "events", record_and_subscribe)

    def wait_for_edit() -> None:
        answer = httpx.get(
            f"{http_client.base_url}{edit['links']['self']}", headers={"prefer": "wait=30"}, timeout=40
        )
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=wait_for_edit) for _ in range(60)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(listening) == 60)
    assert http_client.get("/models").status_code == 200
    assert http_client.delete(edit["links"]["self"]).json()["status"] == "cancelled"
    for thread in threads:
        thread.join(20)
    assert statuses == [200] * 60
