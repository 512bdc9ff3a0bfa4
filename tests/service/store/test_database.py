"""Transactions: all or nothing, and what is read is of one moment."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from service.store.database import Database
from service.store.tables import Job, Model, now, plain


def model(name, info=None):
    at = now()
    return Model(fingerprint=name, name=name, info=info or {}, tokenizer="{}", created=at, registered=at)


def names(database):
    with database.read() as session:
        return set(session.scalars(select(Model.name)))


def test_all_or_nothing(database):
    """An exception that passes through a session takes everything in it back."""
    with database.session() as session:
        session.add(model("kept"))

    def fail():
        with database.session() as session:
            session.add(model("lost"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(database) == {"kept"}


def test_one_moment(database):
    """A read sees one moment: what is committed while it reads appears only in the next."""
    with database.read() as session:
        assert session.scalars(select(Model.name)).all() == []
        with database.session() as writer:
            writer.add(model("new"))
        assert session.scalars(select(Model.name)).all() == []
    assert names(database) == {"new"}


def test_foreign_keys(database):
    """A row cannot point at what is not there, on SQLite either."""
    at = now()
    row = {"kind": "edit", "status": "queued", "request": {}, "actor": "a", "subject": "s"}

    def add():
        with database.session() as session:
            session.add(Job(id="edit_1", model="nobody", created=at, updated=at, **row))

    with pytest.raises(IntegrityError):
        add()


def test_values_come_back(database):
    """JSON comes back as it went in, whatever the text in it; times come back in UTC to the microsecond."""
    info = {"text": "São \u0000 😀 \u2028", "big": 2**70, "pi": math.pi, "list": [1, [None, True]]}
    at = datetime(2026, 3, 4, 5, 6, 7, 891234, tzinfo=timezone(timedelta(hours=5)))
    with database.session() as session:
        row = model("x", info)
        row.created = at
        session.add(row)
    with database.read() as session:
        found = session.get(Model, "x")
    assert found.info == info
    assert found.created == at
    assert found.created.tzinfo is UTC


def test_writers_queue_up(database):
    """Writers that read before they write wait for each other: no update is lost."""
    with database.session() as session:
        session.add(model("x", {"count": 0}))

    def add_one(_):
        with database.session() as session:
            row = session.scalars(select(Model).where(Model.name == "x").with_for_update()).one()
            row.info = {"count": row.info["count"] + 1}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(40)))
    with database.read() as session:
        assert session.get(Model, "x").info == {"count": 40}


def test_sqlite_is_durable(tmp_path):
    """SQLite runs with WAL and synchronous=FULL on every connection."""
    database = Database(f"sqlite:///{tmp_path / 'x.sqlite3'}")
    with database.read() as session:
        pragmas = [
            session.scalar(text(f"PRAGMA {p}")) for p in ("journal_mode", "synchronous", "foreign_keys")
        ]
    database.close()
    assert pragmas == ["wal", 2, 1]


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=20)
)
def test_plain_is_json(value):
    """Whatever a computation returns can be stored: what JSON cannot say becomes null, the rest stays."""

    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)
