"""The worker of a process: its creation, its health server, and waiting until it is ready or has stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.local_model import missing_dependency_error
from cli.terminal import err, progress_bar
from service.bootstrap import Container
from service.errors import PalimpsestError
from service.kit.garbage import exclude_from_collection
from service.settings import Settings

if TYPE_CHECKING:
    from workers.worker import Worker

POLL_INTERVAL = 0.1  # seconds between two checks of the worker


def make_worker(settings: Settings, container: Container) -> Worker:
    """Return the worker; raise `Misconfigured` if torch or transformers are not installed."""
    try:
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils import logging

        from workers.worker import Worker
    except ModuleNotFoundError as error:
        raise missing_dependency_error(error) from None
    logging.disable_progress_bar()  # the progress bar of this process shows the loading
    enable_progress_bars()  # of downloads, which can be long
    return Worker(settings, container)


@contextmanager
def worker_health_server(worker: Worker, settings: Settings) -> Iterator[None]:
    """Serve the metrics and the health of the worker, if `metrics_port` is set."""
    if settings.metrics_port is None:
        yield
        return
    from workers.health_server import HealthServer

    server = HealthServer(settings.metrics_host, settings.metrics_port, worker.health_problem)
    server.start()
    try:
        yield
    finally:
        server.stop()


def wait_until_ready(worker: Worker, thread: threading.Thread, stop: threading.Event) -> bool:
    """Show that the worker starts until it serves; return False when it or the process stops before."""
    with progress_bar() as display:
        while not worker.ready.wait(POLL_INTERVAL):
            if stop.is_set() or not thread.is_alive():
                return False
            display.update("starting", 0, 0)
    exclude_from_collection()
    return True


def wait_until_stopped(worker: Worker, thread: threading.Thread, stop: threading.Event) -> int:
    """Wait until `stop` is set or the worker exits; return the exit code of the process. Meanwhile show what the
    worker prepares."""
    show_preparation(worker, thread, stop)
    while thread.is_alive() and not stop.wait(POLL_INTERVAL):
        pass
    return 0 if stop.is_set() else report_worker_exit(worker)


def show_preparation(worker: Worker, thread: threading.Thread, stop: threading.Event) -> None:
    """Show the progress of the preparation at the start until it has ended."""
    preparation = worker.preparation
    if preparation is None or preparation.progress is None:
        return
    err.print("Collecting statistics of keys in the background; edits wait for them, all else is served.")
    with progress_bar() as display:
        while progress := preparation.progress:
            display.update(progress.label, progress.done, progress.total, progress.seconds_left)
            if not thread.is_alive() or stop.wait(POLL_INTERVAL):
                return
    failed = preparation.error
    err.print(f"The preparation failed: {failed}" if failed else "The statistics are ready.")


def report_worker_exit(worker: Worker) -> int:
    """Raise the domain error of a worker that exited unexpectedly, for `main` to print; the log has any other error."""
    if isinstance(worker.error, PalimpsestError):
        raise worker.error
    err.print("palimpsest: the worker stopped unexpectedly; the log above has the reason.")
    return 1
