"""Fixtures of the tests of the HTTP API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from tests.support.application import FakeWorker, TestApp
from tests.support.local_server import run_http_server


@pytest.fixture
def test_app(tmp_path: Path, wiring: dict[str, Any]) -> Iterator[TestApp]:
    """An application without a worker: jobs stay queued."""
    built = TestApp(tmp_path, **wiring)
    yield built
    built.close()


@pytest.fixture
def make_app(tmp_path: Path, wiring: dict[str, Any]) -> Iterator[Callable[..., TestApp]]:
    """A function that returns an application with a model of other properties."""
    built: list[TestApp] = []

    def make(**options: Any) -> TestApp:
        built.append(TestApp(tmp_path, **wiring, **options))
        return built[-1]

    yield make
    for test_app in built:
        test_app.close()


@pytest.fixture
def worker(test_app: TestApp) -> FakeWorker:
    return test_app.start_fake_worker()


@pytest.fixture
def client(test_app: TestApp) -> Iterator[TestClient]:
    with TestClient(test_app.app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def http_client(test_app: TestApp) -> Iterator[httpx.Client]:
    """A client of the application, which is served on its own port."""
    with run_http_server(test_app.app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
