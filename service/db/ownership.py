"""Exclusive ownership of a database by one process, for the wiring whose queue is in the process.

Such a process takes over every job that another process left running. Two of them would take each other's jobs. The
lock ends with the process, however it ends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.db.advisory_locks import AdvisoryLock
from service.db.database import Database
from service.errors import Misconfigured

HELD_MESSAGE = (
    "{holder} uses {what}, and a process without Redis must be the only one: stop it, give this process another data "
    "folder with --data-dir, or connect both with PALIMPSEST_REDIS_URL."
)


@contextmanager
def own_database(database: Database) -> Iterator[None]:
    """Hold the database for this process. Raises Misconfigured if another process holds it, and says which."""
    with _own_sqlite(database) if database.is_sqlite else _own_postgres(database):
        yield


def process_label() -> str:
    """Return how this process is named to others."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def _own_sqlite(database: Database) -> Iterator[None]:
    path = Path(str(database.engine.url.database))
    lock, holder = FileLock(f"{path}.lock"), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise Misconfigured(HELD_MESSAGE.format(holder=name, what=path)) from None
    try:
        holder.write_text(process_label(), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _own_postgres(database: Database) -> Iterator[None]:
    connection = database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    connection.detach()  # the lock belongs to this connection, which must not serve anything else
    try:
        connection.execute(
            text("SELECT set_config('application_name', :name, false)"), {"name": process_label()}
        )
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": AdvisoryLock.OWNERSHIP}):
            name = connection.scalar(
                text(
                    "SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' "
                    "AND granted AND (classid::bigint << 32) + objid::bigint = :key"
                ),
                {"key": AdvisoryLock.OWNERSHIP},
            )
            raise Misconfigured(
                HELD_MESSAGE.format(holder=name or "another process", what="the database in PostgreSQL")
            )
        try:
            yield
        finally:
            # at once: the server notices only later that the connection was closed
            with suppress(DBAPIError):
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": AdvisoryLock.OWNERSHIP})
    finally:
        connection.close()
