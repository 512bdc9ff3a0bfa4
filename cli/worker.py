"""`palimpsest work`: one worker. It takes its work from Redis and keeps its word in the ledger's database."""

from __future__ import annotations

import argparse
import threading
from contextlib import closing

from cli.flags import read_settings
from cli.logs import log_to_stderr
from cli.signals import stop_on_signals
from cli.terminal import out, strip_control_chars
from cli.wait_for_dependencies import require_redis, wait_for_stores
from cli.worker_process import make_worker, wait_until_ready, wait_until_stopped, worker_health_server
from service.bootstrap import Container, build_container
from service.settings import Settings


def run(args: argparse.Namespace) -> int:
    """Work until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    require_redis(settings, "worker")
    log_to_stderr(settings.log_format, settings.log_level)
    with stop_on_signals() as stop, closing(build_container(settings)) as container:
        return run_worker(settings, container, stop)


def run_worker(settings: Settings, container: Container, stop: threading.Event) -> int:
    """Load, serve, and stop kindly: what is being said is said to its end, the rest is handed back."""
    worker = make_worker(settings, container)
    with worker_health_server(worker, settings):
        if not wait_for_stores(container, stop):
            return 0
        worker_thread = worker.start_in_thread()
        try:
            if wait_until_ready(worker, worker_thread, stop):
                out.print(
                    strip_control_chars(f"{worker.id} serves {worker.model}: {', '.join(worker.roles)}")
                )
            return wait_until_stopped(worker, worker_thread, stop)
        finally:
            worker.stop()
