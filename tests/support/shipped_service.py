"""Services with the shipped GPT. They share the key statistics, which the first start of a service computes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.settings import SHIPPED_MODEL
from tests.support.processes import EmbeddedService, wait_until

#: parameters with which an edit passes the guard and takes half the time
QUICK_PARAMETERS = {"contexts": 2, "steps": 10, "learning_rate": 1.0}


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


def model_of_quick_edits(folder: Path) -> Path:
    """Make a folder with the files of the shipped model and a quicker recipe, and return it."""
    model = folder / SHIPPED_MODEL.name
    model.mkdir(parents=True)
    for file in SHIPPED_MODEL.iterdir():
        if file.name != "recipe.json":
            (model / file.name).symlink_to(file)
    recipe = json.loads((SHIPPED_MODEL / "recipe.json").read_text(encoding="utf-8"))
    recipe["rome"] |= QUICK_PARAMETERS
    (model / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return model


@contextmanager
def running_service(data: Path, statistics_folder: Path) -> Iterator[str]:
    """Run `palimpsest serve` with a new data folder. Yield its address."""
    service = EmbeddedService(copy_statistics(statistics_folder, data))
    try:
        yield str(service.http.base_url).rstrip("/")
    finally:
        service.stop()
