"""Who says that a worker lives, and when it is silent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.engine.engine import Engine
from service.jobs.worker_session import WorkerSession
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
    """Each beat tells the engine's position; sweeps are rarer."""
    heartbeat, session = make_heartbeat()
    heartbeat.beat()
    heartbeat.beat()
    assert session.beats == [(3, "digest")] * 2
    assert session.sweeps == 1  # when it resumed


def test_no_heartbeat_while_paused_or_hung() -> None:
    """A paused keeper is silent, and so is one whose loop has not come round for long."""
    hanging, first = make_heartbeat(hung=True)
    paused, second = make_heartbeat()
    paused.paused = True
    for heartbeat, session, swept in ((hanging, first, 0), (paused, second, 1)):
        heartbeat.beat()
        assert (session.beats, session.sweeps) == ([], swept)


def test_no_heartbeat_before_registration() -> None:
    """Nothing is said of a worker that has no row yet."""
    session = FakeWorkerSession()
    heartbeat = make_paused(session)
    heartbeat.beat()
    assert (session.beats, session.sweeps) == ([], 0)


def test_resume_delays_the_next_sweep() -> None:
    """What was down for one worker may have been down for all: their jobs are no orphans before they had time."""
    heartbeat, session = make_heartbeat()
    heartbeat.paused = True
    heartbeat._last_sweep_at -= 3600
    heartbeat.resume()
    assert (session.beats, session.sweeps) == ([(3, "digest")], 1)


def test_failed_sweep_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that met an outage is due again at the next beat."""
    heartbeat, session = make_heartbeat()
    heartbeat._last_sweep_at -= 3600
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(session, "notify_lost_jobs", lambda: 1 / 0)
        heartbeat.beat()
    heartbeat.beat()
    assert session.sweeps == 2


def test_no_heartbeat_before_the_first_version() -> None:
    """Before the first version is built there is no heartbeat to give."""
    heartbeat, session = make_heartbeat(served_version=None)
    heartbeat.beat()
    assert session.beats == []
