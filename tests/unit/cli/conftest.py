"""The command line with a fake service."""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest

import cli.client
from palimpsest import Client
from tests.support.fake_http_service import FakeService


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove PALIMPSEST_* variables of the machine."""
    for name in os.environ:
        if name.startswith("PALIMPSEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """The service that client commands call."""
    service = FakeService()

    async def skip_sleep(_: object, seconds: float) -> None:
        pass

    def connect(url: str, key: str | None, **options: Any) -> Client:
        return Client(url, key, transport=httpx.MockTransport(service), **options)

    monkeypatch.setattr("palimpsest.transport.BlockingBackend.sleep", skip_sleep)
    monkeypatch.setattr(cli.client, "Client", connect)
    return service
