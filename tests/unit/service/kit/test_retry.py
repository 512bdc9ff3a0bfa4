"""Retries while a dependency is unavailable: service.kit.retry."""

from __future__ import annotations

import threading

import pytest

from service.errors import Misconfigured, Unavailable
from service.kit.retry import retry_until_available


class FlakyDependency:
    """Raises `Unavailable` on the first calls."""

    def __init__(self, failures: int, stop: threading.Event | None = None) -> None:
        self.failures_left = failures
        self.stop = stop

    def __call__(self) -> None:
        self.failures_left -= 1
        if self.failures_left >= 0:
            if self.stop is not None:
                self.stop.set()
            raise Unavailable("the database does not answer.")


def test_an_action_is_retried_until_it_succeeds() -> None:
    """The action is called again after each `Unavailable`, and every failure is reported."""
    errors: list[Unavailable] = []
    assert retry_until_available(
        FlakyDependency(3), threading.Event(), interval=0.001, on_retry=errors.append
    )
    assert [error.detail for error in errors] == ["the database does not answer."] * 3


def test_the_timeout_raises_the_last_error() -> None:
    """A dependency that stays down ends in its own error."""
    with pytest.raises(Unavailable, match="database"):
        retry_until_available(FlakyDependency(10_000), threading.Event(), interval=0.001, timeout=0.02)


def test_other_errors_are_raised_at_once() -> None:
    """Only `Unavailable` is retried."""

    def action() -> None:
        raise Misconfigured("no such database.")

    with pytest.raises(Misconfigured):
        retry_until_available(action, threading.Event())


def test_stop_ends_the_retries() -> None:
    """A stop event returns False, whether it is set before the first call or during a wait."""
    stop = threading.Event()
    assert not retry_until_available(FlakyDependency(10_000, stop), stop)
    assert not retry_until_available(pytest.fail, stop)
