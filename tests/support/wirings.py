"""The two wirings on which everything must behave alike: which stores the settings name, and nothing else."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

#: SQLite and the broker in the process; PostgreSQL and Redis
ALL_WIRINGS = ["embedded", pytest.param("production", marks=pytest.mark.servers)]

_numbers = count()


def store_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of empty stores of the wiring that the fixture is parametrised with."""
    return (
        {} if request.param == "embedded" else production_settings(request)
    )  # embedded, all is in the data folder


def production_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of empty stores on the servers of this session."""
    return {
        "database_url": request.getfixturevalue("postgres_server").fresh_database(),
        **redis_settings(request),
    }


def redis_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of an empty place in Redis."""
    url = request.getfixturevalue("redis_server").url
    return {"redis_url": url, "redis_prefix": f"test{next(_numbers)}"}
