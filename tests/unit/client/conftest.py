"""A service to speak to, and one that is not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import client_kinds
from tests.support.fake_http_service import Fake
from tests.support.shipped_service import serving


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine reaches a test."""
    for name in os.environ:
        if name.startswith("PALIMPSEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def url(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real service answers."""
    with serving(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(params=client_kinds.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two clients."""
    return str(request.param)


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[..., Any]]:
    """Makes a client of this kind; all are closed at the end."""
    made: list[Any] = []

    def make(url: str, transport: Any = None, **more: Any) -> Any:
        made.append(client_kinds.client(kind, url, transport, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have let pass; none of them do."""
    seconds: list[float] = []

    async def awaited(_: object, pause: float) -> None:
        seconds.append(pause)

    monkeypatch.setattr("palimpsest.client._Hands.pause", lambda _, pause: seconds.append(pause))
    monkeypatch.setattr("palimpsest.client._AsyncHands.pause", awaited)
    return seconds


@pytest.fixture
def ask(connect: Callable[..., Any], paused: list[float]) -> Callable[[Fake], Any]:
    """A client of a service that is not there."""
    return lambda fake: connect("http://there", httpx.MockTransport(fake))
