"""A Redis server for tests, from the installed program, on a free port and in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from tests.support.free_ports import free_port

SETTINGS = {"bind": "127.0.0.1", "save": "", "maxmemory-policy": "noeviction"}


@dataclass
class RedisServer:
    port: int
    _command: list[str]
    _folder: Path
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server with its saved data."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder)
        _wait_until_ready(self, self._process, self._folder / "log")

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Stop the server. A durable one keeps its data."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def signal(self, what: signal.Signals) -> None:
        """Suspend or resume the process."""
        assert self._process is not None
        self._process.send_signal(what)

    def flush(self) -> None:
        """Delete all data."""
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@contextmanager
def run_redis(durable: bool = False, fsync: str = "always") -> Iterator[RedisServer]:
    """Run a server. A durable one writes to the disk; with `fsync="always"` before each reply."""
    program = _find_program("redis-server")
    folder = Path(tempfile.mkdtemp(prefix="redis"))
    port = free_port()
    settings = {**SETTINGS, "port": str(port), "dir": str(folder), "appendonly": "yes" if durable else "no"}
    settings["appendfsync"] = fsync
    options = [x for name, value in settings.items() for x in (f"--{name}", value)]
    server = RedisServer(port, [program, *options], folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _find_program(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        reason = f"no Redis here: {name} is not in PATH"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return program


def _wait_until_ready(server: RedisServer, process: subprocess.Popen[bytes], log: Path) -> None:
    with redis.Redis.from_url(server.url, socket_timeout=2, retry=None) as client:
        for _ in range(1200):
            try:
                client.ping()
                return
            except redis.RedisError:
                if process.poll() is not None:
                    break
                time.sleep(0.02)
    pytest.fail(f"Redis did not start:\n{log.read_text(errors='replace')}")
