"""A running service and a fake one."""

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
    """Remove PALIMPSEST_* variables of the machine."""
    for name in os.environ:
        if name.startswith("PALIMPSEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def url(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service on the shipped GPT."""
    with running_service(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(params=client_kinds.CLIENT_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The client class under test: sync or async."""
    return str(request.param)


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[..., Any]]:
    """Create clients of this kind; all are closed after the test."""
    clients: list[Any] = []

    def make(url: str, transport: Any = None, **more: Any) -> Any:
        clients.append(client_kinds.make_client(kind, url, transport, **more))
        return clients[-1]

    yield make
    for one in clients:
        one.close()


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays that the client requested. It does not sleep."""
    seconds: list[float] = []

    async def record(_: object, pause: float) -> None:
        seconds.append(pause)

    monkeypatch.setattr("palimpsest.transport.BlockingBackend.sleep", record)
    monkeypatch.setattr("palimpsest.transport.AsyncBackend.sleep", record)
    return seconds


@pytest.fixture
def ask(connect: Callable[..., Any], paused: list[float]) -> Callable[[FakeService], Any]:
    """A client of a `FakeService`."""
    return lambda fake: connect("http://there", httpx.MockTransport(fake))
