"""One database class for SQLite and PostgreSQL. Every session is one transaction."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from service.errors import CommitOutcomeUnknown, DatabaseUnreachable, Misconfigured, Unavailable

MIGRATIONS_DIR = Path(__file__).resolve().parents[2] / "migrations"
MIGRATION_LOCK_KEY = 0x70616C696D70  # arbitrary, and the same in every process
SQLITE_BUSY_TIMEOUT = 30  # seconds

log = logging.getLogger(__name__)

#: PostgreSQL timeouts of each session: a worker that stalls with the ledger lock must not block the others
POSTGRES_TIMEOUTS = {
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "15s",
    "statement_timeout": "30s",
}
#: detection of dead connections; parameters of the URL take precedence
POSTGRES_CONNECT_ARGS = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
POSTGRES_POOL_OPTIONS = {
    "pool_pre_ping": True,
    "pool_size": 10,
    "max_overflow": 20,
    "pool_timeout": 10,
    "pool_recycle": 1800,
}
#: messages by SQLSTATE; the driver's own message can contain addresses and user names
SQLSTATE_MESSAGES = {
    "40001": "the database is busy: a concurrent transaction writes the same rows. Retry.",
    "40P01": "the database is busy: a concurrent transaction writes the same rows. Retry.",
    "55P03": "the database is busy: another transaction holds the lock. Retry.",
    "57014": "the database is busy: the statement timed out. Retry.",
    "25006": "the database is read-only: connect to the primary server.",
    "53100": "the database's disk is full: free space on it.",
    "53300": "the database has no free connections: raise its max_connections or run fewer processes.",
}
UNREACHABLE_MESSAGE = "the database does not answer: check that it runs and is reachable."
UNKNOWN_OUTCOME_MESSAGE = (
    "the database connection was lost during the commit, and its outcome is unknown: check the resource before you retry. "
    "A request with an Idempotency-Key can be repeated safely."
)

# Alembic keeps its context in module globals, so one process migrates one database at a time.
_migration_lock = threading.Lock()


class Database:
    """A database and its connection pools. Thread-safe. Connects on first use."""

    def __init__(self, url: str) -> None:
        self.engine = _create_engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        read_options: dict[str, Any] = (
            {"reading": True} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        )
        autocommit_options: dict[str, Any] = (
            {"reading": True} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        )
        self._autocommit_engine = self.engine.execution_options(**autocommit_options)
        self._write_sessionmaker = sessionmaker(self.engine, expire_on_commit=False)
        self._read_sessionmaker = sessionmaker(
            self.engine.execution_options(**read_options), expire_on_commit=False
        )

    def migrate(self, revision: str = "head") -> None:
        """Upgrade or downgrade the tables to a revision ("base" drops them). Concurrent migrations run one after
        another.

        Raises Misconfigured when the revision does not exist, or when a newer release has migrated the tables.
        """
        with _migration_lock, self._translate_outages(), self.engine.begin() as connection:
            if not self.is_sqlite:  # SQLite's BEGIN IMMEDIATE is the lock
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SET LOCAL lock_timeout = '10min'"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK_KEY})
            config = alembic_config(connection)
            current_revision = MigrationContext.configure(connection).get_current_revision()
            migrate_command = (
                command.downgrade if _is_downgrade(config, current_revision, revision) else command.upgrade
            )
            migrate_command(config, revision)

    def revision(self) -> str | None:
        """Return the revision of the tables; None before the first migration."""
        with self._translate_outages(), self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    @contextmanager
    def write_session(self) -> Iterator[Session]:
        """Yield a session in one transaction, which is committed at the end and rolled back on an exception.

        Raises CommitOutcomeUnknown when the connection is lost during the commit.
        """
        committing = False
        try:
            with self._translate_outages(), self._write_sessionmaker.begin() as session:
                yield session
                session.flush()
                committing = True
        except DatabaseUnreachable as error:
            if committing:
                raise CommitOutcomeUnknown(UNKNOWN_OUTCOME_MESSAGE) from error
            raise

    @contextmanager
    def read_session(self, no_idle_timeout: bool = False) -> Iterator[Session]:
        """Yield a session on one snapshot of the database. It blocks no writer and is blocked by none.

        `no_idle_timeout` disables idle_in_transaction_session_timeout, for a session that computes between statements.
        """
        with self._translate_outages(), self._read_sessionmaker.begin() as session:
            if no_idle_timeout and not self.is_sqlite:
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield session

    @contextmanager
    def autocommit_read(self) -> Iterator[Connection]:
        """Yield a connection for a single query: one round trip to PostgreSQL, without a transaction."""
        with self._translate_outages(), self._autocommit_engine.connect() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _translate_outages(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeout) as error:
            if not _is_outage(error):
                raise
            cause = getattr(error, "orig", None) or error
            log.warning(
                "database failed", extra={"error": type(cause).__name__, "detail": str(cause).strip()}
            )
            raise _outage_error(error) from error


def _is_outage(error: DBAPIError | PoolTimeout) -> bool:
    """Return whether the database failed, as opposed to the statement."""
    if (
        _sqlite_error_name(error) == "SQLITE_ERROR"
    ):  # an invalid statement, which SQLite reports with the same class
        return False
    outages = (OperationalError, InterfaceError, InternalError, PoolTimeout)
    return isinstance(error, outages) or bool(getattr(error, "connection_invalidated", False))


def _sqlite_error_name(error: DBAPIError | PoolTimeout) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlite_errorname", ""))


def _outage_error(error: DBAPIError | PoolTimeout) -> Unavailable:
    """Return the error that describes an outage, without the text of the driver."""
    message = _busy_message(error)
    return DatabaseUnreachable(UNREACHABLE_MESSAGE) if message is None else Unavailable(message)


def _busy_message(error: DBAPIError | PoolTimeout) -> str | None:
    """Return the message of an outage of a database that responds; None if the database does not respond."""
    if isinstance(error, PoolTimeout):
        return "the database is busy: all connections of the pool are in use. Retry."
    if _sqlite_error_name(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return SQLSTATE_MESSAGES["55P03"]
    if _sqlite_error_name(error) == "SQLITE_FULL":
        return SQLSTATE_MESSAGES["53100"]
    return SQLSTATE_MESSAGES.get(getattr(error.orig, "sqlstate", None) or "")


def _is_downgrade(config: Config, current: str | None, target: str) -> bool:
    """Return whether the target revision is older than the current one."""
    scripts = ScriptDirectory.from_config(config).walk_revisions("base", "head")  # newest first
    revisions: list[str | None] = [None, *reversed([s.revision for s in scripts])]
    if current not in revisions:
        raise Misconfigured(
            f"the database is at revision {current}, which this release does not know: a newer release has migrated it. Run that "
            "release, or downgrade the database with it: `palimpsest migrate --to REVISION`."
        )
    if target in ("base", "head"):
        return target == "base"
    if target not in revisions:
        raise Misconfigured(
            f"there is no revision {target}: this release knows {', '.join(filter(None, revisions))}."
        )
    return revisions.index(target) < revisions.index(current)


def alembic_config(connection: Connection) -> Config:
    """Return an Alembic configuration for a connection. There is no alembic.ini."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _create_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise Misconfigured(
            "database_url is not a URL: use for example postgresql://user:password@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        return _create_postgres_engine(parsed)
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise Misconfigured(f"database_url names {parsed.drivername!r}: use postgresql:// or sqlite:///")
    if parsed.database in (None, "", ":memory:"):
        raise Misconfigured(
            "an in-memory SQLite database is lost with its connection: use a file, sqlite:////path/to/file"
        )
    return _create_sqlite_engine(parsed)


