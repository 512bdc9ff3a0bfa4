"""Fixtures of integration tests: each test that uses them runs on both wirings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import wirings


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database of each supported kind."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'palimpsest.sqlite3'}"


@pytest.fixture(params=wirings.ALL_WIRINGS)
def wiring(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of empty stores, for each wiring."""
    return wirings.store_settings(request)
