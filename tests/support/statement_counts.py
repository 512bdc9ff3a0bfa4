"""A count of what a block of code reads and executes in a database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event

from service.db.database import Database
from service.db.models import Base


@contextmanager
def counting_statements_and_rows(database: Database) -> Iterator[dict[str, int]]:
    """Count the SQL statements and the rows that the ORM loads."""
    counts = {"statements": 0, "rows": 0}

    def count_statement(*_: Any) -> None:
        counts["statements"] += 1

    def count_row(*_: Any) -> None:
        counts["rows"] += 1

    event.listen(database.engine, "before_cursor_execute", count_statement)
    event.listen(Base, "load", count_row, propagate=True)
    event.listen(Base, "refresh", count_row, propagate=True)
    try:
        yield counts
    finally:
        event.remove(database.engine, "before_cursor_execute", count_statement)
        event.remove(Base, "load", count_row)
        event.remove(Base, "refresh", count_row)
