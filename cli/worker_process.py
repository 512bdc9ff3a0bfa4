"""The worker of a process: made if what computes is installed, watched until it serves, heard when it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.local_model import missing_dependency_error
from cli.terminal import err, progress_bar
from service.bootstrap import Container
from service.errors import PalimpsestError
from service.settings import Settings

if TYPE_CHECKING:
    from workers.worker import Worker

POLL_INTERVAL = 0.1  # seconds between two looks at the worker


def make_worker(settings: Settings, container: Container) -> Worker:
    """The worker, once the parts that compute are known to be installed."""
    try:
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils import logging

        from workers.worker import Worker
    except ModuleNotFoundError as error:
        raise missing_dependency_error(error) from None
    logging.disable_progress_bar()  # ours says how far the loading is
    enable_progress_bars()  # but a download may take long
    return Worker(settings, container)


@contextmanager
def worker_health_server(worker: Worker, settings: Settings) -> Iterator[None]:
    """The worker's own metrics and health, where a port is set for them."""
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
    """Show how far the worker is until it serves; False when it ended, or was to stop, before that."""
    with progress_bar() as display:
        while not worker.ready.wait(POLL_INTERVAL):
            if stop.is_set() or not thread.is_alive():
                return False
            progress = worker.progress
            if progress is None:
                display.update("starting", 0, 0)
            else:
                display.update(progress.label, progress.done, progress.total)
    return True


def wait_until_stopped(worker: Worker, thread: threading.Thread, stop: threading.Event) -> int:
    """Wait until the worker is to stop or ends by itself; the process's exit code."""
    while thread.is_alive() and not stop.wait(POLL_INTERVAL):
        pass
    return 0 if stop.is_set() else report_worker_exit(worker)


def report_worker_exit(worker: Worker) -> int:
    """A worker that ended unasked: an error of the house is raised, and main says it; the rest is in the log."""
    if isinstance(worker.error, PalimpsestError):
        raise worker.error
    err.print("palimpsest: the worker ended, and the process with it. The log above says why.")
    return 1
