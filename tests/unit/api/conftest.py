"""Fixtures of the HTTP door."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from tests.support.application import FakeWorker, House
from tests.support.local_server import listening


@pytest.fixture
def house(tmp_path: Path, wiring: dict[str, Any]) -> Iterator[House]:
    """A house without a worker, on each wiring: what is queued stays queued."""
    built = House(tmp_path, **wiring)
    yield built
    built.close()


@pytest.fixture
def worker(house: House) -> FakeWorker:
    return house.hire()


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    with TestClient(house.app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def served(house: House) -> Iterator[httpx.Client]:
    """A client of the application on a port of its own."""
    with listening(house.app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
