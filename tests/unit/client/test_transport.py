"""Requests, answers and their troubles: palimpsest.transport, palimpsest.errors."""

from __future__ import annotations

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
from palimpsest.client import is_loopback
from tests.support.fake_http_service import FakeService, sse_stream

Ask = Callable[[FakeService], Any]
EDIT = {"id": "edit_1", "subject": "s", "prompt": "{} is", "status": "queued", "attempts": 0}
DONE = EDIT | {"status": "applied", "version": 3}
CONNECTION_LOST = httpx.ReadError("gone")


def busy_response(status: int, **headers: str) -> httpx.Response:
    answer = FakeService.problem(status, "Not now.")
    answer.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return answer


def test_a_lost_answer_is_asked_for_with_the_same_key(ask: Ask) -> None:
    """What may have been done is asked for again under the key of the first time, so that it is done once."""
    fake = FakeService({"POST /edits": [CONNECTION_LOST, CONNECTION_LOST, DONE]})
    assert ask(fake).edit("s", "{} is", "x").version == 3
    keys = {headers["Idempotency-Key"] for headers in fake.headers}
    assert len(fake.requests) == 3 and len(keys) == 1


def test_two_edits_have_two_keys_and_a_given_key_is_kept(ask: Ask) -> None:
    """Without a key each call is an edit of its own; with one, all calls are one edit."""
    fake = FakeService({"POST /edits": DONE})
    client = ask(fake)
    for key in (None, None, "mine", "mine"):
        client.edit("s", "{} is", "x", key=key)
    first, second, *mine = (headers["Idempotency-Key"] for headers in fake.headers)
    assert first != second and mine == ["mine", "mine"]


def test_the_service_says_when_to_come_back(ask: Ask, paused: list[float]) -> None:
    """Retry-After is waited, where the client's own pause is shorter."""
    fake = FakeService(
        {"GET /models": [busy_response(429, Retry_After="7"), busy_response(503), {"items": []}]}
    )
    assert ask(fake).models() == []
    assert paused[0] == 7 and 0 < paused[1] < 2


def test_a_long_retry_after_is_raised_at_once(ask: Ask, paused: list[float]) -> None:
    """A Retry-After of minutes is not slept through: the error has the seconds."""
    with pytest.raises(TooManyRequests) as caught:
        ask(FakeService({"GET /models": busy_response(429, Retry_After="600")})).models()
    assert caught.value.retry_after == 600 and not paused


def test_retries_are_limited(ask: Ask, paused: list[float]) -> None:
    """Five times again, with longer and longer pauses; then where it was looked for, or the service's own words."""
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
    """Whoever forgot to start the service, or mistyped where it is, hears of it without a pause."""
    fake = FakeService({"GET /models": httpx.ConnectError("refused")})
    with pytest.raises(Unreachable, match="palimpsest serve"):
        ask(fake).models()
    assert len(fake.requests) == 1 and not paused


def test_requests_that_are_not_idempotent_are_not_retried(ask: Ask) -> None:
    """A second retry of a job would be refused, so the first one is not repeated."""
    fake = FakeService({"POST /jobs/edit_1/retry": [CONNECTION_LOST, busy_response(503)]})
    client = ask(fake)
    for _ in range(2):
        with pytest.raises(Unavailable):
            client.retry("edit_1")
    assert len(fake.requests) == 2


def test_a_silent_service_is_not_asked_again(ask: Ask) -> None:
    """An answer that takes longer than the timeout would do so again; asking would only make more work of it."""
    fake = FakeService({"POST /generate": httpx.ReadTimeout("")})
    with pytest.raises(Unreachable, match="longer `timeout`"):
        ask(fake).generate("x")
    assert len(fake.requests) == 1


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
def test_a_problem_is_an_error_of_its_kind(ask: Ask, status: int, kind: type[PalimpsestError]) -> None:
    """Each status has an exception with the service's own words; nothing of it is asked again."""
    problem = FakeService.problem(status, "Change this.", errors=[{"field": "prompt", "detail": "no slot"}])
    problem.headers["X-Request-Id"] = "req_1"
    fake = FakeService({"GET /models": problem})
    with pytest.raises(kind, match=r"Change this\.") as caught:
        ask(fake).models()
    error = caught.value
    assert (error.status, error.title, error.field, error.request_id) == (status, "x", "prompt", "req_1")
    assert len(fake.requests) == 1


