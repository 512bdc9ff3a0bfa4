"""Retry an action while a dependency is unavailable."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_never,
    stop_when_event_set,
    wait_fixed,
)

from service.errors import Unavailable


def retry_until_available(
    action: Callable[[], object],
    stop: threading.Event,
    *,
    interval: float = 1.0,
    timeout: float | None = None,
    on_retry: Callable[[Unavailable], object] | None = None,
) -> bool:
    """Call `action` until it no longer raises `Unavailable`; return True then, and False when `stop` is set first.

    `interval` and `timeout` are in seconds. The last `Unavailable` is raised after `timeout`; without one the action is
    retried until `stop` is set. `on_retry` is called with the error before each wait. Every other error is raised at
    once.
    """

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if on_retry is not None and isinstance(error, Unavailable):
            on_retry(error)

    retrying = Retrying(
        retry=retry_if_exception_type(Unavailable),
        wait=wait_fixed(interval),
        stop=stop_any(
            stop_when_event_set(stop), stop_never if timeout is None else stop_after_delay(timeout)
        ),
        sleep=sleep_using_event(stop),
        before_sleep=before_sleep,
        reraise=True,
    )
    if stop.is_set():
        return False
    try:
        retrying(action)
    except Unavailable:
        if stop.is_set():
            return False
        raise
    return True
