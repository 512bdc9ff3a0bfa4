"""Fixtures of the command line tests: a fake service."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import cli.client
from palimpsest import Client
from tests.support.fake_http_service import FakeService


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the terminal width to 160 columns."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """Return the fake service that client commands call."""
    service = FakeService()

    async def skip_sleep(_: object, seconds: float) -> None:
        pass

    def connect(url: str, key: str | None, **options: Any) -> Client:
        return Client(url, key, transport=httpx.MockTransport(service), **options)

    monkeypatch.setattr("palimpsest.transport.BlockingBackend.sleep", skip_sleep)
    monkeypatch.setattr(cli.client, "Client", connect)
    return service
