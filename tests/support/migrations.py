"""Fast migration of test databases: the statements of the first migration of each dialect are recorded and replayed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event

from service.db.database import Database

#: beginnings of statements that change the database
MODIFYING_STATEMENTS = ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP", "DELETE")

_recorded: dict[str, list[tuple[str, Any]]] = {}  # by dialect


def migrate(database: Database) -> None:
    """Migrate a database as `Database.migrate` does. An empty database gets the recorded statements of its dialect."""
    dialect = database.engine.dialect.name
    if database.revision() is not None:
        database.migrate()
    elif dialect in _recorded:
        with database.engine.begin() as connection:
            for statement, parameters in _recorded[dialect]:
                connection.exec_driver_sql(statement, parameters)
    else:
        _recorded[dialect] = _record_migration(database)


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
