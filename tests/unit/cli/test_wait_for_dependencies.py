"""Waiting for a database or a Redis that is still starting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cli import wait_for_dependencies
from cli.main import main
from cli.wait_for_dependencies import retry_until_available
from service.errors import Misconfigured, Unavailable

Captured = pytest.CaptureFixture[str]


class FlakyDependency:
    """Something that is down for the first few times."""

    def __init__(self, failures: int) -> None:
        self.failures_left = failures

    def __call__(self) -> None:
        self.failures_left -= 1
        if self.failures_left >= 0:
            raise Unavailable("the database does not answer.")


@pytest.fixture(autouse=True)
def short_retry_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_for_dependencies, "RETRY_INTERVAL", 0.01)


def test_waits_for_a_dependency_that_comes_up(capsys: Captured) -> None:
    """A need that is down for a while is waited for, and that is said once."""
    assert retry_until_available(FlakyDependency(3), threading.Event())
    assert capsys.readouterr().err.count("the database does not answer.") == 1


def test_nothing_is_printed_when_dependencies_are_up(capsys: Captured) -> None:
    """Where nothing has to be waited for nothing is said."""
    assert retry_until_available(FlakyDependency(0), threading.Event())
    assert capsys.readouterr().err == ""


def test_waiting_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never comes up is told as what it is."""
    monkeypatch.setattr(wait_for_dependencies, "DEPENDENCY_TIMEOUT", 0.05)
    with pytest.raises(Unavailable, match="database"):
        retry_until_available(FlakyDependency(10_000), threading.Event())


def test_a_wrong_configuration_is_not_waited_for() -> None:
    """What will not mend itself is told at once."""

    def need() -> None:
        raise Misconfigured("no such database.")

    with pytest.raises(Misconfigured):
        retry_until_available(need, threading.Event())


def test_waiting_can_be_stopped() -> None:
    """Whoever is asked to stop while it waits stops."""
    stop = threading.Event()
    need = FlakyDependency(10_000)

    def stopping() -> None:
        stop.set()
        need()

    assert not retry_until_available(stopping, stop)


@pytest.mark.parametrize("command", ["api", "work"])
def test_api_and_worker_need_redis(capsys: Captured, tmp_path: Path, command: str) -> None:
    """A process that does half of the work does not start without Redis, and says what to set or to start instead."""
    data = tmp_path / "data"
    assert main([command, "--port", "0", "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert "PALIMPSEST_REDIS_URL" in said
    assert "palimpsest serve" in said
    assert not data.exists()
