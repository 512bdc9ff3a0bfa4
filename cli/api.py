"""`palimpsest api`: an API process. It holds no model and imports no torch; any number of them can run."""

from __future__ import annotations

import argparse
import socket
import threading
from contextlib import closing
from typing import TYPE_CHECKING

from cli.flags import add_command, add_setting_flags, read_settings
from cli.terminal import err, out
from service.settings import Settings

if TYPE_CHECKING:
    from service.bootstrap import Container

POLL_INTERVAL = 0.1  # seconds between two checks of the server thread


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "api",
        run,
        description="Run an API process. It holds no model; workers receive its jobs through Redis. Each option can be set as an "
        "environment variable (docs/settings.md).",
    )
    add_setting_flags(parser, Settings)


def run(args: argparse.Namespace) -> int:
    """Serve HTTP until SIGINT or SIGTERM."""
    from api.app import check_exposure
    from cli.http_server import listening_socket
    from cli.logs import log_to_stderr
    from cli.signals import stop_on_signals
    from cli.wait_for_dependencies import require_redis, wait_for_stores
    from service.bootstrap import build_container

    settings = read_settings(args, Settings)
    require_redis(settings, "api")
    check_exposure(settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with (
        listening_socket(settings) as server_socket,
        stop_on_signals() as stop,
        closing(build_container(settings)) as container,
    ):
        if not wait_for_stores(container, stop):
            return 0
        return serve_until_stopped(settings, container, server_socket, stop)


def serve_until_stopped(
    settings: Settings, container: Container, server_socket: socket.socket, stop: threading.Event
) -> int:
    """Start the HTTP server, wait for `stop`, then let open requests finish."""
    from api.app import create_app
    from cli.access import access_notice, resolve_development
    from cli.http_server import HttpServerThread
    from service.application.development import Development
    from service.kit.garbage import exclude_from_collection

    development = resolve_development(settings, container.database, Development.OFF)
    app = create_app(container.services, container.broker, settings, development)
    server = HttpServerThread(app, server_socket, settings.max_connections)
    exclude_from_collection()
    server.start()
    try:
        out.print(
            f"Palimpsest is ready on {server.url}   (console: {server.url}, documentation: {server.url}/docs)"
        )
        if notice := access_notice(settings, container.database, development):
            out.print(notice)
        while server.is_alive() and not stop.wait(POLL_INTERVAL):
            pass
    finally:
        server.drain()
        container.broker.close()  # ends the open event streams
        server.stop()
    if stop.is_set():
        return 0
    err.print("palimpsest: the HTTP server stopped unexpectedly; the log above has the reason.")
    return 1
