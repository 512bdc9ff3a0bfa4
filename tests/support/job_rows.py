"""Helpers of the tests of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from service.db.models import Worker, now
from service.errors import (
    CommitOutcomeUnknown,
    Unavailable,
)
from service.jobs.broker import Broker
from service.jobs.job_store import ClaimedJob
from tests.support.workers import WorkerParts

MODEL = "fingerprint"
RECORD = {"subject": "Eiffel Tower", "prompt": "The {} is located in", "target_new": "Rome"}


def claim_job(worker: WorkerParts, job_id: str) -> ClaimedJob:
    """Claim a job that can be claimed."""
    job = worker.jobs.claim(job_id)
    assert job is not None
    return job


def commit_edit(worker: WorkerParts, edit_id: str, **body: Any) -> Any:
    job = claim_job(worker, edit_id)
    return worker.jobs.commit_edit(
        job, worker.ledger.head(), edit_id.encode(), {"seed": 1, **body}, {"seconds": 1.0}
    )


def expire_heartbeat(worker: WorkerParts) -> None:
    """Set the worker's heartbeat to an hour ago."""
    with worker.database.write_session() as session:
        long_ago = now() - timedelta(hours=1)
        session.execute(update(Worker).where(Worker.id == worker.id).values(heartbeat=long_ago))


def worker_row(worker: WorkerParts, worker_id: str = "worker-1") -> Any:
    with worker.database.read_session() as session:
        return session.get(Worker, worker_id)


def lose_connection_after_commit(
    worker: WorkerParts, monkeypatch: pytest.MonkeyPatch, times: Any = 1
) -> None:
    """Make the next commits succeed and raise CommitOutcomeUnknown."""
    session, left = worker.database.write_session, [times]

    @contextmanager
    def doubtful() -> Iterator[Any]:
        with session() as opened:
            yield opened
        left[0] -= 1
        if left[0] >= 0:
            raise CommitOutcomeUnknown("the outcome is unknown.")

    monkeypatch.setattr(worker.database, "write_session", doubtful)


def raise_unavailable(*_: Any, **__: Any) -> None:
    raise Unavailable("the queue does not answer.")


def last_event(broker: Broker, job_id: str) -> Any:
    async def listen() -> Any:
        async with asyncio.timeout(20):
            return [event async for event in broker.events(job_id)][-1]

    return asyncio.run(listen())
