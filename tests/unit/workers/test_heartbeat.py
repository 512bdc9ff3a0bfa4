"""The heartbeats of a worker: workers.heartbeat."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.engine.engine import Engine
from service.jobs.worker_session import WorkerSession
from tests.support.local_server import wait_until
from workers.heartbeat import HeartbeatThread


class FakeWorkerSession:
    def __init__(self) -> None:
        self.beats: list[tuple[int, str]] = []
        self.sweeps = 0

    def heartbeat(self, version: int, digest: str) -> None:
        self.beats.append((version, digest))

    def notify_lost_jobs(self) -> None:
        self.sweeps += 1


def make_paused(session: FakeWorkerSession, **engine: Any) -> HeartbeatThread:
    values = {"hung": False, "served_version": (3, "digest"), **engine}
    return HeartbeatThread(cast(Engine, SimpleNamespace(**values)), cast(WorkerSession, session), lease=30.0)


def make_heartbeat(**engine: Any) -> tuple[HeartbeatThread, FakeWorkerSession]:
    session = FakeWorkerSession()
    heartbeat = make_paused(session, **engine)
    heartbeat.resume()
    session.beats.clear()
    return heartbeat, session


def test_heartbeat_reports_version_and_sweeps_rarely() -> None:
    """Each heartbeat has the version and the digest that the engine serves. Sweeps are less frequent."""
    heartbeat, session = make_heartbeat()
    heartbeat.beat()
    heartbeat.beat()
    assert session.beats == [(3, "digest")] * 2
    assert session.sweeps == 1  # at `resume`


def test_no_heartbeat_while_paused_or_hung() -> None:
    """No heartbeat and no sweep occurs while the thread is paused or the engine loop is hung."""
    hanging, first = make_heartbeat(hung=True)
    paused, second = make_heartbeat()
    paused.paused = True
    for heartbeat, session, swept in ((hanging, first, 0), (paused, second, 1)):
        heartbeat.beat()
        assert (session.beats, session.sweeps) == ([], swept)


def test_no_heartbeat_before_registration() -> None:
    """The thread is paused until the worker is registered."""
    session = FakeWorkerSession()
    heartbeat = make_paused(session)
    heartbeat.beat()
    assert (session.beats, session.sweeps) == ([], 0)


def test_resume_delays_the_next_sweep() -> None:
    """`resume` sends a heartbeat and restarts the sweep interval, because an outage may have stopped the
    heartbeats of other workers too."""
    heartbeat, session = make_heartbeat()
    heartbeat.paused = True
    heartbeat._last_sweep_at -= 3600
    heartbeat.resume()
    assert (session.beats, session.sweeps) == ([(3, "digest")], 1)


def test_failed_sweep_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed sweep is repeated at the next heartbeat."""
    heartbeat, session = make_heartbeat()
    heartbeat._last_sweep_at -= 3600
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(session, "notify_lost_jobs", lambda: 1 / 0)
        heartbeat.beat()
    heartbeat.beat()
    assert session.sweeps == 2


def test_no_heartbeat_before_the_first_version() -> None:
    """No heartbeat is sent before the engine serves a version."""
    heartbeat, session = make_heartbeat(served_version=None)
    heartbeat.beat()
    assert session.beats == []


def has_more_beats(session: FakeWorkerSession, count: int) -> bool:
    return len(session.beats) > count


def test_a_heartbeat_that_is_due_is_sent_at_once() -> None:
    """`beat_soon` makes the thread send a heartbeat before its interval has passed."""
    session = FakeWorkerSession()
    heartbeat = make_paused(session)
    heartbeat._interval = 3600.0
    heartbeat.start()
    try:
        heartbeat.resume()
        for sent in range(1, 4):
            heartbeat.beat_soon()
            wait_until(partial(has_more_beats, session, sent))
    finally:
        heartbeat.stop()
