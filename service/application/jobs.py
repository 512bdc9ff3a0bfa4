"""Jobs whatever their kind: listed, tried again, followed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from sqlalchemy import ColumnElement, and_, or_
from sqlalchemy.orm import Session

from service.application.job_queue import find, hold, lean
from service.application.served_model import resident
from service.db.database import Database
from service.db.models import Job, now
from service.errors import Conflict, InvalidInput, NotFound, Unavailable
from service.jobs import views
from service.jobs.broker import JOBS, Broker, Event, told
from service.jobs.event_stream import heard
from service.jobs.views import OPEN, STATUSES, Resource
from service.kit.ids import request_id
from service.kit.pagination import check_limit, cursor_after, read_cursor, strange_cursor

log = logging.getLogger(__name__)

LOOK = 3.0  #: silent seconds after which a listener looks whether the row has ended without a word


class Jobs:
    """What is the same for every job."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self.database, self.broker = database, broker

    def page(
        self,
        status: str | None = None,
        kind: str | None = None,
        dead: bool | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Resource:
        """Jobs of all kinds: {"items": newest first, "next": cursor or None}. `dead`: given up after too many attempts."""
        check_limit(limit)
        if status is not None and status not in STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(STATUSES)}.", "status")
        if kind is not None and kind not in JOBS:
            raise InvalidInput(f"`kind` must be one of {', '.join(JOBS)}.", "kind")
        wanted = {Job.status: status, Job.kind: kind, Job.dead: dead}
        with self.database.read() as session:
            query = lean(Job.request, Job.result).where(Job.model == resident(session).fingerprint)
            query = query.where(*(column == value for column, value in wanted.items() if value is not None))
            query = query.where(*_older(session, read_cursor(cursor, str)))
            found = list(session.scalars(query.order_by(Job.created.desc(), Job.id.desc()).limit(limit + 1)))
            more = cursor_after(found[limit - 1].id) if len(found) > limit else None
            return {"items": [views.summary(job) for job in found[:limit]], "next": more}

    def retry(self, job_id: str, actor: str) -> Resource:
        """Let a failed job wait again, as if it had never been tried."""
        with self.database.session() as session:
            job = hold(session, find(session, None, job_id))
            if job.status != "failed":
                raise Conflict(f"{job_id} is {job.status}: only a job that failed can be tried again.")
            job.status, job.attempts, job.dead, job.cancel_requested = "queued", 0, False, False
            job.error = job.result = job.progress = job.worker = job.started = job.ended = None
            job.updated, job.request_id = now(), request_id.get() or job.request_id
            session.flush()
            self.broker.forget(job_id)  # before the commit: a worker's first word about it must not be lost
            kind, answer = job.kind, views.summary(job)
        log.info("job retried", extra={"job": job_id, "actor": actor})
        with told(job_id):
            self.broker.announce(job_id, kind)
        return answer

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """Progress, then a last event "end" with the resource. A job that has ended gives its end at once.

        The row is looked at in the silences: a worker can die between the commit of an end and telling it.
        """
        if ended := await asyncio.to_thread(self._ended, job_id):
            yield ended
            return
        async with aclosing(heard(self.broker.events(job_id, after), LOOK)) as every:
            async for event in every:
                if event is not None:
                    yield event
                elif ended := await asyncio.to_thread(self._ended_quietly, job_id):
                    yield ended
                    return

    def _ended_quietly(self, job_id: str) -> Event | None:
        with suppress(Unavailable):
            return self._ended(job_id)
        return None

    def _ended(self, job_id: str) -> Event | None:
        with self.database.read() as session:
            job = session.get(Job, job_id)
            if job is None:
                raise NotFound(f"there is no {job_id}.")
            if job.status in OPEN or job.ended is None:
                return None
            return Event(str(int(job.ended.timestamp() * 1e6)), "end", views.resource(session, job))


def _older(session: Session, last: str | None) -> tuple[ColumnElement[bool], ...]:
    """What comes after a job in a list of all kinds, whose ids do not sort by time together."""
    if last is None:
        return ()
    job = session.get(Job, last)
    if job is None:
        raise strange_cursor()
    return (or_(Job.created < job.created, and_(Job.created == job.created, Job.id < job.id)),)
