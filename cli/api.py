"""`palimpsest api`: the HTTP door alone. Its process holds no model and no torch; start as many as you like."""

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
from cli.terminal import err, out
from cli.wait_for_dependencies import refuse_alone, up
from service.bootstrap import Wired, wire
from service.settings import Settings

GLANCE = 0.1  # seconds between two looks at the server


def run(args: argparse.Namespace) -> int:
    """Answer until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    refuse_alone(settings, "api")
    refuse_exposure(settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with listening(settings) as bound, stopped_by() as stop, closing(wire(settings)) as wired:
        return answer(settings, wired, bound, stop) if up(wired, stop) else 0


def answer(settings: Settings, wired: Wired, bound: socket.socket, stop: threading.Event) -> int:
    """Open the door, wait, and close it behind those who are in."""
    site = Site(create_app(wired.operations, wired.broker, settings), bound)
    site.start()
    try:
        out.print(
            f"Palimpsest is ready on {site.address}   (open it in a browser; documentation: {site.address}/docs)"
        )
        while site.alive() and not stop.wait(GLANCE):
            pass
    finally:
        site.drain()
        wired.broker.close()  # ends the streams that are still open
        site.stop()
    if stop.is_set():
        return 0
    err.print("palimpsest: the HTTP server ended, and the process with it. The log above says why.")
    return 1
