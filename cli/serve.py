"""`palimpsest serve`: API and worker in one process, by default with SQLite and an in-process queue."""

from __future__ import annotations

import argparse
import socket
import threading
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from cli.flags import add_command, add_setting_flags, read_settings
from cli.terminal import out
from service.settings import Settings

if TYPE_CHECKING:
    from service.bootstrap import Container


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "serve",
        run,
        description="Run the API and a worker in one process. Each option can be set as an environment variable (docs/settings.md).",
    )
    add_setting_flags(parser, Settings)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    from api.app import check_exposure
    from cli.http_server import listening_socket
    from cli.logs import log_to_stderr
    from cli.signals import stop_on_signals
    from cli.wait_for_dependencies import wait_for_stores
    from service.bootstrap import build_container
    from service.db.ownership import own_database

    settings = read_settings(args, Settings)
    check_exposure(settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with (
        listening_socket(settings) as server_socket,
        stop_on_signals() as stop,
        closing(build_container(settings)) as container,
    ):
        if not wait_for_stores(container, stop):
            return 0
        with own_database(container.database) if container.single_process else nullcontext():
            return serve(settings, container, server_socket, stop)


def serve(
    settings: Settings, container: Container, server_socket: socket.socket, stop: threading.Event
) -> int:
    """Start the HTTP server and the worker, print the startup message, and stop both when `stop` is set."""
    from api.app import create_app
    from cli.access import access_notice, resolve_development
    from cli.http_server import HttpServerThread
    from cli.startup_message import startup_message
    from cli.worker_process import make_worker, wait_until_ready, wait_until_stopped, worker_health_server
    from service.application.development import Development

    development = resolve_development(settings, container.database, Development.UNTIL_FIRST_KEY)
    app = create_app(container.services, container.broker, settings, development)
    server = HttpServerThread(app, server_socket, settings.max_connections)
    worker = make_worker(settings, container)
    with worker_health_server(worker, settings):
        worker_thread = worker.start_in_thread()
        server.start()
        try:
            if wait_until_ready(worker, worker_thread, stop):
                info = container.services.models.describe()
                notice = access_notice(settings, container.database, development)
                key_required = development is Development.OFF
                out.print(startup_message(server.url, settings.model, info, notice, key_required))
            return wait_until_stopped(worker, worker_thread, stop)
        finally:
            server.stop_accepting()
            worker.stop()
            container.broker.close()  # ends the open event streams
            server.stop()
