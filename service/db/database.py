"""One database class for SQLite and PostgreSQL. Every session is one transaction."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from service.db.advisory_locks import AdvisoryLock
from service.errors import CommitOutcomeUnknown, DatabaseUnreachable, Misconfigured, Unavailable
from service.kit.signing import SigningKey, parse_key, read_key, read_or_create_key

MIGRATIONS_DIR = Path(__file__).resolve().parents[2] / "migrations"
SQLITE_BUSY_TIMEOUT = 30  # seconds
#: settings of each SQLite connection: a committed transaction survives a power failure
SQLITE_PRAGMAS = {"journal_mode": "WAL", "synchronous": "FULL", "foreign_keys": "ON"}

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

DATABASE, AFTER_COMMIT = "database", "after_commit"  # keys in the `info` of a session
INSUFFICIENT_PRIVILEGE = "42501"  # an SQLSTATE

# Alembic keeps its context in module globals, so one process migrates one database at a time.
_migration_lock = threading.Lock()


class Database:
    """A database and its connection pool. Thread-safe. Connects on first use.

    `data_dir` is the folder outside the database that holds the key of the ledger and the file of its heads; None: the
    folder of the SQLite file. `ledger_key` is the key as text; None: the file in that folder, which is created if it is
    missing and `may_create_key`.
    """

    def __init__(
        self,
        url: str | URL,
        data_dir: Path | None = None,
        ledger_key: str | None = None,
        may_create_key: bool = True,
        **pool_options: Any,
    ) -> None:
        self.engine = _create_engine(url, **pool_options)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self.data_dir = data_dir or (Path(str(self.engine.url.database)).parent if self.is_sqlite else None)
        self._ledger_key, self._may_create_key = ledger_key, may_create_key
        self._write_sessionmaker = sessionmaker(self.engine, expire_on_commit=False, info={DATABASE: self})
        self._read_sessionmaker = self._make_read_sessionmaker(self.engine)
        autocommit_options: dict[str, Any] = (
            {"reading": True} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        )
        self._autocommit_engine = self.engine.execution_options(**autocommit_options)

    def _make_read_sessionmaker(self, engine: Engine) -> sessionmaker[Session]:
        options: dict[str, Any] = (
            {"reading": True} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        )
        return sessionmaker(
            engine.execution_options(**options), expire_on_commit=False, info={DATABASE: self}
        )

    @cached_property
    def signing_key(self) -> SigningKey:
        """The key that signs audit records. If there is neither a file nor a setting, its file is created if it may."""
        if self._ledger_key is not None:
            return parse_key(self._ledger_key, "PALIMPSEST_LEDGER_KEY")
        if self.data_dir is None:
            raise Misconfigured("the ledger has no key: set PALIMPSEST_LEDGER_KEY or PALIMPSEST_DATA_DIR.")
        return read_or_create_key(self.data_dir) if self._may_create_key else read_key(self.data_dir)

    def with_own_pool(self, **pool_options: Any) -> Database:
        """Return the same database with connections of its own, which users of this one cannot exhaust."""
        return Database(
            self.engine.url, self.data_dir, self._ledger_key, self._may_create_key, **pool_options
        )

    def migrate(self, revision: str = "head") -> None:
        """Upgrade or downgrade the tables to a revision ("base" drops them). Concurrent migrations run one after
        another.

        Raises Misconfigured when the revision does not exist, when a newer release has migrated the tables, or when
        the tables need a migration that this user may not do.
        """
        try:
            self._migrate(revision)
        except ProgrammingError as error:
            if getattr(error.orig, "sqlstate", None) != INSUFFICIENT_PRIVILEGE:
                raise
            raise Misconfigured(
                "the tables are those of another release, and this user of the database may not change them: run `palimpsest "
                "migrate` as their owner first."
            ) from None

    def _migrate(self, revision: str) -> None:
        with _migration_lock, self._translate_outages(), self.engine.begin() as connection:
            if not self.is_sqlite:  # SQLite's BEGIN IMMEDIATE is the lock
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SET LOCAL lock_timeout = '10min'"))
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(:key)"), {"key": AdvisoryLock.MIGRATIONS}
                )
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

        Actions that `run_after_commit` added follow the commit.
        Raises CommitOutcomeUnknown when the connection is lost during the commit.
        """
        committing = False
        try:
            with self._translate_outages(), self._write_sessionmaker.begin() as session:
                yield session
                session.flush()
                committing = True
            for action in session.info.pop(AFTER_COMMIT, {}).values():
                action()
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
            if no_idle_timeout:
                self._disable_idle_timeout(session)
            yield session

    @contextmanager
    def dedicated_read_session(self) -> Iterator[Session]:
        """Yield a read session on a new connection outside the pool, for long reads with pauses between statements."""
        sessions = self._make_read_sessionmaker(_create_engine(self.engine.url, poolclass=NullPool))
        with self._translate_outages(), sessions.begin() as session:
            self._disable_idle_timeout(session)
            yield session

    def _disable_idle_timeout(self, session: Session) -> None:
        if not self.is_sqlite:
            session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))

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


