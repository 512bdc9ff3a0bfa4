"""`palimpsest work`: one worker. It takes its work from Redis and keeps its word in the ledger's database."""

from __future__ import annotations

import argparse
import threading
from contextlib import closing

from cli.flags import read_settings
from cli.logs import log_to_stderr
from cli.signals import stopped_by
from cli.terminal import out, plain
from cli.wait_for_dependencies import refuse_alone, up
from cli.worker_process import exposed, make_worker, ready, watched
from service.bootstrap import Wired, wire
from service.settings import Settings


def run(args: argparse.Namespace) -> int:
    """Work until Ctrl-C or SIGTERM."""
    settings = read_settings(args, Settings)
    refuse_alone(settings, "work")
    log_to_stderr(settings.log_format, settings.log_level)
    with stopped_by() as stop, closing(wire(settings)) as wired:
        return work(settings, wired, stop)


def work(settings: Settings, wired: Wired, stop: threading.Event) -> int:
    """Load, serve, and stop kindly: what is being said is said to its end, the rest is handed back."""
    worker = make_worker(settings, wired)
    with exposed(worker, settings):
        if not up(wired, stop):
            return 0
        working = worker.start_in_thread()
        try:
            if ready(worker, working, stop):
                out.print(plain(f"{worker.id} serves {worker.model}: {', '.join(worker.roles)}"))
            return watched(worker, working, stop)
        finally:
            worker.stop()
