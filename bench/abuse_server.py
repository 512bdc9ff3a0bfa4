"""The server that `bench/abuse.py` measures: the API on loopback, with a fake worker and a large ledger.

    python -m bench.abuse_server fill FOLDER
    python -m bench.abuse_server serve FOLDER

`fill` makes the store and ends. With `serve`, the first line of standard output is the address. Each line of standard
input is answered with one line of JSON: the longest freeze of the event loop since the last answer, the resident
memory, and its peak since the last answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from bench.abuse_store import fill_store
from cli.http_server import HttpServerThread, listening_socket
from service.jobs.broker import Delivery
from service.jobs.job_kinds import CALL_KINDS
from service.kit.garbage import exclude_from_collection
from tests.support.application import FakeWorker, TestApp

CHECK_INTERVAL = 0.002  # seconds that the monitor of the event loop sleeps
RESET_PEAK = "5"  # what /proc/PID/clear_refs takes to reset the peak of the resident memory


class FreezeMonitor:
    """An ASGI application around another one, which records the longest delay of a task that sleeps."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._longest = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._watch())
        await self.app(scope, receive, send)

    async def _watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(CHECK_INTERVAL)
            self._longest = max(self._longest, time.perf_counter() - began - CHECK_INTERVAL)

    def take(self) -> float:
        """Return the seconds of the longest freeze since the last call."""
        longest, self._longest = self._longest, 0.0
        return longest


class CallWorker(FakeWorker):
    """A worker that answers generations and leaves jobs in the queue: their work is not the API's."""

    def _handle(self, delivery: Delivery) -> None:
        if delivery.kind in CALL_KINDS:
            super()._handle(delivery)
            self.calls.clear()


def memory() -> dict[str, int]:
    """Return the resident bytes of this process and their peak, and reset the peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = {
        name: int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024
        for name, field in (("resident", "VmRSS"), ("peak", "VmHWM"))
    }
    Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    return sizes


def fill(folder: Path) -> None:
    """Make the store in a folder."""
    test_app = TestApp(folder, register=False)
    fill_store(test_app)
    test_app.close()


def serve(folder: Path) -> None:
    """Serve the store of a folder until standard input ends."""
    tempfile.tempdir = str(folder)
    test_app = TestApp(folder, register=False, port=0)
    worker = CallWorker(test_app.worker_parts)
    monitor = FreezeMonitor(test_app.app)
    with listening_socket(test_app.settings) as server_socket:
        server_socket.listen(128)
        server = HttpServerThread(monitor, server_socket, test_app.settings.max_connections)
        server.start()
        exclude_from_collection()
        print(server.url, flush=True)
        for _ in sys.stdin:
            answer: dict[str, Any] = {"freeze": monitor.take(), **memory()}
            print(json.dumps(answer), flush=True)
        server.stop()
    worker.stop()
    test_app.close()


if __name__ == "__main__":
    {"fill": fill, "serve": serve}[sys.argv[1]](Path(sys.argv[2]))
