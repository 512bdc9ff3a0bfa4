"""`palimpsest serve`: API and worker in one process, with everything embedded unless settings say otherwise."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from api.app import create_app, refuse_exposure
from cli.flags import read_settings
from cli.logs import log_to_stderr
from cli.screen import bar, err, out
from cli.welcome import welcome
from service.bootstrap import Wired, wire
from service.errors import Misconfigured, PalimpsestError
from service.settings import Settings

if TYPE_CHECKING:
    from workers.worker import Worker

GRACE = 5  # seconds that open streams are given to end
GLANCE = 0.1  # seconds between two looks at the worker


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    refuse_exposure(settings)
    log_to_stderr()
    with listening(settings) as bound, stopped_by(signal.SIGINT, signal.SIGTERM) as stop:
        return serve(settings, bound, stop)


def serve(settings: Settings, bound: socket.socket, stop: threading.Event) -> int:
    """Wire, start both doors, welcome, wait, and stop both."""
    wired = wire(settings)
    site = Site(create_app(wired.operations, wired.broker, settings), bound)
    worker = make_worker(settings, wired)
    working = worker.start_in_thread()
    site.start()
    try:
        if ready(worker, working, stop):
            info = wired.operations.model()
            out.print(welcome(site.address, settings.model, info, key=settings.api_key is not None))
        while working.is_alive() and not stop.wait(GLANCE):
            pass
        return 0 if stop.is_set() else ended(worker)
    finally:
        site.close_door()
        worker.stop()
        wired.broker.close()  # ends the streams that are still open
        site.stop()
        wired.close()


def ready(worker: Worker, working: threading.Thread, stop: threading.Event) -> bool:
    """Show how far the worker is until it serves; False when it ended, or was to stop, before that."""
    with bar() as shown:
        while not worker.ready.wait(GLANCE):
            if stop.is_set() or not working.is_alive():
                return False
            progress = worker.progress
            if progress is None:
                shown.show("starting", 0, 0)
            else:
                shown.show(progress.phase, progress.done, progress.total)
    return True


def ended(worker: Worker) -> int:
    """A worker that ended unasked: an error of the house is raised, and main says it; the rest is in the log."""
    if isinstance(worker.error, PalimpsestError):
        raise worker.error
    err.print("palimpsest: the worker ended, and the service with it. The log above says why.")
    return 1


@contextmanager
def stopped_by(*signals: signal.Signals) -> Iterator[threading.Event]:
    """An event that these signals set. The second one of them ends the process on the spot."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The socket to serve on, bound before anything slow, so that a taken port is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(settings, error) from None
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError as error:
            raise _cannot_listen(settings, error) from None
        yield bound


def _cannot_listen(settings: Settings, error: OSError) -> Misconfigured:
    return Misconfigured(
        f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}. "
        "Choose another --port (0 takes a free one) or another --host."
    )


def address_of(bound: socket.socket) -> str:
    """Where a client on this machine finds the service."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Site:
    """The HTTP server in a thread of its own: the main thread is for signals and for the terminal."""

    def __init__(self, app: Any, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, server_header=False
        )
        self.address = address_of(bound)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close_door(self) -> None:
        """Let nobody in any more."""
        self._server.should_exit = True

    def stop(self) -> None:
        """Wait until everybody has left."""
        self.close_door()
        self._thread.join()


def make_worker(settings: Settings, wired: Wired) -> Worker:
    """The worker, once the parts that compute are known to be installed."""
    try:
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils import logging

        from workers.worker import Worker
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise Misconfigured(
            f"{error.name} is not installed, and the model needs it: pip install -c constraints.txt -e '.[worker]'"
        ) from None
    logging.disable_progress_bar()  # ours says how far the loading is
    enable_progress_bars()  # but a download may take long
    return Worker(settings, wired)