def database_of(session: Session) -> Database:
    """Return the database that made a session."""
    database: Database = session.info[DATABASE]
    return database


def run_after_commit(session: Session, name: str, action: Callable[[], None]) -> None:
    """Run an action when the write session has committed. A second action of the same name replaces the first."""
    session.info.setdefault(AFTER_COMMIT, {})[name] = action


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


def _create_engine(url: str | URL, **pool_options: Any) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise Misconfigured(
            "database_url is not a URL: use for example postgresql://user:password@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        return _create_postgres_engine(parsed, pool_options)
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise Misconfigured(f"database_url names {parsed.drivername!r}: use postgresql:// or sqlite:///")
    if parsed.database in (None, "", ":memory:"):
        raise Misconfigured(
            "an in-memory SQLite database is lost with its connection: use a file, sqlite:////path/to/file"
        )
    return _create_sqlite_engine(parsed, pool_options)


def _create_postgres_engine(url: URL, pool_options: dict[str, Any]) -> Engine:
    connect_args = {name: value for name, value in POSTGRES_CONNECT_ARGS.items() if name not in url.query}
    options = pool_options if "poolclass" in pool_options else POSTGRES_POOL_OPTIONS | pool_options
    engine = create_engine(url, connect_args=connect_args, hide_parameters=True, **options)
    event.listen(engine, "connect", _set_up_postgres)
    return engine


def _set_up_postgres(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("; ".join(f"SET {name} = '{value}'" for name, value in POSTGRES_TIMEOUTS.items()))
    connection.commit()  # otherwise the rollback of the first transaction resets them


def _create_sqlite_engine(url: URL, pool_options: dict[str, Any]) -> Engine:
    connect_args = {"timeout": SQLITE_BUSY_TIMEOUT, "check_same_thread": False}
    # parameters contain text of users
    engine = create_engine(url, connect_args=connect_args, hide_parameters=True, **pool_options)
    event.listen(engine, "do_connect", _create_private_file)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_private_file(_: Any, __: Any, arguments: Sequence[Any], ___: Any) -> None:
    """Create a missing database file so that only its owner can read it. SQLite gives its WAL the same mode."""
    with suppress(OSError):
        os.close(os.open(arguments[0], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Set the pragmas, and disable the driver's implicit transactions."""
    connection.isolation_level = None
    # SQLite does not wait for the lock that the change of the journal mode needs.
    retrying = Retrying(
        retry=retry_if_exception(_is_sqlite_lock),
        wait=wait_random(0.01, 0.05),
        stop=stop_after_delay(SQLITE_BUSY_TIMEOUT),
        reraise=True,
    )
    for name, value in SQLITE_PRAGMAS.items():
        retrying(connection.execute, f"PRAGMA {name}={value}").close()


def _is_sqlite_lock(error: BaseException) -> bool:
    return str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_BUSY")


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction. A writer takes the lock at once, because SQLite cannot wait to upgrade a read lock."""
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
