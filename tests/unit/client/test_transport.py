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
    Failed,
    Forbidden,
    Invalid,
    NotFound,
    PalimpsestError,
    Progress,
    Rejected,
    ServiceFailed,
    TooMany,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from palimpsest.client import is_loopback
from tests.support.fake_http_service import Fake, events

Ask = Callable[[Fake], Any]
EDIT = {"id": "edit_1", "subject": "s", "prompt": "{} is", "status": "queued", "attempts": 0}
DONE = EDIT | {"status": "applied", "version": 3}
GONE = httpx.ReadError("gone")


def busy(status: int, **headers: str) -> httpx.Response:
    answer = Fake.problem(status, "Not now.")
    answer.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return answer


def test_a_lost_answer_is_asked_for_with_the_same_key(ask: Ask) -> None:
    """What may have been done is asked for again under the key of the first time, so that it is done once."""
    fake = Fake({"POST /edits": [GONE, GONE, DONE]})
    assert ask(fake).edit("s", "{} is", "x").version == 3
    keys = {headers["Idempotency-Key"] for headers in fake.headers}
    assert len(fake.asked) == 3 and len(keys) == 1


def test_two_edits_have_two_keys_and_a_given_key_is_kept(ask: Ask) -> None:
    """Without a key each call is an edit of its own; with one, all calls are one edit."""
    fake = Fake({"POST /edits": DONE})
    client = ask(fake)
    for key in (None, None, "mine", "mine"):
        client.edit("s", "{} is", "x", key=key)
    first, second, *mine = (headers["Idempotency-Key"] for headers in fake.headers)
    assert first != second and mine == ["mine", "mine"]


def test_the_service_says_when_to_come_back(ask: Ask, paused: list[float]) -> None:
    """Retry-After is waited, where the client's own pause is shorter."""
    fake = Fake({"GET /models": [busy(429, Retry_After="7"), busy(503), {"items": []}]})
    assert ask(fake).models() == []
    assert paused[0] == 7 and 0 < paused[1] < 2


def test_what_takes_too_long_is_told_at_once(ask: Ask, paused: list[float]) -> None:
    """A Retry-After of minutes is not slept through: the error has the seconds."""
    with pytest.raises(TooMany) as caught:
        ask(Fake({"GET /models": busy(429, Retry_After="600")})).models()
    assert caught.value.retry_after == 600 and not paused


def test_it_does_not_try_for_ever(ask: Ask, paused: list[float]) -> None:
    """Five times again, with longer and longer pauses; then where it was looked for, or the service's own words."""
    refused = httpx.ConnectError("refused")
    fake = Fake(
        {"GET /models": [{"items": []}, *[refused] * 6], "GET /ledger/verify": [busy(503) for _ in range(6)]}
    )
    client = ask(fake)
    client.models()
    with pytest.raises(Unreachable, match=r"http://there \(refused\)"):
        client.models()
    assert len(fake.asked) == 1 + 6 and paused == sorted(paused)
    with pytest.raises(Unavailable, match="Not now") as caught:
        client.verify()
    assert caught.value.status == 503 and len(fake.asked) == 1 + 6 + 6


def test_an_address_that_never_answered_is_told_at_once(ask: Ask, paused: list[float]) -> None:
    """Whoever forgot to start the service, or mistyped where it is, hears of it without a pause."""
    fake = Fake({"GET /models": httpx.ConnectError("refused")})
    with pytest.raises(Unreachable, match="palimpsest serve"):
        ask(fake).models()
    assert len(fake.asked) == 1 and not paused


def test_what_is_not_the_same_twice_is_sent_once(ask: Ask) -> None:
    """A second retry of a job would be refused, so the first one is not repeated."""
    fake = Fake({"POST /jobs/edit_1/retry": [GONE, busy(503)]})
    client = ask(fake)
    for _ in range(2):
        with pytest.raises(Unavailable):
            client.retry("edit_1")
    assert len(fake.asked) == 2


def test_a_silent_service_is_not_asked_again(ask: Ask) -> None:
    """An answer that takes longer than the timeout would do so again; asking would only make more work of it."""
    fake = Fake({"POST /generate": httpx.ReadTimeout("")})
    with pytest.raises(Unreachable, match="longer `timeout`"):
        ask(fake).generate("x")
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Invalid),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (413, Invalid),
        (422, Invalid),
        (500, ServiceFailed),
    ],
)
def test_a_problem_is_an_error_of_its_kind(ask: Ask, status: int, kind: type[PalimpsestError]) -> None:
    """Each status has an exception with the service's own words; nothing of it is asked again."""
    problem = Fake.problem(status, "Change this.", errors=[{"field": "prompt", "detail": "no slot"}])
    problem.headers["X-Request-Id"] = "req_1"
    fake = Fake({"GET /models": problem})
    with pytest.raises(kind, match=r"Change this\.") as caught:
        ask(fake).models()
    error = caught.value
    assert (error.status, error.title, error.field, error.request_id) == (status, "x", "prompt", "req_1")
    assert len(fake.asked) == 1


