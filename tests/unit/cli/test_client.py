"""The client: event streams, problems, lost connections."""

from __future__ import annotations

import httpx
import pytest

from cli.client import Client, ClientSettings, ProblemResponse
from service.errors import Misconfigured, Unavailable
from tests.support.fake_http_service import FakeService, sse_stream


def make_client(fake: FakeService, **settings: str) -> Client:
    return Client(ClientSettings(**settings), transport=httpx.MockTransport(fake))


def test_follow_resumes_after_a_lost_connection() -> None:
    """After a broken stream the client asks again with the last id it saw."""
    fake = FakeService(
        {"GET /e": [sse_stream(("progress", 1)), httpx.ReadError("gone"), sse_stream(("end", 2))]}
    )
    seen = [event.name for event in make_client(fake).follow_events("/e", retry_delay=0)]
    assert seen == ["progress", "end"]
    assert [headers.get("Last-Event-ID") for headers in fake.headers] == [None, "1", "1"]


def test_follow_gives_up_after_max_reconnects() -> None:
    """A service that stays away ends in a sentence that says how to start it."""
    fake = FakeService({"GET /e": httpx.ConnectError("no")})
    with pytest.raises(Unavailable, match="palimpsest serve"):
        list(make_client(fake).follow_events("/e", retry_delay=0))
    assert len(fake.requests) == 6


def test_the_key_is_sent() -> None:
    """With an API key every request carries it."""
    fake = FakeService({"GET /models": {}})
    make_client(fake, api_key="secret").get("/models")
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def test_a_problem_is_its_detail() -> None:
    """Problem documents become their detail and what the single fields say; anything else names the status."""
    fake = FakeService(
        {
            "GET /a": FakeService.problem(
                422, "Two things.", errors=[{"field": "prompt", "detail": "no slot"}]
            ),
            "GET /b": httpx.Response(502, text="<html>"),
        }
    )
    with pytest.raises(ProblemResponse) as caught:
        make_client(fake).get("/a")
    assert caught.value.detail == "Two things.\n  no slot"
    with pytest.raises(ProblemResponse, match="502"):
        make_client(fake).get("/b")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """A URL without scheme or host is told as such."""
    with pytest.raises(Misconfigured, match="http://127"):
        make_client(FakeService(), url=url)
