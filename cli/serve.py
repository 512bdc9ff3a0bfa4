"""`palimpsest serve`: API and worker in one process, with everything embedded unless settings say otherwise."""

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
from cli.startup_message import startup_message
from cli.terminal import out
from cli.wait_for_dependencies import wait_for_stores
from cli.worker_process import make_worker, wait_until_ready, wait_until_stopped, worker_health_server
from service.application.api_keys import ApiKeys
from service.bootstrap import Container, build_container
from service.settings import Settings


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    check_exposure(settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with (
        listening_socket(settings) as server_socket,
        stop_on_signals() as stop,
        closing(build_container(settings)) as container,
    ):
        return serve(settings, container, server_socket, stop) if wait_for_stores(container, stop) else 0


def serve(
    settings: Settings, container: Container, server_socket: socket.socket, stop: threading.Event
) -> int:
    """Start both doors, welcome, wait, and stop both."""
    server = HttpServerThread(create_app(container.services, container.broker, settings), server_socket)
    worker = make_worker(settings, container)
    with worker_health_server(worker, settings):
        worker_thread = worker.start_in_thread()
        server.start()
        try:
            if wait_until_ready(worker, worker_thread, stop):
                info = container.services.models.describe()
                key_required = settings.api_key is not None or ApiKeys(container.database).any_exist()
                out.print(startup_message(server.url, settings.model, info, key=key_required))
            return wait_until_stopped(worker, worker_thread, stop)
        finally:
            server.stop_accepting()
            worker.stop()
            container.broker.close()  # ends the streams that are still open
            server.stop()
