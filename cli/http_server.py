"""The HTTP server of a process: its socket, and the thread that serves on it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from service.errors import Misconfigured
from service.settings import Settings

KEEP_ALIVE_TIMEOUT = 75  # seconds that an idle connection is kept: longer than the usual proxy keeps it
DRAIN_TIMEOUT = 5.0  # seconds that requests are given to end by themselves
SHUTDOWN_TIMEOUT = 8  # and seconds after which they are cut off


@contextmanager
def listening_socket(settings: Settings) -> Iterator[socket.socket]:
    """The socket to serve on, bound before anything slow, so that a taken port is known at once."""
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
        f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}. "
        "Choose another --port (0 takes a free one) or another --host."
    )


def url_of_socket(server_socket: socket.socket) -> str:
    """Where a client on this machine finds the service."""
    host, port = server_socket.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServerThread:
    """The HTTP server in a thread of its own: the main thread is for signals and for the terminal."""

    def __init__(self, app: Any, server_socket: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        self.url = url_of_socket(server_socket)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([server_socket],), name="http", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop_accepting(self) -> None:
        """Let nobody in any more."""
        self._server.should_exit = True

    def drain(self) -> None:
        """Give those who are in a while to leave by themselves."""
        self.stop_accepting()
        self._thread.join(DRAIN_TIMEOUT)

    def stop(self) -> None:
        """Wait until everybody has left."""
        self.stop_accepting()
        self._thread.join()
