"""The HTTP server of a worker, for probes and Prometheus: GET /metrics and GET /healthz."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from service.errors import Misconfigured
from service.kit import metrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CLIENT_TIMEOUT = 5.0  # seconds that a client may be silent

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
    daemon_threads = True
    block_on_close = False  # a silent client must not delay the shutdown

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class _RequestHandler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT

    def log_message(self, format: str, *args: object) -> None:
        """Do not log probes."""
