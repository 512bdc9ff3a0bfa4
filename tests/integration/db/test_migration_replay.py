"""Replayed migrations of test databases give the same schema as the migrations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from service.db.database import Database
from tests.support.migrations import migrate

#: queries for all schema objects with their definitions
SQLITE_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
POSTGRES_SCHEMA = """
WITH mine AS (SELECT oid, relname, relkind FROM pg_class WHERE relnamespace = current_schema()::regnamespace)
SELECT 'relation', relname, relkind::text FROM mine
UNION ALL SELECT relname, attname, concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid))
    FROM mine JOIN pg_attribute ON attrelid = mine.oid LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
UNION ALL SELECT relname, conname, pg_get_constraintdef(c.oid) FROM mine JOIN pg_constraint c ON conrelid = mine.oid
UNION ALL SELECT relname, 'index', pg_get_indexdef(mine.oid, 0, false) FROM mine WHERE relkind = 'i'
UNION ALL SELECT relname, tgname, pg_get_triggerdef(t.oid) FROM mine JOIN pg_trigger t ON tgrelid = mine.oid AND NOT tgisinternal
UNION ALL SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
ORDER BY 1, 2, 3
"""


@pytest.fixture(params=["sqlite", "postgres"])
def new_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Return a function that returns the URL of a new empty database at each call."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres_server").fresh_database  # type: ignore[no-any-return]
    files = iter(range(9))
    return lambda: f"sqlite:///{tmp_path / str(next(files))}"


def schema_objects(database: Database) -> list[tuple[object, ...]]:
    with database.engine.connect() as connection:
        schema = None if database.is_sqlite else connection.execute(text("SELECT current_schema()")).scalar()
        rows = connection.execute(text(SQLITE_SCHEMA if database.is_sqlite else POSTGRES_SCHEMA)).all()
        versions = connection.execute(text("SELECT version_num FROM alembic_version")).all()
    named = [tuple(str(x).replace(f"{schema}.", "") for x in row) for row in rows]
    return [*named, *map(tuple, versions)]


def test_replayed_migrations_make_the_same_schema(new_database_url: Callable[[], str]) -> None:
    """Replayed migrations make the same tables, columns, constraints, indexes, triggers, functions and
    revision as the migrations."""
    truly, first, again = (Database(new_database_url()) for _ in range(3))
    try:
        truly.migrate()
        for database in (first, again, again):  # the second migration of `again` changes nothing
            migrate(database)
        assert len(schema_objects(truly)) > 20
        assert schema_objects(truly) == schema_objects(first) == schema_objects(again)
    finally:
        for database in (truly, first, again):
            database.close()
