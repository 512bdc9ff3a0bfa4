"""The HTTP server of a process: its socket, and the thread that serves on it."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from cli.http_connections import ConnectionTable, TimeLimits, default_max_connections
from cli.http_listener import Listener
from cli.http_protocol import MAX_HEADER_BYTES, HttpConnection
from service.errors import Misconfigured
from service.settings import Settings

NEVER = 10**6  # seconds
START_POLL_INTERVAL = 0.01  # seconds
DRAIN_TIMEOUT = 5.0  # seconds for open requests to finish at shutdown
SHUTDOWN_TIMEOUT = 8  # seconds after which open requests are cancelled


@contextmanager
def listening_socket(settings: Settings) -> Iterator[socket.socket]:
    """Bind the socket of the server. It is bound before the model is loaded, so that a port in use is reported at
    once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server_socket = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(settings, error) from None
    with server_socket:
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server_socket.bind(address)
        except OSError as error:
            raise _cannot_listen(settings, error) from None
        yield server_socket


def _cannot_listen(settings: Settings, error: OSError) -> Misconfigured:
    return Misconfigured(
        f"{settings.host}:{settings.port} is not available: {error.strerror}. "
        "Choose another --port (0 selects a free one) or another --host."
    )


def url_of_socket(server_socket: socket.socket) -> str:
    """Return the URL of the service for clients on this machine."""
    host, port = server_socket.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):
    """uvicorn's server with a limited number of connections and time limits for them."""

    def __init__(self, config: uvicorn.Config, max_connections: int, limits: TimeLimits) -> None:
        super().__init__(config)
        self._table = ConnectionTable(max_connections, limits)
        self._timer: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and accept connections."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        loop = asyncio.get_running_loop()

        def connect(address: str) -> HttpConnection:
            state = self.lifespan.state
            return HttpConnection(self.config, self.server_state, state, self._table, address, loop)

        self._timer = loop.create_task(self._table.enforce_time_limits(loop))
        self.servers: list[Any] = [Listener(listening, self._table, connect) for listening in sockets or ()]
        for listener in self.servers:
            listener.start()
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and wait for open requests."""
        await super().shutdown(sockets)
        if self._timer is not None:
            self._timer.cancel()


class HttpServerThread:
    """The HTTP server in a thread of its own; the main thread handles signals and the terminal.

    `max_connections` is by default what the limit of open files allows.
    """

    def __init__(
        self,
        app: Any,
        server_socket: socket.socket,
        max_connections: int | None = None,
        limits: TimeLimits | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # they would replace the address of the client
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=NEVER,  # HttpConnection applies `limits`
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        self.url = url_of_socket(server_socket)
        self._server = HttpServer(
            config, max_connections or default_max_connections(), limits or TimeLimits()
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([server_socket],), name="http", daemon=True
        )

    def start(self) -> None:
        """Start the server; return when it accepts connections, or has failed."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(START_POLL_INTERVAL)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop_accepting(self) -> None:
        """Stop accepting connections."""
        self._server.should_exit = True

    def drain(self) -> None:
        """Stop accepting connections and wait up to DRAIN_TIMEOUT for open requests to finish."""
        self.stop_accepting()
        self._thread.join(DRAIN_TIMEOUT)

    def stop(self) -> None:
        """Stop the server and wait for its thread."""
        self.stop_accepting()
        self._thread.join()
