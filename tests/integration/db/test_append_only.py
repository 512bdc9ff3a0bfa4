"""Constraints of the database: ledger, factors and audit records are append-only, and versions are consecutive."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, func, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from service.db.database import Database
from service.db.models import AuditRecord, Job, LedgerEntry, Model, StoredFactors, now

WRITERS = 6


def ledger_entry(version: int, edit: Any = "edit_0", model: Any = "m") -> Any:
    said = {"kind": "apply", "actor": "a", "body": {}, "state": "", "previous": "", "hash": ""}
    return LedgerEntry(model=model, version=version, edit_id=edit, at=now(), **said)


@pytest.fixture
def database(database: Database) -> Any:
    """Return a database with two models and one running edit per writer."""
    at = now()
    asked = {"kind": "edit", "status": "running", "request": {}, "actor": "a", "subject": "s"}
    with database.write_session() as session:
        for name in ("m", "other"):
            session.add(Model(fingerprint=name, name=name, info={}, tokenizer="", created=at, registered=at))
        session.flush()
        for n in range(WRITERS):
            session.add(Job(id=f"edit_{n}", model="m", created=at, updated=at, **asked))
    return database


@pytest.fixture
def committed_edit(database: Database) -> None:
    """Commit a ledger entry, its factors and an audit record."""
    with database.write_session() as session:
        session.add(ledger_entry(1))
        session.add(StoredFactors(edit_id="edit_0", data=b"x", sha256="y"))
        session.add(audit_record(1))


def audit_record(position: int) -> Any:
    texts = dict.fromkeys(("kind", "subject", "digest", "signer", "previous", "hash", "signature"), "")
    return AuditRecord(position=position, at=now(), body={}, **texts)


@pytest.mark.parametrize(
    "statement",
    [
        update(LedgerEntry).values(actor="nobody"),
        delete(LedgerEntry),
        update(StoredFactors).values(data=b"z"),
        delete(StoredFactors),
        update(AuditRecord).values(digest="z"),
        delete(AuditRecord),
    ],
    ids=str,
)
def test_update_and_delete_are_rejected(database: Database, committed_edit: Any, statement: Any) -> None:
    """An update or delete of ledger entries, factors or audit records raises IntegrityError."""

    def change() -> None:
        with database.write_session() as session:
            session.execute(statement)

    with pytest.raises(IntegrityError, match="append-only"):
        change()


REPLACING = {
    "factors": "INTO factors (edit_id, data, sha256) VALUES ('edit_0', 'z', 'z')",
    "factors by row id": "INTO factors (rowid, edit_id, data, sha256) VALUES (1, 'edit_1', 'z', 'z')",
    "ledger by version": "INTO ledger SELECT model, version, kind, 'edit_1', actor, at, body, state, previous, hash FROM ledger",
    "ledger by edit": "INTO ledger SELECT model, 2, kind, edit_id, actor, at, body, state, previous, hash FROM ledger",
    "ledger by row id": "INTO ledger (rowid, model, version, kind, edit_id, actor, at, body, state, previous, hash) "
    "SELECT 1, model, 2, kind, 'edit_1', actor, at, body, state, previous, hash FROM ledger",
    "audit records": "INTO audit_records SELECT position, 'z', subject, digest, body, at, signer, previous, hash, signature "
    "FROM audit_records",
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("what", REPLACING)
@pytest.mark.parametrize("verb", ["INSERT OR REPLACE", "REPLACE", "INSERT OR IGNORE"])
def test_replace_is_rejected(database: Database, committed_edit: Any, what: str, verb: str) -> None:
    """A REPLACE of a row of an append-only table of SQLite, by any of its keys, raises IntegrityError."""

    def snapshot() -> list[Any]:
        with database.engine.connect() as connection:
            tables = ("ledger", "factors", "audit_records")
            return [connection.execute(text(f"SELECT rowid, * FROM {table}")).all() for table in tables]

    before = snapshot()
    with pytest.raises(IntegrityError), database.engine.begin() as connection:
        connection.exec_driver_sql(f"{verb} {REPLACING[what]}")
    assert snapshot() == before


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("table", ["ledger", "factors"])
def test_update_or_replace_is_rejected(database: Database, committed_edit: Any, table: str) -> None:
    """SQLite's UPDATE OR REPLACE of an append-only table raises IntegrityError."""
    with pytest.raises(IntegrityError, match="append-only"), database.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE OR REPLACE {table} SET edit_id = 'edit_1'")


@pytest.mark.parametrize("table", ["ledger", "factors", "audit_records"])
def test_truncate_is_rejected(postgres_url: str, table: Any) -> None:
    """A TRUNCATE of the ledger, the factors or the audit records raises IntegrityError."""
    database = Database(postgres_url)
    database.migrate()
    with pytest.raises(IntegrityError, match="append-only"), database.write_session() as session:
        session.execute(text(f"TRUNCATE {table}"))
    database.close()


@pytest.mark.parametrize("version", [-1, 0, 1, 3, 100])
def test_versions_have_no_gap(database: Database, committed_edit: Any, version: int) -> None:
    """Only the next version of a model can be inserted."""

    def add() -> None:
        with database.write_session() as session:
            session.add(ledger_entry(version, "edit_1"))

    with pytest.raises(IntegrityError):
        add()
    with database.write_session() as session:
        session.add(ledger_entry(2, "edit_1"))
        session.add(ledger_entry(1, "edit_1", model="other"))


def test_concurrent_appends(database: Database) -> None:
    """Of concurrent connections that append the same version without the ledger lock, one commits."""
    barrier = threading.Barrier(WRITERS)
    strangers = create_engine(database.engine.url)  # without the settings of `Database`

    def append(n: Any) -> Any:
        try:
            with Session(strangers) as session, session.begin():
                head = session.scalar(select(func.max(LedgerEntry.version))) or 0
                barrier.wait()
                session.add(ledger_entry(head + 1, f"edit_{n}"))
            return True
        except DBAPIError:
            return False

    for turn in (1, 2):
        with ThreadPoolExecutor(WRITERS) as pool:
            landed = list(pool.map(append, range(WRITERS)))
        assert sum(landed) == 1
        with database.read_session() as session:
            assert session.scalars(select(LedgerEntry.version)).all() == list(range(1, turn + 1))
    strangers.dispose()
