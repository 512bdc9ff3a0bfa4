"""A service to speak to, and one that is not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import client_kinds
from tests.support.fake_http_service import FakeService
from tests.support.shipped_service import running_service


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine reaches a test."""
    for name in os.environ:
        if name.startswith("PALIMPSEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def url(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real service answers."""
    with running_service(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(params=client_kinds.CLIENT_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two clients."""
    return str(request.param)


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[..., Any]]:
    """Makes a client of this kind; all are closed at the end."""
    clients: list[Any] = []

    def make(url: str, transport: Any = None, **more: Any) -> Any:
        clients.append(client_kinds.make_client(kind, url, transport, **more))
        return clients[-1]

    yield make
    for one in clients:
        one.close()


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have let pass; none of them do."""
    seconds: list[float] = []

    async def awaited(_: object, pause: float) -> None:
        seconds.append(pause)

    monkeypatch.setattr("palimpsest.client._HttpxBackend.sleep", lambda _, pause: seconds.append(pause))
    monkeypatch.setattr("palimpsest.client._AsyncHttpxBackend.sleep", awaited)
    return seconds


@pytest.fixture
def ask(connect: Callable[..., Any], paused: list[float]) -> Callable[[FakeService], Any]:
    """A client of a service that is not there."""
    return lambda fake: connect("http://there", httpx.MockTransport(fake))
