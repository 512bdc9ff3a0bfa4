"""A command line whose service is a fake."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

import cli.main
from cli.client import Client, ClientSettings
from tests.support.fake_http_service import FakeService


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Format output for 160 columns."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    """The service that client commands speak to."""
    service = FakeService()
    clients: list[Client] = []

    def connect(settings: ClientSettings) -> Client:
        clients.append(Client(settings, transport=httpx.MockTransport(service)))
        return clients[-1]

    monkeypatch.setattr(cli.main, "Client", connect)
    return service
