"""Waiting for what a process needs: a database or a Redis that is started beside it takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cli.terminal import err, plain
from service.bootstrap import Wired
from service.errors import Misconfigured, Unavailable
from service.settings import Settings

PATIENCE = 60.0  # seconds
PAUSE = 1.0  # between two tries


def refuse_alone(settings: Settings, command: str) -> None:
    """A process that does half of the work needs Redis to find the other half."""
    if settings.redis_url is None:
        raise Misconfigured(
            f"`palimpsest {command}` shares the work through Redis: set PALIMPSEST_REDIS_URL, for example to "
            "redis://127.0.0.1:6379/0, and PALIMPSEST_DATABASE_URL to the ledger's PostgreSQL. For one process that needs "
            "neither there is `palimpsest serve`."
        )


def up(wired: Wired, stop: threading.Event) -> bool:
    """Bring the database to head and see that the queue answers; False when stopped before."""
    return wait_for(wired.database.migrate, stop) and wait_for(lambda: wired.broker.waiting("generate"), stop)


def wait_for(need: Callable[[], object], stop: threading.Event) -> bool:
    """Try until it works, and say once that there is waiting; Unavailable in the end. False when stopped before."""
    deadline, said = time.monotonic() + PATIENCE, False
    while not stop.is_set():
        try:
            need()
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            if not said:
                err.print(f"palimpsest: waiting up to {PATIENCE:.0f} seconds: {plain(error.detail)}")
            said = True
            stop.wait(PAUSE)
        else:
            return True
    return False
