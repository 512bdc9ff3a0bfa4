"""Following the head of the ledger: service.engine.ledger_follower."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.ledger_follower import LedgerFollower
from service.errors import Unavailable
from tests.support.stepped_service import SteppedService


class FailingReporter:
    """A reporter whose calls raise each of the given errors once."""

    def __init__(self, **errors: Exception) -> None:
        self.errors = errors
        self.calls: list[tuple[str, int]] = []

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        self._record("heartbeat", version)

    def record_capacity(self, version: int, capacity: dict[int, float]) -> None:
        assert set(capacity) == {0, 1}
        self._record("record_capacity", version)

    def _record(self, name: str, version: int) -> None:
        if (error := self.errors.pop(name, None)) is not None:
            raise error
        self.calls.append((name, version))


@pytest.fixture
def service(tmp_path: Path) -> SteppedService:
    """Return a service at version 1."""
    service = SteppedService(tmp_path)
    service.edit("Eiffel Tower", "Rome")
    return service


def follow(follower: LedgerFollower) -> int:
    """Run all steps; return how many raised Unavailable."""
    outages = 0
    follower.poll()
    while follower.pending:
        try:
            follower.step()
        except Unavailable:
            outages += 1
    return outages


def test_head_is_built_reported_and_its_capacity_recorded(service: SteppedService) -> None:
    """The newest version is built and reported before its capacity is recorded."""
    reporter = FailingReporter()
    follower = LedgerFollower(service.replica, reporter, poll_interval=0)
    assert follow(follower) == 0
    assert reporter.calls == [("heartbeat", 1), ("record_capacity", 1)]
    assert follower.served_version == (1, service.replica.attested_digest(1))


@pytest.mark.parametrize("name", ["heartbeat", "record_capacity"])
def test_reports_are_repeated_after_an_outage(service: SteppedService, name: str) -> None:
    """A report that meets an outage is repeated by a later step, with the same values."""
    reporter = FailingReporter(**{name: Unavailable("down.")})
    follower = LedgerFollower(service.replica, reporter, poll_interval=0)
    assert follow(follower) == 1
    assert reporter.calls == [("heartbeat", 1), ("record_capacity", 1)]


def test_capacity_that_cannot_be_recorded_is_left_out(service: SteppedService) -> None:
    """Any other error of the capacity is logged and does not stop the engine."""
    reporter = FailingReporter(record_capacity=ValueError("broken"))
    follower = LedgerFollower(service.replica, reporter, poll_interval=0)
    assert follow(follower) == 0
    assert reporter.calls == [("heartbeat", 1)] and not follower.pending
