"""The clients of the chaos bench ask again as a client should, and keep what they were told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import httpx
import pytest

from bench import load
from bench.journal import Journal, Token
from bench.load import Client
from bench.plan import Wish

Handler = Callable[[httpx.Request], httpx.Response]
GENERATE = {"prompt": "The Louvre is in", "max_new_tokens": 3}
ENDED = {"version": 1, "choices": [{"text": " Tempe"}]}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PAUSE", 0.0)


def go(handler: Handler, *wishes: Wish, patience: float = 30.0) -> Journal:
    """What a client writes down that is answered by `handler`."""
    journal = Journal()
    client = Client("asker", iter(wishes), ["http://one", "http://two"], journal, threading.Event(), patience)
    client._http = httpx.Client(transport=httpx.MockTransport(handler), base_url="http://one")
    client.run()
    return journal


def answering(*answers: httpx.Response | Exception) -> Handler:
    """One answer after another."""
    left: Iterator[httpx.Response | Exception] = iter(answers)

    def handle(_: httpx.Request) -> httpx.Response:
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return handle


def sse(*events: tuple[str, str]) -> httpx.Response:
    return httpx.Response(200, text="".join(f"event: {name}\ndata: {data}\n\n" for name, data in events))


def test_asks_again_with_the_same_key() -> None:
    """After a silence, a broken connection, a 429 and a 503: the same request to the next door."""
    seen: list[tuple[str, str]] = []
    edit = {"id": "edit_1", "status": "queued"}
    give = answering(
        httpx.ReadTimeout("silent"),
        httpx.ReadError("cut"),
        httpx.Response(429),
        httpx.Response(503),
        httpx.Response(202, json=edit),
    )

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.host, request.headers["Idempotency-Key"]))
        return give(request)

    journal = go(handle, Wish(0, "edit", {}, patient=""))
    assert seen == [(host, "asker-0") for host in ("one", "two", "one", "two", "one")]
    assert [a.outcome for a in journal.attempts] == ["silence", "connection broken", "429", "503", "200"]
    assert journal.made == {"asker-0": {"edit_1"}}


def test_a_refusal_is_final() -> None:
    """A 422 is written down and not asked again."""
    journal = go(answering(httpx.Response(422)), Wish(0, "edit", {}))
    assert [a.outcome for a in journal.attempts] == ["422"]
    assert not journal.made


def test_gives_up_in_the_end() -> None:
    """A wish that nobody grants is written down as such."""
    journal = go(lambda _: httpx.Response(503), Wish(0, "edit", {}), patience=0.05)
    assert journal.unanswered == ["asker: edit"]


def test_a_restart_voids_what_was_heard() -> None:
    """Only the pieces after the last restart are kept."""
    stream = sse(
        ("token", '{"index": 0, "text": " Te", "version": 1}'),
        ("restart", "{}"),
        ("token", '{"index": 0, "text": " Tempe", "version": 1}'),
        ("end", '{"version": 1, "choices": [{"text": " Tempe"}]}'),
    )
    journal = go(answering(stream), Wish(0, "generate", {**GENERATE, "stream": True}))
    (answer,) = journal.answers
    assert answer.tokens == (Token(0, " Tempe", 1),)
    assert answer.restarts == 1 and answer.texts == (" Tempe",)


def test_a_stream_that_breaks_is_kept_and_asked_again() -> None:
    """The part that was heard is written down beside the answer that follows."""
    part = sse(("token", '{"index": 0, "text": " Te", "version": 1}'))
    whole = sse(("end", '{"version": 1, "choices": [{"text": " Tempe"}]}'))
    journal = go(answering(part, whole), Wish(0, "generate", {**GENERATE, "stream": True}))
    assert [answer.complete for answer in journal.answers] == [False, True]
    assert [a.outcome for a in journal.attempts] == ["the stream ended early", "200"]


def test_listens_on_after_the_last_event() -> None:
    """A listener whose connection breaks goes on where it was, to the end; the end is what it was told."""
    seen: list[str | None] = []
    edit = {"id": "edit_1", "status": "queued"}
    give = answering(
        httpx.Response(202, json=edit),
        httpx.Response(200, text="id: 7\nevent: progress\ndata: {}\n\n"),
        httpx.Response(
            200, text='id: 9\nevent: end\ndata: {"id": "edit_1", "status": "applied", "version": 4}\n\n'
        ),
    )

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Last-Event-ID"))
        return give(request)

    journal = go(handle, Wish(0, "edit", {}, patient="listen"))
    assert seen == [None, None, "7"]
    assert [told.status for told in journal.told] == ["queued", "applied"]
    assert journal.newest == 4


def test_events_that_go_back_are_a_trouble() -> None:
    """The ids of a job's events grow."""
    edit = {"id": "edit_1", "status": "queued"}
    back = 'id: 7\nevent: progress\ndata: {}\n\nid: 6\nevent: end\ndata: {"id": "edit_1", "status": "applied"}\n\n'
    journal = go(
        answering(httpx.Response(202, json=edit), httpx.Response(200, text=back)),
        Wish(0, "edit", {}, patient="listen"),
    )
    assert len(journal.troubles) == 1


def test_reads_what_was_seen() -> None:
    """The version of an edit that the client was told of is the least that it asks for."""
    asked: list[bytes] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.content)
        if request.url.path == "/edits":
            return httpx.Response(200, json={"id": "edit_1", "status": "applied", "version": 7})
        return httpx.Response(200, json={"version": 7, "text": " Tempe"})

    wish = Wish(0, "generate", {**GENERATE, "stream": False}, version="seen")
    journal = go(handle, Wish(0, "edit", {}, patient=""), wish)
    assert b'"min_version":7' in asked[1].replace(b" ", b"")
    assert journal.answers[0].least == 7


def test_a_client_that_falls_is_not_content() -> None:
    """What a client does not understand is a trouble, and it goes on."""
    odd = httpx.Response(200, json={"nothing": "that is known"})
    fine = httpx.Response(200, json={"version": 1, "text": " Tempe"})
    wish = Wish(0, "generate", {**GENERATE, "stream": False})
    journal = go(answering(odd, fine), wish, wish)
    assert len(journal.troubles) == 1 and len(journal.answers) == 1
