"""`palimpsest serve`: API and worker in one process, with everything embedded unless settings say otherwise."""

from __future__ import annotations

import argparse
import socket
import threading
from contextlib import closing

from api.app import create_app, refuse_exposure
from cli.flags import read_settings
from cli.http_server import Site, listening
from cli.logs import log_to_stderr
from cli.signals import stopped_by
from cli.startup_message import welcome
from cli.terminal import out
from cli.wait_for_dependencies import up
from cli.worker_process import exposed, make_worker, ready, watched
from service.application.api_keys import Keys
from service.bootstrap import Wired, wire
from service.settings import Settings


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    refuse_exposure(settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with listening(settings) as bound, stopped_by() as stop, closing(wire(settings)) as wired:
        return serve(settings, wired, bound, stop) if up(wired, stop) else 0


def serve(settings: Settings, wired: Wired, bound: socket.socket, stop: threading.Event) -> int:
    """Start both doors, welcome, wait, and stop both."""
    site = Site(create_app(wired.operations, wired.broker, settings), bound)
    worker = make_worker(settings, wired)
    with exposed(worker, settings):
        working = worker.start_in_thread()
        site.start()
        try:
            if ready(worker, working, stop):
                info = wired.operations.models.resident()
                closed = settings.api_key is not None or Keys(wired.database).exist()
                out.print(welcome(site.address, settings.model, info, key=closed))
            return watched(worker, working, stop)
        finally:
            site.close_door()
            worker.stop()
            wired.broker.close()  # ends the streams that are still open
            site.stop()
