"""A worker's own small HTTP server: its metrics, and whether it serves. For probes and Prometheus, never for users."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from service.errors import Misconfigured
from service.kit import metrics

CLIENT_TIMEOUT = 5.0  # seconds that a client may be silent
PLAIN_TEXT = "text/plain; charset=utf-8"

#: why the worker does not serve now; None when it does
HealthCheck = Callable[[], str | None]


class HealthServer:
    """Serves GET /metrics and GET /healthz from `start` to `stop`. /healthz is 503, with the reason, while there is trouble."""

    def __init__(self, host: str, port: int, health_check: HealthCheck) -> None:
        try:
            self._server = _HttpServer((host, port), health_check)
        except OSError as error:
            raise Misconfigured(
                f"{host}:{port} cannot be listened on: {error.strerror}. "
                "Choose another --metrics-port (0 takes a free one) or another --metrics-host."
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Also without a `start` before."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a silent client must not hold up the worker's end

    def __init__(self, address: tuple[str, int], health_check: HealthCheck) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.health_check = health_check
        super().__init__(address, _RequestHandler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's concern."""


class _RequestHandler(BaseHTTPRequestHandler):
    server: _HttpServer
    timeout = CLIENT_TIMEOUT
    server_version = "palimpsest"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._respond(200, metrics.CONTENT_TYPE, metrics.render_metrics())
        elif path == "/healthz":
            problem = self.server.health_check()
            self._respond(503 if problem else 200, PLAIN_TEXT, f"{problem or 'alive'}\n".encode())
        else:
            self._respond(404, PLAIN_TEXT, b"Here are /metrics and /healthz.\n")

    def _respond(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes are no news."""
