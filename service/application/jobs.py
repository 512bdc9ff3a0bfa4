"""Jobs of all kinds: list, retry and stream events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_

from service.application.job_queue import get_job, job_not_found, lock_job, without_columns
from service.application.served_model import get_served_model
from service.db.database import Database
from service.db.models import Job, now
from service.errors import Conflict, InvalidInput, Unavailable
from service.jobs import views
from service.jobs.broker import Broker, Event, ignoring_broker_outage
from service.jobs.event_stream import with_idle_ticks
from service.jobs.job_kinds import JOB_KINDS
from service.jobs.views import JOB_STATUSES, OPEN_STATUSES, ResourceDict
from service.kit.ids import request_id
from service.kit.pagination import decode_cursor, encode_cursor, invalid_cursor, validate_limit
from service.ledger import audit
from service.ledger.audit_coverage import EDIT
from service.ledger.ledger import iso_utc

log = logging.getLogger(__name__)

END_CHECK_INTERVAL = 3.0  #: seconds without events after which the row is checked for an end


class JobService:
    """Operations on jobs of all kinds."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self.database, self.broker = database, broker

    def page(
        self,
        status: str | None = None,
        kind: str | None = None,
        exhausted: bool | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> ResourceDict:
        """Jobs of all kinds: {"items": newest first, "next": cursor or None}. `exhausted`: only those that failed after
        all their attempts."""
        validate_limit(limit)
        if status is not None and status not in JOB_STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(JOB_STATUSES)}.", "status")
        if kind is not None and kind not in JOB_KINDS:
            raise InvalidInput(f"`kind` must be one of {', '.join(JOB_KINDS)}.", "kind")
        filters = {Job.status: status, Job.kind: kind, Job.exhausted: exhausted}
        with self.database.read_session() as session:
            query = without_columns(Job.request, Job.result).where(
                Job.model == get_served_model(session).fingerprint
            )
            query = query.where(*(column == value for column, value in filters.items() if value is not None))
            query = query.where(*_after_cursor(decode_cursor(cursor, str)))
            jobs = list(session.scalars(query.order_by(Job.created.desc(), Job.id.desc()).limit(limit + 1)))
            next_cursor = _cursor_of(jobs[limit - 1]) if len(jobs) > limit else None
            return {"items": [views.job_summary(job) for job in jobs[:limit]], "next": next_cursor}

    def retry(self, job_id: str, actor: str) -> ResourceDict:
        """Queue a failed job again with a new set of attempts. Raises Conflict if it has not failed."""
        with self.database.write_session() as session:
            job = lock_job(session, get_job(session, None, job_id))
            if job.status != "failed":
                raise Conflict(f"{job_id} is {job.status}: only a failed job can be retried.")
            job.status, job.attempts, job.exhausted, job.cancel_requested = "queued", 0, False, False
            job.error = job.result = job.progress = job.worker = job.started = job.ended = (
                job.cancelled_by
            ) = None
            job.updated, job.request_id = now(), request_id.get() or job.request_id
            session.flush()
            if job.kind == EDIT:
                audit.append(session, EDIT, [(job.id,)])
            self.broker.delete_channel(
                job_id
            )  # before the commit, so that no event of the new attempt is deleted
            kind, caller, cost, summary = job.kind, job.actor, job.cost, views.job_summary(job)
        log.info("job retried", extra={"job": job_id, "actor": actor})
        with ignoring_broker_outage(job_id):
            self.broker.notify(job_id, kind, caller, cost)
        return summary

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """Yield progress events, then "end" with the resource. A finished job yields "end" at once.

        The row is checked while idle: a worker can die after it commits the end and before it publishes it.
        """
        if end_event := await asyncio.to_thread(self._end_event, job_id):
            yield end_event
            return
        async with aclosing(
            with_idle_ticks(self.broker.events(job_id, after), END_CHECK_INTERVAL)
        ) as events_or_idle:
            async for event in events_or_idle:
                if event is not None:
                    yield event
                elif end_event := await asyncio.to_thread(self._end_event_if_available, job_id):
                    yield end_event
                    return

    def _end_event_if_available(self, job_id: str) -> Event | None:
        with suppress(Unavailable):
            return self._end_event(job_id)
        return None

    def _end_event(self, job_id: str) -> Event | None:
        with self.database.read_session() as session:
            job = session.get(Job, job_id)
            if job is None:
                raise job_not_found(None, job_id)
            if job.status in OPEN_STATUSES or job.ended is None:
                return None
            return Event(str(int(job.ended.timestamp() * 1e6)), "end", views.serialize_job(session, job))


def _cursor_of(job: Job) -> str:
    """Return the cursor of the page after a job. It works also after the job was deleted."""
    return encode_cursor(f"{iso_utc(job.created)} {job.id}")


def _after_cursor(cursor: str | None) -> tuple[ColumnElement[bool], ...]:
    """Return the condition for jobs after a cursor. Ids of different kinds do not sort by time, so it compares
    `created`."""
    if cursor is None:
        return ()
    time, _, last_id = cursor.partition(" ")
    try:
        created = datetime.fromisoformat(time)
    except ValueError:
        raise invalid_cursor() from None
    if created.tzinfo is None or not last_id:
        raise invalid_cursor()
    return (or_(Job.created < created, and_(Job.created == created, Job.id < last_id)),)
