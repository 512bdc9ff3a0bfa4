"""When requests without a key are accepted: service.application.development."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from service.application.api_keys import ApiKeys
from service.application.development import (
    MARKER_NAME,
    Development,
    KeylessAccess,
    KeyMarker,
    development_mode,
)
from service.db.database import Database
from service.db.models import ApiKey
from service.settings import Settings


def empty_table(database: Database) -> None:
    with database.write_session() as session:
        session.execute(delete(ApiKey))


def is_allowed(database: Database, folder: Path, mode: Development = Development.UNTIL_FIRST_KEY) -> bool:
    """Return what a process that has just started answers."""
    return KeylessAccess(mode, KeyMarker(folder)).is_allowed(ApiKeys(database))


def test_an_emptied_table_opens_nothing(database: Database, tmp_path: Path) -> None:
    """Once a process has seen a key, requests without one are refused, also after the table is emptied and the process
    restarted. Only a start with --development accepts them."""
    assert is_allowed(database, tmp_path)
    assert not (tmp_path / MARKER_NAME).exists()
    ApiKeys(database).create("first", ["read"])
    assert not is_allowed(database, tmp_path)
    empty_table(database)
    assert not is_allowed(database, tmp_path)
    assert is_allowed(database, tmp_path, Development.ON)


def test_a_running_process_remembers_the_key(database: Database, tmp_path: Path) -> None:
    """A process whose data folder cannot be written remembers the key while it runs."""
    access = KeylessAccess(Development.UNTIL_FIRST_KEY, KeyMarker(tmp_path / "palimpsest.sqlite3" / "below"))
    (tmp_path / "palimpsest.sqlite3").touch()
    ApiKeys(database).create("first", ["read"])
    assert not access.is_allowed(ApiKeys(database))
    empty_table(database)
    assert not access.is_allowed(ApiKeys(database))


def test_without_development_mode_a_key_is_needed(database: Database, tmp_path: Path) -> None:
    """With the mode off, requests without a key are refused although no key exists."""
    assert not is_allowed(database, tmp_path, Development.OFF)


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ({}, Development.UNTIL_FIRST_KEY),
        ({"development": True}, Development.ON),
        ({"development": False}, Development.OFF),
        ({"api_key": "k" * 16}, Development.OFF),
        ({"database_url": "postgresql://db/palimpsest"}, Development.OFF),
        ({"redis_url": "redis://queue"}, Development.OFF),
        ({"redis_url": "redis://queue", "development": True}, Development.ON),
    ],
)
def test_only_an_unconfigured_service_is_in_development_mode(
    configured: dict[str, Any], expected: Development
) -> None:
    """The mode is that of --development; without it, the default where neither a key nor a store is configured."""
    assert development_mode(Settings(**configured), Development.UNTIL_FIRST_KEY) is expected
