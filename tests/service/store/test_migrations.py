"""The migrations make the tables, on both kinds of database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from service.errors import Misconfigured, Unavailable
from service.store.database import Database
from service.store.tables import Table


@pytest.fixture
def empty(database_url):
    database = Database(database_url)
    yield database
    database.close()


def tables(database):
    return set(inspect(database.engine).get_table_names())


def test_up_down_up(empty):
    """Migrating up makes every table, down takes every one away, and up again makes them again."""
    wanted = set(Table.metadata.tables)
    empty.migrate()
    assert tables(empty) == wanted | {"alembic_version"}
    empty.migrate("base")
    assert tables(empty) == {"alembic_version"}
    empty.migrate()
    assert tables(empty) == wanted | {"alembic_version"}


def test_models_match(empty):
    """Alembic finds no difference between the migrated tables and the models."""
    empty.migrate()
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": True})
        assert compare_metadata(context, Table.metadata) == []


def test_together(database_url):
    """Ten threads that migrate one database at once, each with its own pool, migrate it once."""
    barrier = Barrier(10)

    def migrate(_):
        database = Database(database_url)
        barrier.wait()
        database.migrate()
        database.close()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(migrate, range(10)))
    database = Database(database_url)
    with database.read() as session:
        assert session.execute(text("SELECT version_num FROM alembic_version")).all() == [("0001",)]
    database.close()


def test_failed_migration_leaves_nothing(empty):
    """A migration that fails half-way is as if it had not begun."""
    with empty.engine.begin() as connection:
        connection.execute(text("CREATE TABLE workers (id TEXT)"))  # in the way of the last table
    with pytest.raises(Exception, match="workers"):
        empty.migrate()
    assert tables(empty) - {"alembic_version"} == {"workers"}


def test_url_without_driver():
    """A plain postgresql:// URL takes the driver that we ship."""
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        assert Database(f"{scheme}://somebody@127.0.0.1/x").engine.driver == "psycopg"


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_url_that_cannot_work(url):
    """A URL that cannot work is refused with what to write, before anything connects."""
    with pytest.raises(Misconfigured, match=r"postgresql|sqlite|SQLite"):
        Database(url)


def test_unreachable(tmp_path):
    """A database that does not answer is a dependency that is down, not a crash."""
    database = Database(f"sqlite:///{tmp_path}/no/such/folder/x.sqlite3")
    with pytest.raises(Unavailable, match="database does not answer"):
        database.migrate()
