"""`palimpsest serve` on the shipped GPT, with SQLite and with PostgreSQL."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Service, facts

BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.servers)]


@pytest.fixture(scope="session")
def table(shipped: Path) -> list[dict[str, Any]]:
    """The rows of facts.jsonl."""
    return facts(shipped)


@pytest.fixture(scope="session")
def prepared(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first start leaves for later ones: the statistics of the model."""
    data = tmp_path_factory.mktemp("first")
    Service(data).stop()
    return data / "statistics"


@pytest.fixture(scope="module", params=BOTH)
def service(
    request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One running service for all tests of a module. Each test takes back what it did."""
    url = None
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_server").fresh_database()
    data = tmp_path_factory.mktemp("service")
    shutil.copytree(prepared, data / "statistics")
    running = Service(data, url)
    yield running
    running.stop()


@pytest.fixture(params=BOTH)
def start(request: pytest.FixtureRequest, prepared: Path, tmp_path: Path) -> Iterator[Callable[[], Service]]:
    """Starts the service, each time on the same data folder and database; the last one is stopped at the end."""
    data = tmp_path / "data"
    shutil.copytree(prepared, data / "statistics")
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    started: list[Service] = []

    def begin() -> Service:
        started.append(Service(data, url))
        return started[-1]

    yield begin
    for one in started[:-1]:
        assert one.process.poll() is not None, "a service was left running beside another"
    if started and started[-1].process.poll() is None:
        started[-1].stop()
