"""Waiting for a database or a Redis that is still starting: cli.wait_for_dependencies."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cli import wait_for_dependencies
from cli.main import main
from cli.wait_for_dependencies import wait_for_dependency
from service.errors import Unavailable

Captured = pytest.CaptureFixture[str]


class FlakyDependency:
    """A dependency that raises `Unavailable` on the first calls."""

    def __init__(self, failures: int) -> None:
        self.failures_left = failures

    def __call__(self) -> None:
        self.failures_left -= 1
        if self.failures_left >= 0:
            raise Unavailable("the database does not answer.")


@pytest.fixture(autouse=True)
def short_retry_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_for_dependencies, "RETRY_INTERVAL", 0.01)


def test_the_wait_is_announced_once(capsys: Captured) -> None:
    """Waiting for an unavailable dependency prints one line to stderr."""
    assert wait_for_dependency(FlakyDependency(3), threading.Event())
    assert capsys.readouterr().err.count("the database does not answer.") == 1


def test_nothing_is_printed_when_dependencies_are_up(capsys: Captured) -> None:
    """Nothing is printed if the dependency is available at once."""
    assert wait_for_dependency(FlakyDependency(0), threading.Event())
    assert capsys.readouterr().err == ""


def test_waiting_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dependency that is unavailable until the timeout raises its error."""
    monkeypatch.setattr(wait_for_dependencies, "DEPENDENCY_TIMEOUT", 0.05)
    with pytest.raises(Unavailable, match="database"):
        wait_for_dependency(FlakyDependency(10_000), threading.Event())


@pytest.mark.parametrize("command", ["api", "worker"])
def test_api_and_worker_need_redis(capsys: Captured, tmp_path: Path, command: str) -> None:
    """Without Redis the command exits with 2. The message names the variable to set and the command that
    needs no Redis."""
    data = tmp_path / "data"
    assert main([command, "--port", "0", "--data-dir", str(data)]) == 2
    printed = capsys.readouterr().err
    assert "PALIMPSEST_REDIS_URL" in printed
    assert "palimpsest serve" in printed
    assert not data.exists()