def test_what_is_no_palimpsest_is_told(ask: Ask) -> None:
    """An answer that is no JSON says that the address may be wrong; an error page names its status."""
    fake = Fake({"GET /models": "<html>", "GET /ledger/verify": httpx.Response(418, text="<html>")})
    with pytest.raises(ServiceFailed, match="is this the address"):
        ask(fake).models()
    with pytest.raises(Invalid, match="418"):
        ask(fake).verify()


def test_progress_goes_on_after_a_lost_connection(ask: Ask) -> None:
    """A broken stream of events is taken up after the last one that was heard, and the row says how it ended."""
    first, rest = (events(("progress", {"phase": p, "done": 1, "total": 2})) for p in ("find", "try"))
    last = "id: 9\nevent: end\ndata: {}\n\n"
    fake = Fake(
        {
            "POST /edits": EDIT,
            "GET /edits/edit_1/events": [first, GONE, rest.replace("id: 1", "id: 5"), last],
            "GET /edits/edit_1": DONE,
        }
    )
    seen: list[Progress] = []
    assert ask(fake).edit("s", "{} is", "x", on_progress=seen.append).landed
    assert [(p.phase, p.done, p.total) for p in seen] == [("find", 1, 2), ("try", 1, 2)]
    after = [h.get("Last-Event-ID") for (name, _), h in zip(fake.asked, fake.headers, strict=True) if "events" in name]  # fmt: skip
    assert after == [None, "1", "1", "5"]


def test_a_stream_that_always_breaks_is_given_up(ask: Ask) -> None:
    """Without an event between them, five lost connections are enough."""
    fake = Fake({"POST /edits": EDIT, "GET /edits/edit_1/events": ": open\n\n"})
    with pytest.raises(Unreachable, match="ended before the job did"):
        ask(fake).edit("s", "{} is", "x", on_progress=lambda _: None)
    assert len(fake.asked) == 1 + 6


def test_tokens_come_as_they_are_said(ask: Ask) -> None:
    """Tokens, the mark of one that begins anew, and an empty last one with the reason for the end."""
    said = events(
        ("token", {"index": 0, "text": " Pa", "version": 1}),
        ("restart", {}),
        ("token", {"index": 0, "text": " Paris", "version": 2}),
        ("end", {"version": 2, "choices": [{"finish_reason": "length"}]}),
    )
    tokens = list(ask(Fake({"POST /generate": said})).stream("x"))
    assert [(str(t), t.version, t.restart, t.finish_reason) for t in tokens] == [
        (" Pa", 1, False, None),
        (" Paris", 2, True, None),
        ("", 2, False, "length"),
    ]


@pytest.mark.parametrize(
    ("said", "words"),
    [(events(("token", {"text": "x", "version": 0})), "broke off"), (events(("error", {"detail": "no worker"})), "no worker")],
)  # fmt: skip
def test_half_an_answer_is_an_error(ask: Ask, said: str, words: str) -> None:
    """A stream that breaks off, or ends with an error, raises after its tokens, and is not asked for again."""
    fake = Fake({"POST /generate": said})
    with pytest.raises(PalimpsestError, match=words):
        list(ask(fake).stream("x"))
    assert len(fake.asked) == 1


def test_lists_are_read_to_their_end(ask: Ask) -> None:
    """Pages follow one another; what was asked is asked of each."""
    pages = [{"items": [EDIT], "next": "c"}, {"items": [DONE], "next": None}]
    fake = Fake({"GET /edits": pages})
    assert [e.status for e in ask(fake).edits(subject="s")] == ["queued", "applied"]
    assert [body for _, body in fake.asked] == [{"limit": "200", "subject": "s"}, {"limit": "200", "subject": "s", "cursor": "c"}]  # fmt: skip


def test_a_file_that_takes_time_is_asked_for_until_it_is_there(ask: Ask, paused: list[float]) -> None:
    """An export that is still being made is asked for again when the service says."""
    later = httpx.Response(202, json={"status": "running"}, headers={"Retry-After": "2"})
    fake = Fake({"GET /export": [later, b"zip"]})
    assert ask(fake).export(3) == b"zip" and paused == [2]
    assert [body for _, body in fake.asked] == [{"version": "3", "format": "peft"}] * 2


def test_an_edit_that_did_not_land_is_an_error(ask: Ask) -> None:
    """A rejected edit raises with the guard's words and its figures, a failed one with the error's; a dry run does not."""
    rejected = EDIT | {"status": "rejected", "result": {"reason": "too weak"}}
    failed = EDIT | {"status": "failed", "error": {"title": "x", "detail": "no memory"}}
    fake = Fake({"POST /edits": [rejected, failed, rejected | {"dry_run": True}]})
    client = ask(fake)
    with pytest.raises(Rejected, match="too weak") as caught:
        client.edit("s", "{} is", "x")
    assert caught.value.edit.id == "edit_1"
    with pytest.raises(Failed, match="edit_1 is failed: no memory"):
        client.edit("s", "{} is", "x")
    assert client.edit("s", "{} is", "x", dry_run=True).reason == "too weak"


def test_the_key_and_the_address_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """PALIMPSEST_URL and PALIMPSEST_API_KEY stand in for what is left out; every request carries the key."""
    monkeypatch.setenv("PALIMPSEST_URL", "http://elsewhere/prefix/")
    monkeypatch.setenv("PALIMPSEST_API_KEY", "secret")
    fake = Fake({"GET /prefix/models": {"items": []}})
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
