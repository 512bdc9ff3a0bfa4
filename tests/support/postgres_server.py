"""A PostgreSQL server for tests, from the installed binaries, on a free port and in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg
import pytest

from tests.support.free_ports import free_port

#: no fsync: committed data survives a crash of the server, not of the machine
NON_DURABLE_SETTINGS = {"fsync": "off", "full_page_writes": "off"}
#: fast shutdown, which disconnects clients, and immediate shutdown, which recovers at the next start
FAST, IMMEDIATE = signal.SIGINT, signal.SIGQUIT


@dataclass
class PostgresServer:
    port: int
    _command: list[str]
    _folder: Path
    _numbers: Iterator[int] = field(default_factory=count)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server with its data."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder)
        _wait_until_ready(self, self._process, self._folder / "log")

    def stop(self, how: signal.Signals = IMMEDIATE) -> None:
        """Stop the server. Committed data is kept."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def fresh_database(self) -> str:
        """Return the URL of an empty schema, which takes a hundredth of the time of a database."""
        name = f"test{next(self._numbers)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{self.url}?options=-csearch_path%3D{name}"


@contextmanager
def run_postgres(durable: bool = False) -> Iterator[PostgresServer]:
    """Run a server. A durable one writes to the disk with fsync."""
    initdb, postgres = _find_program("initdb"), _find_program("postgres")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short, because the path of a socket is limited
    port = free_port()
    try:
        as_user = _as_unprivileged_user(folder)
        setup = [initdb, "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run([*as_user, *map(str, setup)], check=True, capture_output=True, cwd=folder)
        settings = {"max_connections": "200", **({} if durable else NON_DURABLE_SETTINGS)}
        options = [x for name, value in settings.items() for x in ("-c", f"{name}={value}")]
        start = [postgres, "-D", folder / "data", "-p", port, "-h", "127.0.0.1", "-k", folder, *options]
        server = PostgresServer(port, [*as_user, *map(str, start)], folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_program(name: str) -> str:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    program = shutil.which(name) or (str(versions[-1]) if versions else None)
    if program is None:
        _skip_or_fail(f"no PostgreSQL here: {name} is neither in PATH nor in /usr/lib/postgresql")
    return str(program)


def _skip_or_fail(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _as_unprivileged_user(folder: Path) -> list[str]:
    """Return a command prefix that runs as user `postgres`, because PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return []
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        _skip_or_fail("we are root, which PostgreSQL refuses, and there is no user `postgres`")
        raise
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]


def _wait_until_ready(server: PostgresServer, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        try:
            psycopg.connect(server.url, connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    pytest.fail(f"PostgreSQL did not start:\n{log.read_text(errors='replace')}")
