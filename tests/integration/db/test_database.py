"""Transactions are atomic, and reads are snapshots."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.bootstrap import Container
from service.db import database as store
from service.db.database import Database
from service.db.models import Job, Model, now, to_json_value
from service.errors import CommitOutcomeUnknown, Unavailable
from tests.support.disk_writes import DURABLE_PRAGMAS
from tests.support.migrations import migrate


def model(name: str, info: Any = None) -> Any:
    at = now()
    return Model(fingerprint=name, name=name, info=info or {}, tokenizer="{}", created=at, registered=at)


def model_names(database: Database) -> Any:
    with database.read_session() as session:
        return set(session.scalars(select(Model.name)))


def test_all_or_nothing(database: Database) -> None:
    """An exception in a session rolls back all changes of the session."""
    with database.write_session() as session:
        session.add(model("kept"))

    def fail() -> None:
        with database.write_session() as session:
            session.add(model("lost"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model_names(database) == {"kept"}


def test_read_session_is_a_snapshot(database: Database) -> None:
    """A read session is a snapshot: a commit made during the session is visible only in the next one."""
    with database.read_session() as session:
        assert session.scalars(select(Model.name)).all() == []
        with database.write_session() as writer:
            writer.add(model("new"))
        assert session.scalars(select(Model.name)).all() == []
    assert model_names(database) == {"new"}


def test_autocommit_read_sees_what_is_committed(database: Database) -> None:
    """A single read sees the latest commit and does not block or wait for writers."""
    look = select(Model.name)
    with database.write_session() as session:
        session.add(model("new"))
        session.flush()
        with database.autocommit_read() as connection:
            assert connection.scalar(look) is None
    with database.autocommit_read() as connection:
        assert connection.scalar(look) == "new"
        with database.write_session() as session:
            session.add(model("newer"))


def test_foreign_keys(database: Database) -> None:
    """A row that violates a foreign key is rejected, also on SQLite."""
    at = now()
    row = {"kind": "edit", "status": "queued", "request": {}, "actor": "a", "subject": "s"}

    def add() -> None:
        with database.write_session() as session:
            session.add(Job(id="edit_1", model="nobody", created=at, updated=at, **row))

    with pytest.raises(IntegrityError):
        add()


def test_values_come_back(database: Database) -> None:
    """JSON values are read back unchanged, and times are read back in UTC with microseconds."""
    info = {"text": "São \u0000 😀 \u2028", "big": 2**70, "pi": math.pi, "list": [1, [None, True]]}
    at = datetime(2026, 3, 4, 5, 6, 7, 891234, tzinfo=timezone(timedelta(hours=5)))
    with database.write_session() as session:
        row = model("x", info)
        row.created = at
        session.add(row)
    with database.read_session() as session:
        found = session.get_one(Model, "x")
    assert found.info == info
    assert found.created == at
    assert found.created.tzinfo is UTC


def test_writers_queue_up(database: Database) -> None:
    """Concurrent transactions that lock, read and write a row do not lose updates."""
    with database.write_session() as session:
        session.add(model("x", {"count": 0}))

    def add_one(_: Any) -> None:
        with database.write_session() as session:
            row = session.scalars(select(Model).where(Model.name == "x").with_for_update()).one()
            row.info = {"count": row.info["count"] + 1}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(40)))
    with database.read_session() as session:
        assert session.get_one(Model, "x").info == {"count": 40}


def test_sqlite_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite runs with WAL and synchronous=FULL on every connection."""
    monkeypatch.setattr("service.db.database.SQLITE_PRAGMAS", DURABLE_PRAGMAS)
    database = Database(f"sqlite:///{tmp_path / 'x.sqlite3'}")
    with database.read_session() as session:
        pragmas = [
            session.scalar(text(f"PRAGMA {p}")) for p in ("journal_mode", "synchronous", "foreign_keys")
        ]
    database.close()
    assert pragmas == ["wal", 2, 1]


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=20)
)
def test_to_json_value_is_json(value: Any) -> None:
    """The output of `to_json_value` is unchanged by a round trip through strict JSON."""

    assert json.loads(json.dumps(to_json_value(value), allow_nan=False)) == to_json_value(value)


