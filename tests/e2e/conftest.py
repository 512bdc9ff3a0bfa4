"""The shipped GPT behind HTTP: `palimpsest serve` with all embedded, and API and worker on PostgreSQL and Redis."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import wirings
from tests.support.processes import Deployment, Service, facts

Running = Service | Deployment


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


@pytest.fixture(scope="module", params=wirings.BOTH)
def service(
    request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One running service for all tests of a module. Each test takes back what it did."""
    running = begun(tmp_path_factory.mktemp("service"), prepared, wirings.stores(request))
    yield running
    running.stop()


@pytest.fixture(params=wirings.BOTH)
def start(request: pytest.FixtureRequest, prepared: Path, tmp_path: Path) -> Iterator[Callable[[], Running]]:
    """Starts the service, each time on the same data folder and stores; the last one is stopped at the end."""
    stores = wirings.stores(request)
    started: list[Running] = []

    def begin() -> Running:
        assert not any(one.alive() for one in started), "a service was left running beside another"
        started.append(begun(tmp_path, prepared, stores))
        return started[-1]

    yield begin
    if started and started[-1].alive():
        started[-1].stop()


@pytest.fixture(scope="module")
def deploy(
    request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Deployment]]:
    """Puts a deployment up, on stores of its own; all of it is stopped at the end."""
    deployed: list[Deployment] = []

    def put_up(workers: int = 1) -> Deployment:
        data = tmp_path_factory.mktemp("deployment")
        shutil.copytree(prepared, data / "statistics")
        deployed.append(Deployment(data, wirings.production(request), workers))
        return deployed[-1]

    yield put_up
    for one in deployed:
        one.stop()


def begun(folder: Path, prepared: Path, stores: dict[str, Any]) -> Running:
    """The service in the shape that its stores are for."""
    data = folder / "data"
    shutil.copytree(prepared, data / "statistics", dirs_exist_ok=True)
    return Deployment(data, stores) if stores else Service(data)
