"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from service.bootstrap import Container, build_container
from service.db.database import Database
from service.settings import SHIPPED_MODEL, Settings
from tests.support import postgres_server as postgres
from tests.support import redis_server as redis_servers
from tests.support import wirings
from tests.support.migrations import migrate

# How long an example takes says how busy the machine is.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL of our own; skips with the reason where there is none, and fails in CI."""
    with postgres.run_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: postgres.PostgresServer) -> str:
    """The URL of a fresh, empty PostgreSQL database."""
    return postgres_server.fresh_database()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[redis_servers.RedisServer]:
    """A Redis of our own; skips with the reason where there is none, and fails in CI."""
    with redis_servers.run_redis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: redis_servers.RedisServer) -> str:
    """The URL of an empty Redis."""
    redis_server.flush()
    return redis_server.url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh, empty database of each kind that we promise to work on."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres_url")  # type: ignore[no-any-return]
    return f"sqlite:///{tmp_path / 'palimpsest.sqlite3'}"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database of each kind."""
    database = Database(database_url)
    migrate(database)
    yield database
    database.close()


@pytest.fixture(params=wirings.ALL_WIRINGS)
def wiring(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of empty stores of each wiring."""
    return wirings.store_settings(request)


@pytest.fixture
def container(wiring: dict[str, Any], tmp_path: Path) -> Iterator[Container]:
    """The parts of each wiring, put together and migrated."""
    container = build_container(Settings(data_dir=tmp_path, **wiring))
    migrate(container.database)
    yield container
    container.close()


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The shipped model; skips where it is not there, and fails in CI."""
    if not (SHIPPED_MODEL / "model.safetensors").exists():
        reason = "models/almanac is not there: train it with training/train.py"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return SHIPPED_MODEL
