"""Fast migration of test databases: SQLite gets a copy of the first migrated database, and PostgreSQL the recorded
statements of the first migration."""

from __future__ import annotations

import sqlite3
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import event

from service.db.database import Database

#: beginnings of statements that change the database
MODIFYING_STATEMENTS = ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP", "DELETE")

_recorded: list[tuple[str, Any]] = []  # the statements for PostgreSQL


def migrate(database: Database) -> None:
    """Migrate a database as `Database.migrate` does."""
    if database.is_sqlite:
        _migrate_sqlite(database)
    elif database.revision() is not None:
        database.migrate()
    elif _recorded:
        with database.engine.begin() as connection:
            for statement, parameters in _recorded:
                connection.exec_driver_sql(statement, parameters)
    else:
        _recorded[:] = _record_migration(database)


def _migrate_sqlite(database: Database) -> None:
    with database.engine.connect() as connection:
        is_empty = connection.exec_driver_sql("PRAGMA schema_version").scalar() == 0
    if not is_empty:
        database.migrate()
        return
    connection = database.engine.raw_connection()
    try:
        _migrated_sqlite().backup(connection.driver_connection)
    finally:
        connection.close()


@cache
def _migrated_sqlite() -> sqlite3.Connection:
    """Return a migrated database in memory."""
    copy = sqlite3.connect(":memory:", check_same_thread=False)
    with TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{Path(folder) / 'migrated.sqlite3'}")
        database.migrate()
        connection = database.engine.raw_connection()
        connection.driver_connection.backup(copy)
        connection.close()
        database.close()
    return copy


def _record_migration(database: Database) -> list[tuple[str, Any]]:
    """Migrate a database, and return its statements."""
    statements: list[tuple[str, Any]] = []

    def record(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.lstrip().startswith(MODIFYING_STATEMENTS):
            statements.append((statement, parameters or None))

    event.listen(database.engine, "before_cursor_execute", record)
    try:
        database.migrate()
    finally:
        event.remove(database.engine, "before_cursor_execute", record)
    return statements
