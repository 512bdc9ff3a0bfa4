"""The store: one class for SQLite and PostgreSQL. A `session` is a transaction, and so is a `read`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from service.errors import Misconfigured, Unavailable

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
LOCK_KEY = 0x70616C696D70  # any number will do, as long as every process takes the same
BUSY_SECONDS = 30

log = logging.getLogger(__name__)

#: how long PostgreSQL lets a session of ours go on: a worker that froze while it held the ledger must not stop the others
LIMITS = {
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "15s",
    "statement_timeout": "30s",
}
#: how a connection to nowhere is noticed; the URL may say otherwise
CONNECTING = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
POOL = {
    "pool_pre_ping": True,
    "pool_size": 10,
    "max_overflow": 20,
    "pool_timeout": 10,
    "pool_recycle": 1800,
}
#: what a driver's error means for a person, by SQLSTATE; the driver's own words name addresses and users
MEANING = {
    "40001": "the database is busy: others write the same rows. Try again.",
    "40P01": "the database is busy: others write the same rows. Try again.",
    "55P03": "the database is busy: others hold the same rows for long. Try again.",
    "57014": "the database is busy: it took too long to answer. Try again.",
    "25006": "the database takes no writes: see that this is the primary server.",
    "53100": "the database has no room left: free some on its disk.",
    "53300": "the database takes no more connections: raise its max_connections, or run fewer processes.",
}
NO_ANSWER = "the database does not answer: see that it runs and can be reached."
UNKNOWN_OUTCOME = (
    "the database went away while it wrote this down, and nobody knows whether it did: look before you ask again, or "
    "send requests with an Idempotency-Key, which can be repeated without harm."
)

# Alembic keeps its context in module globals, so one process migrates one database at a time.
_migrating = threading.Lock()


class Database:
    """Safe to share between threads. Opens no connection before the first use."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.sqlite = self.engine.dialect.name == "sqlite"
        reading: dict[str, Any] = {"reading": True} if self.sqlite else {"isolation_level": "REPEATABLE READ"}
        alone: dict[str, Any] = {"reading": True} if self.sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._alone = self.engine.execution_options(**alone)
        self._write = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(self.engine.execution_options(**reading), expire_on_commit=False)

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to a revision, up or down ("base" takes them away). Whoever comes second waits, and finds it done.

        Raises Misconfigured when the tables are of a newer release, or there is no such revision.
        """
        with _migrating, self._reachable(), self.engine.begin() as connection:
            if not self.sqlite:  # SQLite's BEGIN IMMEDIATE is the lock
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SET LOCAL lock_timeout = '10min'"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            config = alembic_config(connection)
            at = MigrationContext.configure(connection).get_current_revision()
            move = command.downgrade if _is_down(config, at, revision) else command.upgrade
            move(config, revision)

    def revision(self) -> str | None:
        """Where the tables stand; None before the first migration."""
        with self._reachable(), self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction that writes: committed at the end, rolled back when an exception passes through.

        A connection that is lost during the commit is Unavailable with `outcome="unknown"`: it may have been written.
        """
        committing = False
        try:
            with self._reachable(), self._write.begin() as session:
                yield session
                session.flush()
                committing = True
        except Unavailable as error:
            if committing and error.detail == NO_ANSWER:
                raise Unavailable(UNKNOWN_OUTCOME, outcome="unknown") from error
            raise

    @contextmanager
    def read(self, long: bool = False) -> Iterator[Session]:
        """One transaction that sees one moment of the database and waits for no writer.

        A `long` one may think between its questions: it holds nothing that others wait for.
        """
        with self._reachable(), self._read.begin() as session:
            if long and not self.sqlite:
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield session

    @contextmanager
    def glance(self) -> Iterator[Connection]:
        """For one question alone: PostgreSQL is asked once, with no transaction around it. The fastest way to look."""
        with self._reachable(), self._alone.connect() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeout) as error:
            if not _is_outage(error):
                raise
            cause = getattr(error, "orig", None) or error
            log.warning(
                "database failed", extra={"error": type(cause).__name__, "detail": str(cause).strip()}
            )
            raise Unavailable(_meaning(error)) from error


def _is_outage(error: DBAPIError | PoolTimeout) -> bool:
    """Whether the database is at fault, and not what it was asked."""
    if _sqlite_name(error) == "SQLITE_ERROR":  # it calls a statement that is wrong by the same class
        return False
    outages = (OperationalError, InterfaceError, InternalError, PoolTimeout)
    return isinstance(error, outages) or bool(getattr(error, "connection_invalidated", False))


def _sqlite_name(error: DBAPIError | PoolTimeout) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlite_errorname", ""))


def _meaning(error: DBAPIError | PoolTimeout) -> str:
    """What happened, for a person: never the driver's text."""
    if isinstance(error, PoolTimeout):
        return "the database is busy: all connections to it are in use. Try again."
    if _sqlite_name(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return MEANING["55P03"]
    if _sqlite_name(error) == "SQLITE_FULL":
        return MEANING["53100"]
    return MEANING.get(getattr(error.orig, "sqlstate", None) or "", NO_ANSWER)


def _is_down(config: Config, at: str | None, to: str) -> bool:
    """Whether the way from one revision to another leads back."""
    scripts = ScriptDirectory.from_config(config).walk_revisions("base", "head")  # newest first
    known: list[str | None] = [None, *reversed([s.revision for s in scripts])]
    if at not in known:
        raise Misconfigured(
            f"the database is at revision {at}, which this release does not know: a newer one has migrated it. Run that "
            "release, or let it go back first with `palimpsest migrate --to REVISION`."
        )
    if to in ("base", "head"):
        return to == "base"
    if to not in known:
        raise Misconfigured(
            f"there is no revision {to}: this release knows {', '.join(filter(None, known))}."
        )
    return known.index(to) < known.index(at)


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
        return _postgres(parsed)
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise Misconfigured(f"database_url names {parsed.drivername!r}: use postgresql:// or sqlite:///")
    if parsed.database in (None, "", ":memory:"):
        raise Misconfigured(
            "SQLite in memory is lost with its connection: name a file, sqlite:////path/to/file"
        )
    return _sqlite(parsed)


def _postgres(url: URL) -> Engine:
    connecting = {name: value for name, value in CONNECTING.items() if name not in url.query}
    engine = create_engine(url, connect_args=connecting, hide_parameters=True, **POOL)
    event.listen(engine, "connect", _set_up_postgres)
    return engine


def _set_up_postgres(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("; ".join(f"SET {name} = '{value}'" for name, value in LIMITS.items()))
    connection.commit()  # or the rollback of the first transaction would take them back


def _sqlite(url: URL) -> Engine:
    connecting = {"timeout": BUSY_SECONDS, "check_same_thread": False}
    engine = create_engine(url, connect_args=connecting, hide_parameters=True)  # parameters are users' text
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
