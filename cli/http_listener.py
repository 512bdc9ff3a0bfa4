"""The listening socket of an HTTP server: accepts connections, and continues after errors of the system."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from cli.http_connections import ConnectionTable
from cli.http_protocol import HttpConnection, OncePerInterval

BACKLOG = 1024  #: connections that the system accepts before this process does
ACCEPTS_PER_PASS = 16  #: connections accepted before other work of the event loop
PAUSE = 0.1  #: seconds without accepting after an error, such as too many open files

log = logging.getLogger("palimpsest.http.listener")
log.addFilter(OncePerInterval())


class Listener:
    """Accepts connections from `start` to `close`.

    asyncio's own server logs a traceback for each attempt while the process has no descriptor left.
    """

    def __init__(
        self, listening: socket.socket, table: ConnectionTable, connect: Callable[[str], HttpConnection]
    ) -> None:
        self._socket, self._table, self._create_connection = listening, table, connect
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        self._socket.setblocking(False)
        self._socket.listen(BACKLOG)
        self._resume()

    def close(self) -> None:
        """Stop accepting connections. Those that are open are not closed."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    async def wait_closed(self) -> None:
        """Return at once: `close` has no delayed effect."""

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_PASS):
            try:
                accepted, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            connection = self._create_connection(str(peer[0]))
            if self._table.admit(connection):
                task = self._loop.create_task(self._connect(accepted, connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                accepted.close()

    async def _connect(self, accepted: socket.socket, connection: HttpConnection) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:  # the client has gone
            self._table.remove(connection)
            accepted.close()

    def _pause(self, error: OSError) -> None:
        """Close idle connections, which frees descriptors, and accept again after PAUSE."""
        self._table.evict_idle(ACCEPTS_PER_PASS)
        log.warning("connections are not accepted: %s", error.strerror or type(error).__name__)
        self._loop.remove_reader(self._socket.fileno())
        self._loop.call_later(PAUSE, self._resume)
