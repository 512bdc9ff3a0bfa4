"""`palimpsest api`: the HTTP door alone. Its process holds no model and no torch; start as many as you like."""

from __future__ import annotations

import argparse
import socket
import threading
from contextlib import closing

from api.app import check_exposure, create_app
from cli.flags import read_settings
from cli.http_server import HttpServerThread, listening_socket
from cli.logs import log_to_stderr
from cli.signals import stop_on_signals
from cli.terminal import err, out
from cli.wait_for_dependencies import require_redis, wait_for_stores
from service.bootstrap import Container, build_container
from service.settings import Settings

POLL_INTERVAL = 0.1  # seconds between two looks at the server


def run(args: argparse.Namespace) -> int:
    """Answer until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    require_redis(settings, "api")
    check_exposure(settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with (
        listening_socket(settings) as server_socket,
        stop_on_signals() as stop,
        closing(build_container(settings)) as container,
    ):
        return (
            serve_until_stopped(settings, container, server_socket, stop)
            if wait_for_stores(container, stop)
            else 0
        )


def serve_until_stopped(
    settings: Settings, container: Container, server_socket: socket.socket, stop: threading.Event
) -> int:
    """Open the door, wait, and close it behind those who are in."""
    server = HttpServerThread(create_app(container.services, container.broker, settings), server_socket)
    server.start()
    try:
        out.print(
            f"Palimpsest is ready on {server.url}   (open it in a browser; documentation: {server.url}/docs)"
        )
        while server.is_alive() and not stop.wait(POLL_INTERVAL):
            pass
    finally:
        server.drain()
        container.broker.close()  # ends the streams that are still open
        server.stop()
    if stop.is_set():
        return 0
    err.print("palimpsest: the HTTP server ended, and the process with it. The log above says why.")
    return 1
