"""Migrated databases for tests, quickly: what the migrations said to the first empty one of a kind is said to the next."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event

from service.db.database import Database

#: how the statements begin that make and change, and do not only look
MODIFYING_STATEMENTS = ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP", "DELETE")

_recorded: dict[str, list[tuple[str, Any]]] = {}  # by dialect


def migrate(database: Database) -> None:
    """As `Database.migrate`, whose work on empty databases is remembered: it thinks for longer than it works."""
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
    """Migrate, and remember what was said."""
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
