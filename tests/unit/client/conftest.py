"""Clients of a fake service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.client_fixtures import connect, kind, paused
from tests.support.fake_http_service import FakeService

__all__ = ["connect", "kind", "paused"]


@pytest.fixture
def ask(connect: Callable[..., Any], paused: list[float]) -> Callable[[FakeService], Any]:
    """Return a function that creates a client of a `FakeService`."""
    return lambda fake: connect("http://there", httpx.MockTransport(fake))