def test_a_response_that_is_not_json_is_reported(ask: Ask) -> None:
    """An answer that is no JSON says that the address may be wrong; an error page names its status."""
    fake = FakeService({"GET /models": "<html>", "GET /ledger/verify": httpx.Response(418, text="<html>")})
    with pytest.raises(ServerError, match="is this the address"):
        ask(fake).models()
    with pytest.raises(InvalidRequest, match="418"):
        ask(fake).verify()


def test_progress_resumes_after_a_lost_connection(ask: Ask) -> None:
    """A broken stream of events is taken up after the last one that was heard, and the row says how it ended."""
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


def test_a_stream_that_always_breaks_is_given_up(ask: Ask) -> None:
    """Without an event between them, five lost connections are enough."""
    fake = FakeService({"POST /edits": EDIT, "GET /edits/edit_1/events": ": open\n\n"})
    with pytest.raises(Unreachable, match="ended before the job did"):
        ask(fake).edit("s", "{} is", "x", on_progress=lambda _: None)
    assert len(fake.requests) == 1 + 6


def test_streamed_tokens_and_reset(ask: Ask) -> None:
    """Tokens, the mark of one that begins anew, and an empty last one with the reason for the end."""
    said = sse_stream(
        ("token", {"index": 0, "text": " Pa", "version": 1}),
        ("restart", {}),
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
    [(sse_stream(("token", {"text": "x", "version": 0})), "broke off"), (sse_stream(("error", {"detail": "no worker"})), "no worker")],
)  # fmt: skip
def test_an_incomplete_stream_is_an_error(ask: Ask, said: str, words: str) -> None:
    """A stream that breaks off, or ends with an error, raises after its tokens, and is not asked for again."""
    fake = FakeService({"POST /generate": said})
    with pytest.raises(PalimpsestError, match=words):
        list(ask(fake).stream("x"))
    assert len(fake.requests) == 1


def test_lists_are_read_to_their_end(ask: Ask) -> None:
    """Pages follow one another; what was asked is asked of each."""
    pages = [{"items": [EDIT], "next": "c"}, {"items": [DONE], "next": None}]
    fake = FakeService({"GET /edits": pages})
    assert [e.status for e in ask(fake).edits(subject="s")] == ["queued", "applied"]
    assert [body for _, body in fake.requests] == [{"limit": "200", "subject": "s"}, {"limit": "200", "subject": "s", "cursor": "c"}]  # fmt: skip


def test_export_is_polled_until_ready(ask: Ask, paused: list[float]) -> None:
    """An export that is still being made is asked for again when the service says."""
    later = httpx.Response(202, json={"status": "running"}, headers={"Retry-After": "2"})
    fake = FakeService({"GET /export": [later, b"zip"]})
    assert ask(fake).export(3) == b"zip" and paused == [2]
    assert [body for _, body in fake.requests] == [{"version": "3", "format": "peft"}] * 2


def test_an_edit_that_was_not_applied_is_an_error(ask: Ask) -> None:
    """A rejected edit raises with the guard's words and its figures, a failed one with the error's; a dry run does not."""
    rejected = EDIT | {"status": "rejected", "result": {"reason": "too weak"}}
    failed = EDIT | {"status": "failed", "error": {"title": "x", "detail": "no memory"}}
    fake = FakeService({"POST /edits": [rejected, failed, rejected | {"dry_run": True}]})
    client = ask(fake)
    with pytest.raises(EditRejected, match="too weak") as caught:
        client.edit("s", "{} is", "x")
    assert caught.value.edit.id == "edit_1"
    with pytest.raises(JobFailed, match="edit_1 is failed: no memory"):
        client.edit("s", "{} is", "x")
    assert client.edit("s", "{} is", "x", dry_run=True).reason == "too weak"


def test_the_key_and_the_address_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """PALIMPSEST_URL and PALIMPSEST_API_KEY stand in for what is left out; every request carries the key."""
    monkeypatch.setenv("PALIMPSEST_URL", "http://elsewhere/prefix/")
    monkeypatch.setenv("PALIMPSEST_API_KEY", "secret")
    fake = FakeService({"GET /prefix/models": {"items": []}})
    with Client(transport=httpx.MockTransport(fake)) as client:
        client.models()
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert repr(AsyncClient()) == "AsyncClient('http://elsewhere/prefix')"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """A URL without scheme or host is told as such, before anything is asked."""
    with pytest.raises(ValueError, match="http://127"):
        Client(url)


@pytest.mark.parametrize(
    ("host", "answer"),
    [(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org")],
)
def test_loopback_is_known_by_its_address(host: str, answer: bool) -> None:
    """Only addresses that stay on this machine are asked without a proxy; a name that could lead anywhere is not one of them."""
    assert is_loopback(host) is answer
