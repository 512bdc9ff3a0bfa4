"""The HTTP server of a worker, for probes and Prometheus: GET /metrics and GET /healthz."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from service.errors import Misconfigured
from service.kit import metrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CLIENT_TIMEOUT = 5.0  # seconds that a client may be silent
CONNECTION_TIMEOUT = 15.0  # seconds from a connection to its end
MAX_CONNECTIONS = 16  # the oldest is closed for a new one
ACCEPT_PAUSE = 0.1  # seconds after an error of the system, such as too many open files

#: returns why the worker does not serve now; None when it serves
HealthCheck = Callable[[], str | None]


class HealthServer:
    """Serves from `start` to `stop`. /healthz is 503, with the reason, while the health check returns one."""

    def __init__(self, host: str, port: int, health_check: HealthCheck) -> None:
        try:
            self._server = _HttpServer((host, port), _RequestHandler)
        except OSError as error:
            raise Misconfigured(
                f"cannot listen on {host}:{port}: {error.strerror}. "
                "Choose another --metrics-port (0 takes a free one) or another --metrics-host."
            ) from None
        self._server.set_app(_wsgi_app(health_check))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and close the port; also a server that was not started."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _wsgi_app(health_check: HealthCheck) -> WSGIApplication:
    metrics_app: WSGIApplication = make_wsgi_app(metrics.REGISTRY, disable_compression=True)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def respond(status: str, text: str) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]

        if environ["REQUEST_METHOD"] != "GET":
            return respond("405 Method Not Allowed", "use GET\n")
        if environ["PATH_INFO"] == "/metrics":
            return metrics_app(environ, start_response)
        if environ["PATH_INFO"] == "/healthz":
            problem = health_check()
            return respond("503 Service Unavailable" if problem else "200 OK", f"{problem or 'alive'}\n")
        return respond("404 Not Found", "use /metrics or /healthz\n")

    return app


class _HttpServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection. Their number and the time of each are limited."""

    request_queue_size = 128  # connections that the system accepts before this process does
    daemon_threads = True
    block_on_close = False  # a silent client must not delay the shutdown

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._accepted_at: dict[socket.socket, float] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. After an error wait a moment: the socket stays readable, and the loop would spin."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread; close the oldest if there are too many."""
        with self._lock:
            self._accepted_at[request] = time.monotonic()
            excess = list(self._accepted_at)[:-MAX_CONNECTIONS]
        self._end(excess)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Close the connections that have taken too long."""
        with self._lock:
            oldest = time.monotonic() - CONNECTION_TIMEOUT
            late = [connection for connection, at in self._accepted_at.items() if at < oldest]
        self._end(late)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._accepted_at.pop(request, None)
        super().shutdown_request(request)

    def _end(self, connections: Iterable[socket.socket]) -> None:
        """Make the threads of these connections end: their reads and writes fail."""
        for connection in connections:
            with self._lock:
                self._accepted_at.pop(connection, None)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class _RequestHandler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT

    def log_message(self, format: str, *args: object) -> None:
        """Do not log probes."""
