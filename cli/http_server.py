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

KEEP_ALIVE_TIMEOUT = (
    75  # seconds until an idle connection is closed; longer than the timeout of common proxies
)
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


class HttpServerThread:
    """The HTTP server in a thread of its own; the main thread handles signals and the terminal."""

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
