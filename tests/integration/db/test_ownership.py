"""Exclusive ownership of a database: service.db.ownership."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.db.database import Database
from service.db.ownership import own_database, process_label
from service.errors import Misconfigured
from tests.support.paths import ROOT

HOLD_SCRIPT = """
import sys
from service.db.database import Database
from service.db.ownership import own_database

with own_database(Database(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_owner(database: Database) -> Iterator[subprocess.Popen[str]]:
    """Run a process that owns the database; end it on exit."""
    url = database.engine.url.render_as_string(hide_password=False)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_SCRIPT, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_second_process_is_refused_and_told_who_holds_the_database(database: Database) -> None:
    """While a process owns a database another one raises Misconfigured with the id of the owner's process."""
    with (
        other_owner(database) as process,
        pytest.raises(Misconfigured, match=f"process {process.pid} on .*--data-dir"),
        own_database(database),
    ):
        pass


def test_ownership_ends_with_the_process(database: Database) -> None:
    """After the owner has been killed, another process owns the database at once."""
    with other_owner(database) as process:
        process.kill()
        process.wait()
        with own_database(database):
            pass


def test_owned_database_can_be_used(database: Database) -> None:
    """The owner, and other processes that do not ask for ownership, read, write and migrate the database."""
    with own_database(database):
        assert database.revision() is not None
        assert process_label()
        database.migrate()


def test_ownership_ends_at_once(database: Database) -> None:
    """The next owner need not wait until the server notices that the connection of the last one is closed."""
    for _ in range(20):
        with own_database(database):
            pass
