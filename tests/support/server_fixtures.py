"""Fixtures of PostgreSQL and Redis, one server of each per test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import postgres_server as postgres
from tests.support import redis_server as redis


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.PostgresServer]:
    """Start a PostgreSQL server. Skip with the reason where it is not installed; fail in CI."""
    with postgres.run_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: postgres.PostgresServer) -> str:
    """Return the URL of an empty PostgreSQL database."""
    return postgres_server.fresh_database()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[redis.RedisServer]:
    """Start a Redis server. Skip with the reason where it is not installed; fail in CI."""
    with redis.run_redis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: redis.RedisServer) -> str:
    """Return the URL of the Redis server after deleting all of its keys."""
    redis_server.flush()
    return redis_server.url
