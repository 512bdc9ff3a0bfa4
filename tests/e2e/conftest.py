"""The shipped GPT behind HTTP: `palimpsest serve`, and API and workers on PostgreSQL and Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import wirings
from tests.support.processes import Deployment, EmbeddedService, RunningService, read_fact_rows
from tests.support.shipped_service import copy_statistics, statistics_folder

__all__ = ["statistics_folder"]


@pytest.fixture(scope="session")
def fact_rows(shipped: Path) -> list[dict[str, Any]]:
    """Return the rows of facts.jsonl."""
    return read_fact_rows(shipped)


@pytest.fixture(scope="module", params=wirings.ALL_WIRINGS)
def service(
    request: pytest.FixtureRequest, statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """Run one service of each wiring for all tests of a module. Each test reverts its edits."""
    running = launch_service(
        tmp_path_factory.mktemp("service"), statistics_folder, wirings.store_settings(request)
    )
    yield running
    running.stop()


@pytest.fixture(params=wirings.ALL_WIRINGS)
def start_service(
    request: pytest.FixtureRequest, statistics_folder: Path, tmp_path: Path
) -> Iterator[Callable[[], RunningService]]:
    """Return a function that starts the service with the same data folder and stores; the last is stopped at the
    end."""
    stores = wirings.store_settings(request)
    started: list[RunningService] = []

    def begin() -> RunningService:
        assert not any(one.alive() for one in started), "another service is still running"
        started.append(launch_service(tmp_path, statistics_folder, stores))
        return started[-1]

    yield begin
    if started and started[-1].alive():
        started[-1].stop()


@pytest.fixture(scope="module")
def start_deployment(
    request: pytest.FixtureRequest, statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Deployment]]:
    """Return a function that starts a deployment with its own stores; all are stopped at the end."""
    deployments: list[Deployment] = []

    def put_up(workers: int = 1) -> Deployment:
        data = copy_statistics(statistics_folder, tmp_path_factory.mktemp("deployment"))
        deployments.append(Deployment(data, wirings.production_settings(request), workers))
        return deployments[-1]

    yield put_up
    for one in deployments:
        one.stop()


def launch_service(folder: Path, statistics_folder: Path, stores: dict[str, Any]) -> RunningService:
    """Start a deployment if there are stores, else the embedded service."""
    data = copy_statistics(statistics_folder, folder / "data")
    return Deployment(data, stores) if stores else EmbeddedService(data)
