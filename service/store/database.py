"""The store: one class for SQLite and PostgreSQL. A `session` is a transaction, and so is a `read`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from service.errors import Misconfigured, Unavailable

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
LOCK_KEY = 0x70616C696D70  # any number will do, as long as every process takes the same
BUSY_SECONDS = 30

# Alembic keeps its context in module globals, so one process migrates one database at a time.
_migrating = threading.Lock()


class Database:
    """Safe to share between threads. Opens no connection before the first use."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.sqlite = self.engine.dialect.name == "sqlite"
        reading: dict[str, Any] = {"reading": True} if self.sqlite else {"isolation_level": "REPEATABLE READ"}
        self._write = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(self.engine.execution_options(**reading), expire_on_commit=False)

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to a revision ("base" takes them away). Whoever comes second waits, and finds it done."""
        with _migrating, self._reachable(), self.engine.begin() as connection:
            if not self.sqlite:  # SQLite's BEGIN IMMEDIATE is the lock
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            move = command.downgrade if revision == "base" else command.upgrade
            move(alembic_config(connection), revision)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction that writes: committed at the end, rolled back when an exception passes through."""
        with self._reachable(), self._write.begin() as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One transaction that sees one moment of the database and waits for no writer."""
        with self._reachable(), self._read.begin() as session:
            yield session

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            cause = str(getattr(error, "orig", error)).strip()
            raise Unavailable(f"the database does not answer: {cause}") from error


def alembic_config(connection: Connection) -> Config:
    """Alembic on a connection of ours; there is no alembic.ini."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise Misconfigured(
            "database_url is no URL: write for example postgresql://user:password@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise Misconfigured(f"database_url names {parsed.drivername!r}: use postgresql:// or sqlite:///")
    if parsed.database in (None, "", ":memory:"):
        raise Misconfigured(
            "SQLite in memory is lost with its connection: name a file, sqlite:////path/to/file"
        )
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Durable to the last commit, readers beside a writer, and transactions begun by us, not by the driver."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: one that begins as a reader could not wait for it later."""
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
