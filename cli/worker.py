"""`palimpsest worker`: a worker process. It receives jobs through Redis and commits results to the database."""

from __future__ import annotations

import argparse
import threading
from contextlib import closing
from typing import TYPE_CHECKING

from cli.flags import add_command, add_setting_flags, read_settings
from cli.terminal import out, strip_control_chars
from service.settings import Settings

if TYPE_CHECKING:
    from service.bootstrap import Container


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "worker",
        run,
        description="Run a worker process. It receives jobs from the API processes through Redis. Each option can be set as an "
        "environment variable (docs/settings.md).",
    )
    add_setting_flags(parser, Settings)


def run(args: argparse.Namespace) -> int:
    """Work until SIGINT or SIGTERM."""
    from cli.logs import log_to_stderr
    from cli.signals import stop_on_signals
    from cli.wait_for_dependencies import require_redis
    from service.bootstrap import build_container

    settings = read_settings(args, Settings)
    require_redis(settings, "worker")
    log_to_stderr(settings.log_format, settings.log_level)
    with stop_on_signals() as stop, closing(build_container(settings)) as container:
        return run_worker(settings, container, stop)


def run_worker(settings: Settings, container: Container, stop: threading.Event) -> int:
    """Load the model and work until `stop` is set; then finish running generations and requeue all other work."""
    from cli.wait_for_dependencies import wait_for_stores
    from cli.worker_process import make_worker, wait_until_ready, wait_until_stopped, worker_health_server

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
