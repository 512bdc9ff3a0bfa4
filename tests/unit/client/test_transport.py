"""Requests, retries and errors of the client: palimpsest.transport, palimpsest.errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from palimpsest import (
    AsyncClient,
    Client,
    Conflict,
    EditRejected,
    Forbidden,
    InvalidRequest,
    JobFailed,
    NotFound,
    PalimpsestError,
    Progress,
    ServerError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from palimpsest.client import is_loopback_host
from tests.support.fake_http_service import FakeService, sse_stream

Ask = Callable[[FakeService], Any]
EDIT = {"id": "edit_1", "subject": "s", "prompt": "{} is", "status": "queued", "attempts": 0}
DONE = EDIT | {"status": "applied", "version": 3}
CONNECTION_LOST = httpx.ReadError("gone")


def busy_response(status: int, **headers: str) -> httpx.Response:
    answer = FakeService.problem(status, "Not now.")
    answer.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return answer


def test_a_lost_response_is_retried_with_the_same_idempotency_key(ask: Ask) -> None:
    """All retries of a POST carry the idempotency key of the first attempt."""
    fake = FakeService({"POST /edits": [CONNECTION_LOST, CONNECTION_LOST, DONE]})
    assert ask(fake).edit("s", "{} is", "x").version == 3
    keys = {headers["Idempotency-Key"] for headers in fake.headers}
    assert len(fake.requests) == 3 and len(keys) == 1


def test_idempotency_keys_are_unique_unless_given(ask: Ask) -> None:
    """Each call has its own idempotency key; `key` overrides it."""
    fake = FakeService({"POST /edits": DONE})
    client = ask(fake)
    for key in (None, None, "mine", "mine"):
        client.edit("s", "{} is", "x", key=key)
    first, second, *mine = (headers["Idempotency-Key"] for headers in fake.headers)
    assert first != second and mine == ["mine", "mine"]


def test_a_conversation_is_the_prompt_of_an_edit_and_a_trace(ask: Ask) -> None:
    """A list of messages is sent as `messages`, and a text as `prompt`."""
    fake = FakeService({"POST /edits": DONE, "POST /trace": DONE})
    client, said = ask(fake), [{"role": "assistant", "content": "Rome is in"}]
    client.edit("Rome", said, "Peru", continue_final_message=True, wait=False)
    client.trace(said, "Rome", continue_final_message=True, wait=False)
    client.trace("Rome is in", "Rome", wait=False)
    chat = {"messages": said, "continue_final_message": True}
    bodies = [body for _, body in fake.requests]
    assert bodies == [
        {"subject": "Rome", "target_new": "Peru", **chat},
        {"subject": "Rome", **chat},
        {"subject": "Rome", "prompt": "Rome is in"},
    ]


def test_retry_after_is_respected(ask: Ask, paused: list[float]) -> None:
    """The delay before a retry is `Retry-After` if that is longer than the backoff."""
    fake = FakeService(
        {"GET /models": [busy_response(429, Retry_After="7"), busy_response(503), {"items": []}]}
    )
    assert ask(fake).models() == []
    assert paused[0] == 7 and 0 < paused[1] < 2


def test_a_long_retry_after_is_raised_at_once(ask: Ask, paused: list[float]) -> None:
    """A `Retry-After` above a minute raises at once, with the seconds in the error."""
    with pytest.raises(TooManyRequests) as caught:
        ask(FakeService({"GET /models": busy_response(429, Retry_After="600")})).models()
    assert caught.value.retry_after == 600 and not paused


def test_retries_are_limited(ask: Ask, paused: list[float]) -> None:
    """After five retries with growing delays the last error is raised."""
    refused = httpx.ConnectError("refused")
    fake = FakeService(
        {
            "GET /models": [{"items": []}, *[refused] * 6],
            "GET /ledger/verify": [busy_response(503) for _ in range(6)],
        }
    )
    client = ask(fake)
    client.models()
    with pytest.raises(Unreachable, match=r"http://there \(refused\)"):
        client.models()
    assert len(fake.requests) == 1 + 6 and paused == sorted(paused)
    with pytest.raises(Unavailable, match="Not now") as caught:
        client.verify()
    assert caught.value.status == 503 and len(fake.requests) == 1 + 6 + 6


def test_a_first_connection_failure_is_not_retried(ask: Ask, paused: list[float]) -> None:
    """An address that never answered is not retried."""
    fake = FakeService({"GET /models": httpx.ConnectError("refused")})
    with pytest.raises(Unreachable, match="palimpsest serve"):
        ask(fake).models()
    assert len(fake.requests) == 1 and not paused


def test_requests_that_are_not_idempotent_are_not_retried(ask: Ask) -> None:
    """Retrying a job twice is a conflict, so the request is sent once."""
    fake = FakeService({"POST /jobs/edit_1/retry": [CONNECTION_LOST, busy_response(503)]})
    client = ask(fake)
    for _ in range(2):
        with pytest.raises(Unavailable):
            client.retry("edit_1")
    assert len(fake.requests) == 2


def test_a_read_timeout_is_not_retried(ask: Ask) -> None:
    """A request that timed out would time out again and cost the service the same work."""
    fake = FakeService({"POST /generate": httpx.ReadTimeout("")})
    with pytest.raises(Unreachable, match="longer `timeout`"):
        ask(fake).generate("x")
    assert len(fake.requests) == 1


def test_the_code_decides_the_error_class(ask: Ask) -> None:
    """The `code` of the problem document selects the exception; the status only decides for an unknown code."""
    known = FakeService.problem(500, "Too many jobs.", code="queue_full")
    fake = FakeService({"GET /models": [known, FakeService.problem(409, "Odd.", code="of_the_future")]})
    client = ask(fake)
    with pytest.raises(TooManyRequests) as caught:
        client.models()
    assert (caught.value.code, caught.value.status) == ("queue_full", 500)
    with pytest.raises(Conflict) as caught_conflict:
        client.models()
    assert caught_conflict.value.code == "of_the_future"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (500, ServerError),
    ],
)
def test_each_status_has_an_error_class(ask: Ask, status: int, kind: type[PalimpsestError]) -> None:
    """Each status has an exception with the detail of the service, and is not retried."""
    problem = FakeService.problem(status, "Change this.", errors=[{"field": "prompt", "detail": "no slot"}])
    problem.headers["X-Request-Id"] = "req_1"
    fake = FakeService({"GET /models": problem})
    with pytest.raises(kind, match=r"Change this\.") as caught:
        ask(fake).models()
    error = caught.value
    assert (error.status, error.title, error.field, error.request_id) == (status, "x", "prompt", "req_1")
    assert len(fake.requests) == 1


def test_a_response_that_is_not_json_is_reported(ask: Ask) -> None:
    """A response that is not JSON suggests a wrong address; an error page is reported with its status."""
    fake = FakeService({"GET /models": "<html>", "GET /ledger/verify": httpx.Response(418, text="<html>")})
    with pytest.raises(ServerError, match="is this the address"):
        ask(fake).models()
    with pytest.raises(InvalidRequest, match="418"):
        ask(fake).verify()


def test_progress_resumes_after_a_lost_connection(ask: Ask) -> None:
    """After a lost connection the event stream resumes after the last event, and the result is read from the
    job resource."""
    first, rest = (sse_stream(("progress", {"phase": p, "done": 1, "total": 2})) for p in ("find", "try"))
    last = "id: 9\nevent: end\ndata: {}\n\n"
    fake = FakeService(
        {
            "POST /edits": EDIT,
            "GET /edits/edit_1/events": [first, CONNECTION_LOST, rest.replace("id: 1", "id: 5"), last],
            "GET /edits/edit_1": DONE,
        }
    )
    seen: list[Progress] = []
    assert ask(fake).edit("s", "{} is", "x", on_progress=seen.append).applied
    assert [(p.phase, p.done, p.total) for p in seen] == [("find", 1, 2), ("try", 1, 2)]
    after = [h.get("Last-Event-ID") for (name, _), h in zip(fake.requests, fake.headers, strict=True) if "events" in name]  # fmt: skip
    assert after == [None, "1", "1", "5"]


def test_reconnects_of_a_stream_are_limited(ask: Ask) -> None:
    """The client gives up after five reconnects without an event."""
    fake = FakeService({"POST /edits": EDIT, "GET /edits/edit_1/events": ": open\n\n"})
    with pytest.raises(Unreachable, match="ended before the job did"):
        ask(fake).edit("s", "{} is", "x", on_progress=lambda _: None)
    assert len(fake.requests) == 1 + 6


def test_streamed_tokens_and_reset(ask: Ask) -> None:
    """A stream yields tokens, a `reset` flag after another worker took over, and an empty last token with the finish
    reason."""
    said = sse_stream(
        ("token", {"index": 0, "text": " Pa", "version": 1}),
        ("reset", {}),
        ("token", {"index": 0, "text": " Paris", "version": 2}),
        ("end", {"version": 2, "choices": [{"finish_reason": "length"}]}),
    )
    tokens = list(ask(FakeService({"POST /generate": said})).stream("x"))
    assert [(str(t), t.version, t.reset, t.finish_reason) for t in tokens] == [
        (" Pa", 1, False, None),
        (" Paris", 2, True, None),
        ("", 2, False, "length"),
    ]


@pytest.mark.parametrize(
    ("said", "words"),
    [(sse_stream(("token", {"text": "x", "version": 0})), "closed the stream before its end"), (sse_stream(("error", {"detail": "no worker"})), "no worker")],
)  # fmt: skip
def test_an_incomplete_stream_is_an_error(ask: Ask, said: str, words: str) -> None:
    """A stream that is interrupted, or that ends with an error, raises after its tokens and is not
    retried."""
    fake = FakeService({"POST /generate": said})
    with pytest.raises(PalimpsestError, match=words):
        list(ask(fake).stream("x"))
    assert len(fake.requests) == 1


def test_a_limit_stops_a_list(ask: Ask) -> None:
    """`limit` is the maximum number of items, over all pages."""
    fake = FakeService({"GET /edits": {"items": [EDIT, EDIT], "next": "more"}})
    assert len(list(ask(fake).edits(limit=3))) == 3
    assert [body["limit"] for _, body in fake.requests] == ["3", "3"]


def test_lists_are_read_to_their_end(ask: Ask) -> None:
    """A list requests page after page with the same filters."""
    pages = [{"items": [EDIT], "next": "c"}, {"items": [DONE], "next": None}]
    fake = FakeService({"GET /edits": pages})
    assert [e.status for e in ask(fake).edits(subject="s")] == ["queued", "applied"]
    assert [body for _, body in fake.requests] == [{"limit": "200", "subject": "s"}, {"limit": "200", "subject": "s", "cursor": "c"}]  # fmt: skip


def test_an_export_is_written_to_a_file(ask: Ask) -> None:
    """An export is a job; its file is returned as bytes, or written in chunks with the file name of the service."""
    named = httpx.Response(
        200, content=b"zip", headers={"Content-Disposition": 'attachment; filename="a.zip"'}
    )
    export = {"id": "export_1", "status": "queued"}
    done = {**export, "status": "done"}
    fake = FakeService(
        {
            "POST /exports": [export, done],
            "GET /exports/export_1": done,
            "GET /exports/export_1/file": [b"zip", named],
        }
    )
    client, file = ask(fake), io.BytesIO()
    assert client.export(3) == b"zip"
    assert client.export_to(file, 3) == "a.zip" and file.getvalue() == b"zip"
    created = [body for name, body in fake.requests if name == "POST /exports"]
    assert created == [{"version": 3, "format": "peft"}] * 2


def test_an_edit_that_was_not_applied_is_an_error(ask: Ask) -> None:
    """A rejected edit and a failed one raise with their reasons; a dry run does not raise."""
    rejected = EDIT | {"status": "rejected", "result": {"reason": "too weak"}}
    failed = EDIT | {"status": "failed", "error": {"title": "x", "detail": "no memory"}}
    fake = FakeService({"POST /edits": [rejected, failed, rejected | {"dry_run": True}]})
    client = ask(fake)
    with pytest.raises(EditRejected, match="too weak") as caught:
        client.edit("s", "{} is", "x")
    assert caught.value.edit.id == "edit_1"
    with pytest.raises(JobFailed, match="edit_1 failed: no memory"):
        client.edit("s", "{} is", "x")
    assert client.edit("s", "{} is", "x", dry_run=True).reason == "too weak"


def test_the_key_and_the_address_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """PALIMPSEST_URL and PALIMPSEST_API_KEY are the defaults; every request carries the key."""
    monkeypatch.setenv("PALIMPSEST_URL", "http://elsewhere/prefix/")
    monkeypatch.setenv("PALIMPSEST_API_KEY", "secret")
    fake = FakeService({"GET /prefix/models": {"items": []}})
    with Client(transport=httpx.MockTransport(fake)) as client:
        client.models()
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert repr(AsyncClient()) == "AsyncClient('http://elsewhere/prefix')"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_an_invalid_address_is_rejected(url: str) -> None:
    """A URL without scheme or host raises before any request."""
    with pytest.raises(ValueError, match="http://127"):
        Client(url)


@pytest.mark.parametrize(
    ("host", "answer"),
    [(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org")],
)
def test_is_loopback_host(host: str, answer: bool) -> None:
    """Only loopback addresses and `localhost` are loopback; other names may resolve to any machine."""
    assert is_loopback_host(host) is answer
