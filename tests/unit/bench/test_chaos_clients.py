"""The clients of the chaos bench retry as documented and record responses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import httpx
import pytest

from bench import chaos_clients as load
from bench.chaos_clients import ChaosClient
from bench.chaos_plan import ClientAction
from bench.client_log import ClientLog, TokenEvent

Handler = Callable[[httpx.Request], httpx.Response]
GENERATE = {"prompt": "The Louvre is in", "max_new_tokens": 3}
ENDED = {"version": 1, "choices": [{"text": " Tempe"}]}


@pytest.fixture(autouse=True)
def _no_retry_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RETRY_PAUSE", 0.0)


def run_client(handler: Handler, *actions: ClientAction, retry_timeout: float = 30.0) -> ClientLog:
    """Return the log of a client whose requests `handler` answers."""
    log = ClientLog()
    client = ChaosClient(
        "asker", iter(actions), ["http://one", "http://two"], log, threading.Event(), retry_timeout
    )
    client._http = httpx.Client(transport=httpx.MockTransport(handler), base_url="http://one")
    client.run()
    return log


def respond_with(*answers: httpx.Response | Exception) -> Handler:
    """Return a handler that gives one response after another."""
    remaining: Iterator[httpx.Response | Exception] = iter(answers)

    def handle(_: httpx.Request) -> httpx.Response:
        answer = next(remaining)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return handle


def sse(*events: tuple[str, str]) -> httpx.Response:
    text = "".join(f"event: {name}\ndata: {data}\n\n" for name, data in events)
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def test_retries_with_the_same_key() -> None:
    """After a timeout, a broken connection, a 429 and a 503, the client sends the request to the next API."""
    requests: list[tuple[str, str]] = []
    edit = {"id": "edit_1", "status": "queued"}
    respond = respond_with(
        httpx.ReadTimeout("silent"),
        httpx.ReadError("cut"),
        httpx.Response(429),
        httpx.Response(503),
        httpx.Response(202, json=edit),
    )

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append((request.url.host, request.headers["Idempotency-Key"]))
        return respond(request)

    log = run_client(handle, ClientAction(0, "edit", {}, wait_mode=""))
    assert requests == [(host, "asker-0") for host in ("one", "two", "one", "two", "one")]
    assert [a.outcome for a in log.attempts] == ["timeout", "connection broken", "429", "503", "200"]
    assert log.ids_by_key == {"asker-0": {"edit_1"}}


def test_4xx_is_final() -> None:
    """A 422 is recorded and not retried."""
    log = run_client(respond_with(httpx.Response(422)), ClientAction(0, "edit", {}))
    assert [a.outcome for a in log.attempts] == ["422"]
    assert not log.ids_by_key


def test_gives_up_after_retry_timeout() -> None:
    """An action that never succeeds is recorded as abandoned."""
    log = run_client(lambda _: httpx.Response(503), ClientAction(0, "edit", {}), retry_timeout=0.05)
    assert log.abandoned == ["asker: edit"]


def test_reset_discards_tokens() -> None:
    """Only the tokens after the last reset are recorded."""
    stream = sse(
        ("token", '{"index": 0, "text": " Te", "version": 1}'),
        ("reset", "{}"),
        ("token", '{"index": 0, "text": " Tempe", "version": 1}'),
        ("end", '{"version": 1, "choices": [{"text": " Tempe"}]}'),
    )
    log = run_client(respond_with(stream), ClientAction(0, "generate", {**GENERATE, "stream": True}))
    (record,) = log.generations
    assert record.tokens == (TokenEvent(0, " Tempe", 1),)
    assert record.resets == 1 and record.texts == (" Tempe",)


def test_broken_stream_is_recorded_and_retried() -> None:
    """The tokens of an incomplete stream are recorded in addition to the later complete generation."""
    part = sse(("token", '{"index": 0, "text": " Te", "version": 1}'))
    whole = sse(("end", '{"version": 1, "choices": [{"text": " Tempe"}]}'))
    log = run_client(respond_with(part, whole), ClientAction(0, "generate", {**GENERATE, "stream": True}))
    assert [answer.complete for answer in log.generations] == [False, True]
    assert [a.outcome for a in log.attempts] == ["the stream ended early", "200"]


def test_resumes_after_last_event_id() -> None:
    """A client that loses the connection resumes after the last event, and records the status of the end event."""
    last_event_ids: list[str | None] = []
    edit = {"id": "edit_1", "status": "queued"}
    respond = respond_with(
        httpx.Response(202, json=edit),
        httpx.Response(
            200, text="id: 7\nevent: progress\ndata: {}\n\n", headers={"content-type": "text/event-stream"}
        ),
        httpx.Response(
            200,
            text='id: 9\nevent: end\ndata: {"id": "edit_1", "status": "applied", "version": 4}\n\n',
            headers={"content-type": "text/event-stream"},
        ),
    )

    def handle(request: httpx.Request) -> httpx.Response:
        last_event_ids.append(request.headers.get("Last-Event-ID"))
        return respond(request)

    log = run_client(handle, ClientAction(0, "edit", {}, wait_mode="listen"))
    assert last_event_ids == [None, None, "7"]
    assert [told.status for told in log.reported_statuses] == ["queued", "applied"]
    assert log.newest_version == 4


def test_decreasing_event_ids_are_an_anomaly() -> None:
    """Event ids of a job that do not increase are an anomaly."""
    edit = {"id": "edit_1", "status": "queued"}
    back = 'id: 7\nevent: progress\ndata: {}\n\nid: 6\nevent: end\ndata: {"id": "edit_1", "status": "applied"}\n\n'
    log = run_client(
        respond_with(httpx.Response(202, json=edit), httpx.Response(200, text=back)),
        ClientAction(0, "edit", {}, wait_mode="listen"),
    )
    assert len(log.anomalies) == 1


def test_requires_min_version_of_seen_edit() -> None:
    """The newest reported version is the `min_version` of later requests."""
    bodies: list[bytes] = []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        if request.url.path == "/edits":
            return httpx.Response(200, json={"id": "edit_1", "status": "applied", "version": 7})
        return httpx.Response(200, json={"version": 7, "text": " Tempe"})

    action = ClientAction(0, "generate", {**GENERATE, "stream": False}, version_mode="seen")
    log = run_client(handle, ClientAction(0, "edit", {}, wait_mode=""), action)
    assert b'"min_version":7' in bodies[1].replace(b" ", b"")
    assert log.generations[0].min_version == 7


def test_unexpected_body_is_an_anomaly() -> None:
    """An unexpected exception is recorded as an anomaly, and the client continues."""
    odd = httpx.Response(200, json={"nothing": "that is known"})
    fine = httpx.Response(200, json={"version": 1, "text": " Tempe"})
    action = ClientAction(0, "generate", {**GENERATE, "stream": False})
    log = run_client(respond_with(odd, fine), action, action)
    assert len(log.anomalies) == 1 and len(log.generations) == 1
