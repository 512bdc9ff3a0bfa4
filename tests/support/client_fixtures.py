"""Fixtures that create clients of both kinds; a conftest.py imports those that its tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import client_kinds


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
