"""Migrated databases for tests, quickly: what the migrations said to the first empty one of a kind is said to the next."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event

from service.db.database import Database

#: how the statements begin that make and change, and do not only look
CHANGES = ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP", "DELETE")

_said: dict[str, list[tuple[str, Any]]] = {}  # by dialect


def migrate(database: Database) -> None:
    """As `Database.migrate`, whose work on empty databases is remembered: it thinks for longer than it works."""
    dialect = database.engine.dialect.name
    if database.revision() is not None:
        database.migrate()
    elif dialect in _said:
        with database.engine.begin() as connection:
            for statement, parameters in _said[dialect]:
                connection.exec_driver_sql(statement, parameters)
    else:
        _said[dialect] = _listened(database)


def _listened(database: Database) -> list[tuple[str, Any]]:
    """Migrate, and remember what was said."""
    said: list[tuple[str, Any]] = []

    def hear(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.lstrip().startswith(CHANGES):
            said.append((statement, parameters or None))

    event.listen(database.engine, "before_cursor_execute", hear)
    try:
        database.migrate()
    finally:
        event.remove(database.engine, "before_cursor_execute", hear)
    return said
