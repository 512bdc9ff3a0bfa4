"""Waiting for what a process needs: a database or a Redis that is started beside it takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cli.terminal import err, strip_control_chars
from service.bootstrap import Container
from service.errors import Misconfigured, Unavailable
from service.settings import Settings

DEPENDENCY_TIMEOUT = 60.0  # seconds
RETRY_INTERVAL = 1.0  # between two tries


def require_redis(settings: Settings, command: str) -> None:
    """A process that does half of the work needs Redis to find the other half."""
    if settings.redis_url is None:
        raise Misconfigured(
            f"`palimpsest {command}` shares the work through Redis: set PALIMPSEST_REDIS_URL, for example to "
            "redis://127.0.0.1:6379/0, and PALIMPSEST_DATABASE_URL to the ledger's PostgreSQL. For one process that needs "
            "neither there is `palimpsest serve`."
        )


def wait_for_stores(container: Container, stop: threading.Event) -> bool:
    """Bring the database to head and see that the queue answers; False when stopped before."""
    return retry_until_available(container.database.migrate, stop) and retry_until_available(
        lambda: container.broker.queue_depth("generate"), stop
    )


def retry_until_available(operation: Callable[[], object], stop: threading.Event) -> bool:
    """Try until it works, and say once that there is waiting; Unavailable in the end. False when stopped before."""
    deadline, announced = time.monotonic() + DEPENDENCY_TIMEOUT, False
    while not stop.is_set():
        try:
            operation()
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            if not announced:
                err.print(
                    f"palimpsest: waiting up to {DEPENDENCY_TIMEOUT:.0f} seconds: {strip_control_chars(error.detail)}"
                )
            announced = True
            stop.wait(RETRY_INTERVAL)
        else:
            return True
    return False
