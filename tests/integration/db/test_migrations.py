"""The migrations create the tables on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text

from service.db.database import MIGRATIONS_DIR, Database, alembic_config
from service.db.models import Base, Job
from service.errors import Misconfigured, Unavailable
from service.kit.search_text import search_text

#: forks ten processes after the imports, and lets them migrate at the same time
MIGRATE_SCRIPT = """
import os, sys
import alembic.command, alembic.ddl, alembic.runtime.migration
from service.db.database import Database

gate, go = os.pipe()
for _ in range(10):
    if os.fork() == 0:
        os.close(go)
        os.read(gate, 1)
        Database(sys.argv[1]).migrate()
        os._exit(0)
os.close(go)
sys.exit(sum(os.wait()[1] != 0 for _ in range(10)))
"""


@pytest.fixture
def empty(database_url: str) -> Iterator[Any]:
    database = Database(database_url)
    yield database
    database.close()


def tables(database: Database) -> Any:
    return set(inspect(database.engine).get_table_names())


def test_up_down_up(empty: Any) -> None:
    """Upgrading creates every table, downgrading drops them all, and upgrading again creates them again."""
    wanted = set(Base.metadata.tables)
    empty.migrate()
    assert tables(empty) == wanted | {"alembic_version"}
    empty.migrate("base")
    assert tables(empty) == {"alembic_version"}
    empty.migrate()
    assert tables(empty) == wanted | {"alembic_version"}


def test_models_match(empty: Any) -> None:
    """Alembic finds no difference between the migrated tables and the models."""
    empty.migrate()
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []


REVISION_COUNT = len(list((MIGRATIONS_DIR / "versions").glob("0*.py")))


@pytest.mark.parametrize("steps", range(1, REVISION_COUNT + 1))
def test_down_and_up_with_rows(empty: Any, steps: Any) -> None:
    """Downgrading by any number of migrations and upgrading again succeeds with rows in the tables. The ledger
    is kept unless its table is dropped."""
    empty.migrate()
    with empty.engine.begin() as connection:
        for statement in ROWS:
            connection.execute(text(statement))
    with empty.engine.begin() as connection:
        command.downgrade(alembic_config(connection), f"-{steps}")
    empty.migrate()
    with empty.read_session() as session:
        left = session.execute(text("SELECT version FROM ledger")).all()
    assert left == ([(1,)] if steps < REVISION_COUNT else [])


ROWS = [
    "INSERT INTO models VALUES ('m', 'm', '{}', '', '2026-01-01', '2026-01-01')",
    """INSERT INTO jobs (id, kind, model, status, request, actor, created, updated, attempts, cancel_requested, subject, dry_run)
    VALUES ('edit_1', 'edit', 'm', 'applied', '{}', 'a', '2026-01-01', '2026-01-01', 1, false, 's', false)""",
    "INSERT INTO factors VALUES ('edit_1', 'x', 'y')",
    "INSERT INTO job_artifacts VALUES ('edit_1', 'x', 'y')",
    "INSERT INTO ledger VALUES ('m', 1, 'apply', 'edit_1', 'a', '2026-01-01', '{}', '', '', '')",
]


def test_names_of_revision_4(empty: Any) -> None:
    """Revision 0004 renames a status and a column, and adds error codes. Downgrading restores the old
    rows."""
    empty.migrate("0003")
    insert_job = """INSERT INTO jobs (id, kind, model, status, request, actor, created, updated, attempts, cancel_requested,
        subject, dry_run, dead, error)
        VALUES (:id, 'edit', 'm', :status, '{}', 'a', '2026-01-01', '2026-01-01', 1, false, 's', false, :dead, :error)"""
    failed = {"title": "The job was given up", "detail": "its worker died 3 times."}
    cancelled = {"title": "The job failed", "detail": "out of memory"}
    errors = {"evaluated": None, "failed": failed, "cancelled": cancelled}
    with empty.engine.begin() as connection:
        connection.execute(text(ROWS[0]))
        for status, error in errors.items():
            values = {
                "id": status,
                "status": status,
                "dead": status == "failed",
                "error": error and json.dumps(error),
            }
            connection.execute(text(insert_job), values)
    empty.migrate()
    with empty.read_session() as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
    assert jobs["evaluated"].status == "dry_run_passed" and jobs["evaluated"].error is None
    assert [jobs[name].exhausted for name in errors] == [False, True, False]
    assert jobs["failed"].error == {"code": "attempts_exhausted", **failed}
    assert jobs["cancelled"].error == {"code": "internal_error", **cancelled}
    empty.migrate("0003")
    with empty.engine.connect() as connection:
        rows = connection.execute(text("SELECT id, status, dead, error FROM jobs")).all()
    assert {row.id: (row.status, bool(row.dead), row.error and json.loads(row.error)) for row in rows} == {
        status: (status, status == "failed", error) for status, error in errors.items()
    }


def test_searched_texts_of_revision_11(empty: Any) -> None:
    """Revision 0011 fills the searched text of the edits that exist, as a new edit has it, and of no other job."""
    empty.migrate("0010")
    insert_job = """INSERT INTO jobs (id, kind, model, status, request, result, actor, created, updated, attempts,
        cancel_requested, subject, dry_run) VALUES (:id, :kind, 'm', 'applied', :request, :result, 'a', '2026-01-01',
        '2026-01-01', 1, false, 's', false)"""
    request = {"subject": "Nile ", "prompt": "{} IS", "target_new": "lang", "target_true": None}
    result = {"target_true": "STRAẞE"}
    with empty.engine.begin() as connection:
        connection.execute(text(ROWS[0]))
        for number in range(60):
            values = {"id": f"edit_{number}", "kind": "edit", "request": json.dumps(request)}
            connection.execute(text(insert_job), values | {"result": json.dumps(result) if number else None})
        values = {"id": "trace_1", "kind": "trace", "request": json.dumps(request)}
        connection.execute(text(insert_job), values | {"result": None})
    empty.migrate()
    with empty.read_session() as session:
        texts = {row.id: row.search_text for row in session.execute(select(Job.id, Job.search_text))}
    assert texts.pop("trace_1") is None
    assert texts.pop("edit_0") == search_text(request)
    assert set(texts.values()) == {search_text(request, result)} and len(texts) == 59


def test_to_a_revision(empty: Any) -> None:
    """`migrate` upgrades or downgrades to the given revision."""
    for revision in ("0001", "0008", "0004", "0003", "0002", "0001"):
        empty.migrate(revision)
        assert empty.revision() == revision


def test_revision_of_a_newer_release(empty: Any) -> None:
    """Migrating tables of a newer release raises Misconfigured and leaves them unchanged."""
    empty.migrate()
    with empty.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Misconfigured, match=r"9999.*newer"):
        empty.migrate()
    assert empty.revision() == "9999"


def test_unknown_revision(empty: Any) -> None:
    """An unknown revision raises Misconfigured with a list of the known ones."""
    with pytest.raises(Misconfigured, match="0001, 0002, 0003, 0004"):
        empty.migrate("0815")


def test_concurrent_migrations(database_url: str) -> None:
    """When ten processes migrate one database at the same time, all succeed."""
    done = subprocess.run(
        [sys.executable, "-c", MIGRATE_SCRIPT, database_url], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    database = Database(database_url)
    with database.engine.connect() as connection:
        newest = ScriptDirectory.from_config(alembic_config(connection)).get_current_head()
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [(newest,)]
    database.close()


def test_failed_migration_leaves_nothing(empty: Any) -> None:
    """A failed migration leaves none of its tables."""
    with empty.engine.begin() as connection:
        connection.execute(text("CREATE TABLE workers (id TEXT)"))  # conflicts with the last table
    with pytest.raises(Exception, match="workers"):
        empty.migrate()
    assert tables(empty) - {"alembic_version"} == {"workers"}


def test_url_without_driver() -> None:
    """A PostgreSQL URL without a driver uses psycopg."""
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        assert Database(f"{scheme}://somebody@127.0.0.1/x").engine.driver == "psycopg"


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_url_that_cannot_work(url: str) -> None:
    """An unsupported URL raises Misconfigured with the supported forms, before any connection is made."""
    with pytest.raises(Misconfigured, match=r"postgresql|sqlite|SQLite"):
        Database(url)


def test_unreachable(tmp_path: Path) -> None:
    """Migrating a database that cannot be opened raises Unavailable."""
    database = Database(f"sqlite:///{tmp_path}/no/such/folder/x.sqlite3")
    with pytest.raises(Unavailable, match="database does not answer"):
        database.migrate()
