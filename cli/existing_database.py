"""The database of a service that has run, for commands that read or change what is in it. They create no data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import Misconfigured
from service.settings import Settings

if TYPE_CHECKING:
    from service.db.database import Database


def open_existing_database(settings: Settings) -> Database:
    """Return the database. Raises Misconfigured if there is none, or if it has no tables; creates neither a folder, nor
    a file, nor a ledger key."""
    from service.db.database import Database

    database = Database(
        settings.resolved_database_url(), settings.data_dir, settings.ledger_key, may_create_key=False
    )
    try:
        _require_tables(database)
    except BaseException:
        database.close()
        raise
    return database


def _require_tables(database: Database) -> None:
    path = str(database.engine.url.database)
    if database.is_sqlite and not Path(path).is_file():
        raise Misconfigured(
            f"there is no database {path}: name the data folder of the service with --data-dir (or PALIMPSEST_DATA_DIR), or its "
            "database with --database-url (or PALIMPSEST_DATABASE_URL)."
        )
    if database.revision() is None:
        raise Misconfigured(
            f"the database {path} has no tables: name that of a service that has run, or start the service with it first."
        )
