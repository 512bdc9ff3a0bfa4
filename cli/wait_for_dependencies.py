"""Wait at the start of a process until the database and Redis are available."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cli.terminal import err, strip_control_chars
from service.bootstrap import Container
from service.errors import Misconfigured, Unavailable
from service.kit.retry import retry_until_available
from service.ledger import audit
from service.settings import Settings

DEPENDENCY_TIMEOUT = 60.0  # seconds
RETRY_INTERVAL = 1.0  # seconds between two attempts


def require_redis(settings: Settings, command: str) -> None:
    """Raise `Misconfigured` unless Redis is configured: it connects API processes and workers."""
    if settings.redis_url is None:
        raise Misconfigured(
            f"`palimpsest {command}` needs Redis: set PALIMPSEST_REDIS_URL, for example to redis://127.0.0.1:6379/0, "
            "and PALIMPSEST_DATABASE_URL to the PostgreSQL database of the ledger. "
            "`palimpsest serve` runs everything in one process and needs neither."
        )


def wait_for_stores(container: Container, stop: threading.Event) -> bool:
    """Migrate the database to head, check the key of the ledger and connect to the queue.

    Return False when `stop` is set first.
    """
    actions: tuple[Callable[[], object], ...] = (
        container.database.migrate,
        lambda: audit.establish(container.database),
        lambda: container.broker.queue_depth("generate"),
    )
    return all(wait_for_dependency(action, stop) for action in actions)


def wait_for_dependency(action: Callable[[], object], stop: threading.Event) -> bool:
    """Retry `action` for up to DEPENDENCY_TIMEOUT seconds, and print once that the process is waiting."""
    announced = False

    def announce(error: Unavailable) -> None:
        nonlocal announced
        if not announced:
            err.print(
                f"palimpsest: waiting up to {DEPENDENCY_TIMEOUT:.0f} seconds: {strip_control_chars(error.detail)}"
            )
        announced = True

    return retry_until_available(
        action, stop, interval=RETRY_INTERVAL, timeout=DEPENDENCY_TIMEOUT, on_retry=announce
    )
