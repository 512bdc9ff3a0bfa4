"""The client: event streams, problems, lost connections."""

from __future__ import annotations

import httpx
import pytest

from cli.client import Client, ClientSettings, Refused
from service.errors import Misconfigured, Unavailable
from tests.support.fake_http_service import Fake, events


def client(fake: Fake, **settings: str) -> Client:
    return Client(ClientSettings(**settings), transport=httpx.MockTransport(fake))


def test_a_lost_connection_is_taken_up_where_it_was() -> None:
    """After a broken stream the client asks again with the last id it saw."""
    fake = Fake({"GET /e": [events(("progress", 1)), httpx.ReadError("gone"), events(("end", 2))]})
    seen = [event.name for event in client(fake).follow("/e", pause=0)]
    assert seen == ["progress", "end"]
    assert [headers.get("Last-Event-ID") for headers in fake.headers] == [None, "1", "1"]


def test_it_does_not_try_for_ever() -> None:
    """A service that stays away ends in a sentence that says how to start it."""
    fake = Fake({"GET /e": httpx.ConnectError("no")})
    with pytest.raises(Unavailable, match="palimpsest serve"):
        list(client(fake).follow("/e", pause=0))
    assert len(fake.asked) == 6


def test_the_key_is_sent() -> None:
    """With an API key every request carries it."""
    fake = Fake({"GET /models": {}})
    client(fake, api_key="secret").get("/models")
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def test_a_problem_is_its_detail() -> None:
    """Problem documents become their detail and what the single fields say; anything else names the status."""
    fake = Fake(
        {
            "GET /a": Fake.problem(422, "Two things.", errors=[{"field": "prompt", "detail": "no slot"}]),
            "GET /b": httpx.Response(502, text="<html>"),
        }
    )
    with pytest.raises(Refused) as caught:
        client(fake).get("/a")
    assert caught.value.detail == "Two things.\n  no slot"
    with pytest.raises(Refused, match="502"):
        client(fake).get("/b")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """A URL without scheme or host is told as such."""
    with pytest.raises(Misconfigured, match="http://127"):
        client(Fake(), url=url)
