"""Services with the shipped GPT. They share the key statistics, which the first start of a service computes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import EmbeddedService, wait_until


@pytest.fixture(scope="session")
def statistics_folder(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the key statistics that the first start of a service computes, once for all processes of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    data, complete = folder / "first-start", folder / "first-start.complete"
    with (folder / "first-start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            service = EmbeddedService(data, threads=1)
            wait_for_statistics(service)
            service.stop()
            complete.touch()
    return data / "statistics"


def wait_for_statistics(service: EmbeddedService) -> None:
    """Wait until a service has prepared what edits need."""

    def is_prepared() -> bool:
        (model,) = service.http.get("/models").json()["items"]
        return bool(model["statistics"]) and not any(worker["preparing"] for worker in model["workers"])

    wait_until(is_prepared, "the statistics")


def copy_statistics(statistics_folder: Path, data: Path) -> Path:
    """Copy the statistics into a data folder, and return the data folder."""
    shutil.copytree(statistics_folder, data / "statistics", dirs_exist_ok=True)
    return data


@contextmanager
def running_service(data: Path, statistics_folder: Path) -> Iterator[str]:
    """Run `palimpsest serve` with a new data folder. Yield its address."""
    service = EmbeddedService(copy_statistics(statistics_folder, data))
    try:
        yield str(service.http.base_url).rstrip("/")
    finally:
        service.stop()