def test_database_file_is_private(tmp_path: Path) -> None:
    """A new SQLite file and its WAL can be read by their owner only; the mode of an existing file is kept."""
    path = tmp_path / "x.sqlite3"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes) >= {path.name, f"{path.name}-wal"} and set(modes.values()) == {0o600}
    database.close()
    path.chmod(0o640)
    reopened = Database(f"sqlite:///{path}")
    assert reopened.revision() is not None
    reopened.close()
    assert path.stat().st_mode & 0o777 == 0o640


def test_first_connection_waits_for_the_lock(tmp_path: Path) -> None:
    """A process that opens a new SQLite file waits while another process writes to it, and then uses WAL."""
    path = tmp_path / "x.sqlite3"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE t (x)")
        release = threading.Timer(0.3, other.execute, ("COMMIT",))
        release.start()
        database = Database(f"sqlite:///{path}")
        with database.engine.connect() as connection:
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        release.join()
        database.close()


class TestPostgres:
    """A PostgreSQL server that is slow, busy or unreachable."""

    @pytest.fixture
    def set_timeouts(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Return a function that sets timeouts of PostgreSQL sessions."""

        def set_limits(**limits: str) -> None:
            for name, limit in limits.items():
                monkeypatch.setitem(store.POSTGRES_TIMEOUTS, name, limit)

        return set_limits

    @pytest.fixture
    def open_database(self, postgres_url: str) -> Iterator[Any]:
        """Return a function that opens a `Database` of its own on one PostgreSQL database with two rows."""
        opened = []

        def open_(url: str = postgres_url) -> Any:
            opened.append(Database(url))
            return opened[-1]

        database = open_()
        database.migrate()
        with database.write_session() as session:
            session.add_all([model("x"), model("y")])
        yield open_
        for database in opened:
            database.close()

    def lock_row(self, session: Session, name: str) -> None:
        session.execute(select(Model.name).where(Model.name == name).with_for_update()).one()

    def pid(self, session: Session) -> Any:
        return session.scalar(text("SELECT pg_backend_pid()"))

    def kill(self, database: Database, pid: Any) -> None:
        with database.write_session() as session:
            assert session.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    def test_limits(self, open_database: Callable[..., Database]) -> None:
        """Every session has the configured timeouts and the options of the URL."""
        database = open_database()
        with database.write_session() as session:
            found = {
                name: session.scalar(text(f"SHOW {name}"))
                for name in (*store.POSTGRES_TIMEOUTS, "search_path")
            }
        assert found.pop("search_path").startswith("test")
        assert found == store.POSTGRES_TIMEOUTS

    def test_idle_transaction_is_ended(
        self, open_database: Callable[..., Database], set_timeouts: Any
    ) -> None:
        """A session that is idle in a transaction for too long is ended: its locks are released and its
        changes are rolled back."""
        set_timeouts(idle_in_transaction_session_timeout="300ms")
        frozen, other = open_database(), open_database()

        def freeze() -> None:
            with frozen.write_session() as session:
                self.lock_row(session, "x")
                session.execute(text("UPDATE models SET name = 'z' WHERE name = 'x'"))
                with other.write_session() as waiting:
                    self.lock_row(waiting, "x")

        with pytest.raises(Unavailable):
            freeze()
        assert model_names(other) == {"x", "y"}

    @pytest.mark.parametrize(
        ("limit", "ask"),
        [
            ("lock_timeout", "SELECT 1 FROM models WHERE name = 'x' FOR UPDATE"),
            ("statement_timeout", "SELECT pg_sleep(9)"),
        ],
    )
    def test_busy(
        self, open_database: Callable[..., Database], set_timeouts: Callable[..., None], limit: str, ask: str
    ) -> None:
        """A statement that exceeds a timeout raises Unavailable with advice to retry. The connection stays
        usable."""
        set_timeouts(**{limit: "200ms"})
        holder, waiting = open_database(), open_database()

        def wait() -> None:
            with holder.write_session() as session:
                self.lock_row(session, "x")
                with waiting.write_session() as other:
                    other.execute(text(ask))

        with pytest.raises(Unavailable, match=r"busy: .* Retry"):
            wait()
        assert model_names(waiting) == {"x", "y"}

    def test_deadlock(self, open_database: Callable[..., Database]) -> None:
        """Of two deadlocked transactions one commits, and the other raises Unavailable."""
        database, barrier = open_database(), threading.Barrier(2)

        def cross(names: Any) -> Any:
            try:
                with database.write_session() as session:
                    self.lock_row(session, names[0])
                    barrier.wait()
                    self.lock_row(session, names[1])
            except Unavailable as error:
                return error.detail

        with ThreadPoolExecutor(2) as pool:
            lost, done = sorted(pool.map(cross, ("xy", "yx")), key=lambda told: told is None)
        assert "busy" in lost
        assert done is None

    def test_connection_lost_in_transaction(self, open_database: Callable[..., Database]) -> None:
        """A connection lost in a transaction raises Unavailable, nothing is written, and the next session
        works."""
        database, other = open_database(), open_database()

        def lose() -> None:
            with database.write_session() as session:
                session.add(model("lost"))
                session.flush()
                self.kill(other, self.pid(session))
                session.scalar(text("SELECT 1"))

        with pytest.raises(Unavailable) as error:
            lose()
        assert error.value.code == "database_unreachable"
        assert model_names(database) == {"x", "y"}

    def test_connection_lost_during_commit(self, open_database: Callable[..., Database]) -> None:
        """A connection lost during a commit raises CommitOutcomeUnknown."""
        database, other = open_database(), open_database()

        def lose() -> None:
            with database.write_session() as session:
                self.kill(other, self.pid(session))

        with pytest.raises(CommitOutcomeUnknown):
            lose()

    @pytest.mark.parametrize("user", ["somebody:secret@", "nobody@"])
    def test_errors_hide_connection_details(
        self,
        open_database: Callable[..., Database],
        postgres_server: Any,
        user: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A connection error contains no address, port, user or password. The log contains the driver's
        message."""
        ports = {"somebody:secret@": 1, "nobody@": postgres_server.port}  # no server on port 1; no such user
        database = open_database(f"postgresql://{user}127.0.0.1:{ports[user]}/nothing")
        with pytest.raises(Unavailable) as error:
            model_names(database)
        said = error.value.detail + str(error.value.extra)
        assert "database does not answer" in said
        assert not any(word in said for word in ("127.0.0.1", "secret", "body@", str(ports[user])))
        assert "127.0.0.1" in vars(caplog.records[-1])["detail"]

    def test_pool_is_empty(
        self, open_database: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A session raises Unavailable when all connections are in use for longer than the pool timeout."""
        monkeypatch.setattr(
            store,
            "POSTGRES_POOL_OPTIONS",
            {**store.POSTGRES_POOL_OPTIONS, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1},
        )
        database = open_database()
        with database.write_session() as session, pytest.raises(Unavailable, match="all connections"):
            self.pid(session)
            model_names(database)

    def test_parameters_stay_out_of_errors(self, open_database: Callable[..., Database]) -> None:
        """A database error does not contain the parameters of the statement, which may be text of users."""
        with pytest.raises(IntegrityError) as error, open_database().write_session() as session:
            session.add(model("x", {"prompt": "private words"}))
        assert "private words" not in str(error.value)


def test_requests_cannot_take_the_connections_of_a_worker(container: Container) -> None:
    """While requests hold every connection of the pool, a worker writes, and a verification reads."""
    with ExitStack() as held:
        pool: Any = container.database.engine.pool
        for _ in range(pool.size() + pool._max_overflow):
            held.enter_context(container.database.engine.connect())
        with container.worker_database.write_session() as session:
            session.execute(text("DELETE FROM workers"))
        with container.database.dedicated_read_session() as session:
            assert session.execute(text("SELECT count(*) FROM workers")).scalar() == 0
    assert container.worker_database.signing_key.id == container.database.signing_key.id
