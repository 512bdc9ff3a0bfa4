"""The two wirings of the service. They differ only in the stores that the settings name."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

#: SQLite and the broker in the process; PostgreSQL and Redis
ALL_WIRINGS = ["embedded", "production"]

_prefix_numbers = count()


def store_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of empty stores for the wiring in `request.param`; {} for the embedded one."""
    return {} if request.param == "embedded" else production_settings(request)


def production_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of an empty PostgreSQL database and an unused Redis prefix."""
    return {
        "database_url": request.getfixturevalue("postgres_server").fresh_database(),
        **redis_settings(request),
    }


def redis_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of an unused prefix in Redis."""
    url = request.getfixturevalue("redis_server").url
    return {"redis_url": url, "redis_prefix": f"test{next(_prefix_numbers)}"}
