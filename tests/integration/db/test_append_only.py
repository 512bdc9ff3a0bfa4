"""Constraints of the database: the ledger and the factors are append-only, and versions are consecutive."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, func, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from service.db.database import Database
from service.db.models import Job, LedgerEntry, Model, StoredFactors, now

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
    """Commit a ledger entry and its factors."""
    with database.write_session() as session:
        session.add(ledger_entry(1))
        session.add(StoredFactors(edit_id="edit_0", data=b"x", sha256="y"))


@pytest.mark.parametrize(
    "statement",
    [
        update(LedgerEntry).values(actor="nobody"),
        delete(LedgerEntry),
        update(StoredFactors).values(data=b"z"),
        delete(StoredFactors),
    ],
    ids=str,
)
def test_update_and_delete_are_rejected(database: Database, committed_edit: Any, statement: Any) -> None:
    """An update or delete of ledger entries or factors raises IntegrityError."""

    def change() -> None:
        with database.write_session() as session:
            session.execute(statement)

    with pytest.raises(IntegrityError, match="append-only"):
        change()


@pytest.mark.parametrize("table", ["ledger", "factors"])
def test_truncate_is_rejected(postgres_url: str, table: Any) -> None:
    """A TRUNCATE of the ledger or the factors raises IntegrityError."""
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