def _create_postgres_engine(url: URL) -> Engine:
    connect_args = {name: value for name, value in POSTGRES_CONNECT_ARGS.items() if name not in url.query}
    engine = create_engine(url, connect_args=connect_args, hide_parameters=True, **POSTGRES_POOL_OPTIONS)
    event.listen(engine, "connect", _set_up_postgres)
    return engine


def _set_up_postgres(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("; ".join(f"SET {name} = '{value}'" for name, value in POSTGRES_TIMEOUTS.items()))
    connection.commit()  # otherwise the rollback of the first transaction resets them


def _create_sqlite_engine(url: URL) -> Engine:
    connect_args = {"timeout": SQLITE_BUSY_TIMEOUT, "check_same_thread": False}
    engine = create_engine(
        url, connect_args=connect_args, hide_parameters=True
    )  # parameters contain text of users
    event.listen(engine, "do_connect", _create_private_file)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_private_file(_: Any, __: Any, arguments: Sequence[Any], ___: Any) -> None:
    """Create a missing database file so that only its owner can read it. SQLite gives its WAL the same mode."""
    with suppress(OSError):
        os.close(os.open(arguments[0], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Use WAL and full synchronization, enforce foreign keys, and disable the driver's implicit transactions."""
    connection.isolation_level = None
    # SQLite does not wait for the lock that the change of the journal mode needs.
    retrying = Retrying(
        retry=retry_if_exception(_is_sqlite_lock),
        wait=wait_random(0.01, 0.05),
        stop=stop_after_delay(SQLITE_BUSY_TIMEOUT),
        reraise=True,
    )
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        retrying(connection.execute, f"PRAGMA {pragma}").close()


def _is_sqlite_lock(error: BaseException) -> bool:
    return str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_BUSY")


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction. A writer takes the lock at once, because SQLite cannot wait to upgrade a read lock."""
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
