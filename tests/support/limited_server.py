"""A server process with few open files and short time limits, and raw connections to it."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.paths import ROOT

ROOT_KEY = "sesame-sesame-sesame"
AUTHORIZATION = {"Authorization": f"Bearer {ROOT_KEY}"}
OPEN_FILES = 256  #: limit of the process

Address = tuple[str, int]


class LimitedServer:
    """The process, with a fake worker. `limits` are fields of TimeLimits; `max_connections` None is the default."""

    def __init__(
        self, folder: Path, limits: dict[str, float] | None = None, max_connections: int | None = None
    ) -> None:
        self._log_path = folder / "server.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps([str(folder), max_connections, limits or {}])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()
        assert self.url, self.log()
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.address: Address = (host, int(port))

    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8")

    def open_files(self) -> int:
        """Return how many descriptors the process has open."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Send a request with the key on a connection of its own."""
        return httpx.get(self.url + path, headers=AUTHORIZATION, timeout=30, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric; 0 if it has none yet."""
        text = ",".join(f'{label}="{value}"' for label, value in labels.items())
        start = f"palimpsest_{name}{{{text}}} " if labels else f"palimpsest_{name} "
        values = [line for line in self.get("/metrics").text.splitlines() if line.startswith(start)]
        return float(values[0].rsplit(" ", 1)[1]) if values else 0.0

    def hold_jobs(self) -> None:
        """Let the worker keep the jobs that it runs from their end."""
        self._command("hold")

    def release_jobs(self) -> None:
        """Let the worker end its jobs."""
        self._command("release")

    def _command(self, text: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{text}\n".encode())
        self._process.stdin.flush()
        assert self._process.stdout.readline().decode().strip() == text

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0, self.log()
        self._process.stdout.close()


@contextmanager
def connections(address: Address, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Open connections that send these bytes and then nothing."""
    opened = []
    try:
        for _ in range(count):
            connection = socket.create_connection(address, timeout=30)
            opened.append(connection)
            connection.sendall(sent)
        yield opened
    finally:
        for connection in opened:
            connection.close()


def read_to_end(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def _serve(folder: str, max_connections: int | None, limits: dict[str, float]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    from cli.http_connections import TimeLimits
    from cli.http_server import HttpServerThread, listening_socket
    from cli.logs import log_to_stderr
    from tests.support.application import TestApp

    log_to_stderr("text", "warning")
    test_app = TestApp(Path(folder), api_key=ROOT_KEY, port=0)
    worker = test_app.start_fake_worker()
    with listening_socket(test_app.settings) as listening:
        server = HttpServerThread(test_app.app, listening, max_connections, TimeLimits(**limits))
        server.start()
        print(server.url, flush=True)  # noqa: T201
        for line in sys.stdin:
            {"hold": worker.may_finish.clear, "release": worker.may_finish.set}[line.strip()]()
            print(line.strip(), flush=True)  # noqa: T201
        server.drain()
        test_app.broker.close()
        server.stop()
    test_app.close()


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
