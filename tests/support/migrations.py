"""Fast migration of test databases: SQLite gets a copy of a migrated database, and PostgreSQL the recorded statements
of the first migration."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from sqlalchemy import event

from service.db.database import Database

#: beginnings of statements that change the database
MODIFYING_STATEMENTS = ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP", "DELETE")

_recorded: list[str] = []  # the statements for PostgreSQL


def migrate(database: Database) -> None:
    """Migrate a database as `Database.migrate` does."""
    if database.is_sqlite:
        _migrate_sqlite(database)
    elif database.revision() is not None:
        database.migrate()
    elif _recorded:
        with driver_connection(database) as connection:
            connection.execute(";\n".join(_recorded))  # one round trip
            connection.commit()
    else:
        _recorded[:] = _record_migration(database)


def _migrate_sqlite(database: Database) -> None:
    with driver_connection(database) as connection:
        is_empty = connection.execute("PRAGMA schema_version").fetchone() == (0,)
        if is_empty:
            _migrated_sqlite().backup(connection)
    if not is_empty:
        database.migrate()


@cache
def _migrated_sqlite() -> sqlite3.Connection:
    """Return a migrated database in memory."""
    copy = sqlite3.connect(":memory:", check_same_thread=False)
    with TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{Path(folder) / 'migrated.sqlite3'}")
        database.migrate()
        with driver_connection(database) as connection:
            connection.backup(copy)
        database.close()
    return copy


@contextmanager
def driver_connection(database: Database) -> Iterator[Any]:
    """Yield the driver's connection, outside a transaction."""
    pooled = database.engine.raw_connection()
    try:
        yield pooled.driver_connection
    finally:
        pooled.close()


def _record_migration(database: Database) -> list[str]:
    """Migrate a database, and return its statements."""
    statements: list[str] = []

    def record(_: Any, cursor: psycopg.Cursor, statement: str, parameters: Any, *__: Any) -> None:
        if statement.lstrip().startswith(MODIFYING_STATEMENTS):
            statements.append(psycopg.ClientCursor(cursor.connection).mogrify(statement, parameters))

    event.listen(database.engine, "before_cursor_execute", record)
    try:
        database.migrate()
    finally:
        event.remove(database.engine, "before_cursor_execute", record)
    return statements
