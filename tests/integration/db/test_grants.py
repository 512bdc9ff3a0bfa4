"""The role of the service in PostgreSQL: it does everything that the service does, and cannot disable its triggers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from service.db.database import Database
from service.db.grants import grant_to_role
from service.errors import Misconfigured
from service.jobs.worker_session import delete_all_workers
from tests.support.audit_history import AuditedLedger
from tests.support.postgres_server import PostgresServer

ROLE = "palimpsest_app"


@pytest.fixture
def owner(postgres_server: PostgresServer) -> Iterator[Database]:
    """Yield a migrated database as its owner, whose tables the role may use."""
    database = Database(postgres_server.fresh_database())
    database.migrate()
    grant_to_role(database, ROLE, "it's secret")
    yield database
    database.close()
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"DROP OWNED BY {ROLE}")
        connection.execute(f"DROP ROLE {ROLE}")


@pytest.fixture
def application(owner: Database, tmp_path: Path) -> Iterator[Database]:
    """Yield the same database as the role of the service."""
    database = Database(owner.engine.url.set(username=ROLE), tmp_path)
    yield database
    database.close()


def test_the_service_works(application: Database, tmp_path: Path) -> None:
    """The role migrates a database that is at head, edits, reverts, retries, attests, creates keys and verifies."""
    application.migrate()
    history = AuditedLedger(application, tmp_path)
    history.services.jobs.retry(history.failed, "somebody")
    delete_all_workers(application)
    assert history.verify()["ok"]


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER ledger_update ON ledger",
        "ALTER TABLE ledger DISABLE TRIGGER ALL",
        "DROP FUNCTION append_only() CASCADE",
        "CREATE OR REPLACE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'",
        "SET session_replication_role = replica",
        "ALTER TABLE audit_records OWNER TO current_user",
        "DROP TABLE audit_records",
        *(f"TRUNCATE {table} CASCADE" for table in ("ledger", "factors", "audit_records", "jobs")),
        *(f"DELETE FROM {table}" for table in ("ledger", "factors", "audit_records", "api_keys")),
        "UPDATE ledger SET actor = 'nobody'",
        "UPDATE factors SET sha256 = ''",
        "UPDATE audit_records SET kind = ''",
        "UPDATE alembic_version SET version_num = '0001'",
        "CREATE TABLE other (x integer)",
        "SET ROLE postgres",
    ],
)
def test_the_role_cannot(application: Database, statement: str) -> None:
    """Statements that would remove a guard, or change a row of an append-only table, are not permitted."""
    with (
        pytest.raises(DBAPIError, match=r"permission denied|must be owner"),
        application.engine.begin() as connection,
    ):
        connection.execute(text(statement))


def test_gaps_are_rejected_for_the_role(application: Database) -> None:
    """The triggers apply to the inserts of the role."""
    with pytest.raises(IntegrityError, match="next position"), application.write_session() as session:
        session.execute(
            text("INSERT INTO audit_records VALUES (7, 'edit', 'x', '', '{}', now(), '', '', '', '')")
        )


def test_older_tables_need_the_owner(owner: Database, application: Database) -> None:
    """At start the role cannot migrate older tables, and the error says who can."""
    owner.migrate("0004")
    with pytest.raises(Misconfigured, match="palimpsest migrate` as their owner"):
        application.migrate()


def test_grants_can_be_repeated(owner: Database, application: Database) -> None:
    """Granting again, without a password, changes nothing."""
    grant_to_role(owner, ROLE)
    application.migrate()


def test_a_powerful_role_is_refused(owner: Database, tmp_path: Path) -> None:
    """The owner and a superuser are refused, and so is SQLite."""
    with pytest.raises(Misconfigured, match="superuser"):
        grant_to_role(owner, "postgres")
    database = Database(f"sqlite:///{tmp_path / 'x.sqlite3'}")
    with pytest.raises(Misconfigured, match="SQLite"):
        grant_to_role(database, ROLE)
